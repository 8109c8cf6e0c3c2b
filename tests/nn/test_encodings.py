import pytest
import torch

from spikeclip.nn import DirectEncoding, LatencyEncoding, PoissonEncoding


def test_direct_repeats_without_copying():
    x = torch.randn(2, 3)
    out = DirectEncoding(T=4)(x)
    assert out.shape == (4, 2, 3) and out.data_ptr() == x.data_ptr()
    assert all(torch.equal(step, x) for step in out)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_repeated_images_lie_as_they_do(memory_format):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(6, 2, 3, 4, 5)
    last = memory_format == torch.channels_last
    weight = weight.movedim(2, -1).contiguous().movedim(-1, 2) if last else weight
    out = DirectEncoding(T=6)(x)
    assert out.shape == (6, 2, 3, 4, 5) and out.data_ptr() == x.data_ptr() and torch.equal(out[3], x)
    (grad,) = torch.autograd.grad(out, x, weight)
    torch.testing.assert_close(grad, weight.sum(0))
    assert grad.stride() == x.stride()


def test_poisson_rate_is_the_value():
    x = torch.tensor([0.0, 0.1, 0.5, 1.0]).repeat(2000, 1)
    generator = torch.Generator().manual_seed(1)
    spikes = PoissonEncoding(T=10)(x, generator)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(spikes.mean((0, 1)), x[0], atol=0.01, rtol=0)
    assert torch.equal(spikes, PoissonEncoding(T=10)(x, torch.Generator().manual_seed(1)))


def test_latency_fires_once_and_larger_earlier():
    x = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    spikes = LatencyEncoding(T=5)(x)
    assert torch.equal(spikes, torch.eye(5))
    assert torch.equal(LatencyEncoding(T=5)(torch.rand(100)).sum(0), torch.ones(100))


def test_latency_equals_spikingjelly():
    encoding = pytest.importorskip("spikingjelly.activation_based.encoding", reason="spikingjelly is not installed")
    x = torch.rand(100)
    theirs = encoding.LatencyEncoder(7)
    assert torch.equal(torch.stack([theirs(x) for _ in range(7)]), LatencyEncoding(T=7)(x))


@pytest.mark.parametrize("encoding", [PoissonEncoding, LatencyEncoding])
@pytest.mark.parametrize("x", [torch.tensor([1.5]), torch.tensor([-0.1]), torch.tensor([float("nan")]), torch.tensor([1])])
def test_values_outside_the_unit_range_are_refused(encoding, x):
    with pytest.raises(ValueError, match=r"x must .*\[0, 1\]"):
        encoding(T=3)(x)


@pytest.mark.parametrize("T", [0, -1, 2.0, True])
def test_bad_number_of_steps(T):
    with pytest.raises(ValueError, match="T must be an integer >= 1"):
        DirectEncoding(T)
