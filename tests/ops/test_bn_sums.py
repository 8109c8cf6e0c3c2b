import pytest
import torch

from spikeclip.ops import _backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in _backends.BACKENDS if _backends.unavailable(name, DEVICE) is None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [1, 37, 1100])
def test_factors_of_the_gradient_from_its_sums(backend, channels):
    sums, (scale, mean), inverse = torch.randn(2, channels) * 9, torch.randn(2, channels), torch.rand(channels) + 0.5
    got = [
        torch.ops.spikeclip.bn_factors(*(t.to(DEVICE) for t in (sums, scale, inverse, mean)), 123, apart, backend)
        for apart in (False, True)
    ]
    (dz, dz_x), scale, inverse, mean = (t.double() for t in (sums, scale, inverse, mean))
    b, nothing = -scale * inverse.square() * dz_x / 123, torch.zeros(channels)
    want = (scale, b, -scale * dz / 123 - b * mean)
    for (factors, dweight), rows in zip(got, (want, (scale, nothing, nothing, *want[1:])), strict=True):
        torch.testing.assert_close(factors.double().cpu(), torch.stack(rows), rtol=1e-5, atol=1e-6, check_dtype=False)
        torch.testing.assert_close(dweight.double().cpu(), dz_x * inverse)
        assert factors.dtype == dweight.dtype == torch.float32 and torch.equal(factors[0].cpu(), scale.float())


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not available here")
@pytest.mark.parametrize("parts", [1, 255, 256, 257, 1000])
def test_triton_adds_the_sums_of_many_programs_in_float64(parts):
    from spikeclip.kernels.bn_lif import _sum_parts

    for channels in (1, 37, 64):
        partial = torch.randn(parts, 2, channels) * 10.0 ** torch.randint(-3, 4, (parts, 2, channels))
        total = _sum_parts(partial.to(DEVICE))
        assert torch.equal(total.cpu(), partial.double().sum(0).float()) and torch.equal(total, _sum_parts(partial.to(DEVICE)))
