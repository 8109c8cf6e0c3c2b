"""Random shapes, densities and dtypes: every backend of this machine gives the sums of the oracle."""

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from spikeclip.ops import _backends, pack_spikes, prepare_weights, spike_attention, spike_conv2d, spike_matmul  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in _backends.BACKENDS if _backends.unavailable(name, DEVICE) is None]
UNIT = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}
pytestmark = pytest.mark.skipif(_backends.triton_interpreted(), reason="hours in the interpreter")
# On a GPU triton compiles a kernel for nearly every example.
many = settings(
    max_examples=700 if DEVICE == "cpu" else 30, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
densities, seeds = st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.5, 1.0]), st.integers(0, 2**31)


def bounded(got, want, terms, dtype):
    """|got - want| within the rounding of a sum of ``terms`` of this size, and of the output; torch's product keeps it too."""
    size = want.abs() + terms
    assert bool(((got.cpu().double() - want).abs() <= 8 * UNIT[dtype] * size + 1e-30).all())


@many
@given(
    m=st.integers(0, 40), k=st.integers(1, 800), n=st.integers(1, 70), density=densities, seed=seeds,
    dtype=st.sampled_from(list(UNIT)), packed=st.booleans(), kind=st.sampled_from(["tensor", "fp32", "int16", "int8"]),
)  # fmt: skip
def test_spike_matmul(m, k, n, density, seed, dtype, packed, kind):
    generator = torch.Generator().manual_seed(seed)
    s = (torch.rand(m, k, generator=generator) < density).to(dtype)
    w = torch.randn(k, n, generator=generator).to(dtype)
    weights = w.to(DEVICE) if kind == "tensor" else prepare_weights(w.to(DEVICE), kind)
    exact = w.double() if kind == "tensor" else weights.values.cpu().double()
    exact = exact if kind in ("tensor", "fp32") else exact * weights.scale.cpu().double()
    spikes = s.to(DEVICE)
    for backend in BACKENDS:
        got = spike_matmul(pack_spikes(spikes, backend) if packed else spikes, weights, backend=backend)
        bounded(got, s.double() @ exact, s.double() @ exact.abs(), dtype if kind == "tensor" else torch.float32)


@many
@given(
    b=st.integers(0, 3), c=st.integers(1, 70), h=st.integers(1, 9), w=st.integers(1, 9), o=st.integers(1, 40),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), stride=st.integers(1, 3), padding=st.integers(0, 2),
    density=densities, seed=seeds, dtype=st.sampled_from(list(UNIT)),
)  # fmt: skip
def test_spike_conv2d(b, c, h, w, o, kernel, stride, padding, density, seed, dtype):
    hypothesis.assume(h + 2 * padding >= kernel[0] and w + 2 * padding >= kernel[1])
    generator = torch.Generator().manual_seed(seed)
    s = (torch.rand(b, c, h, w, generator=generator) < density).to(dtype)
    weight = torch.randn(o, c, *kernel, generator=generator).to(dtype)
    want = torch.nn.functional.conv2d(s.double(), weight.double(), None, stride, padding)
    terms = torch.nn.functional.conv2d(s.double(), weight.double().abs(), None, stride, padding)
    for backend in BACKENDS:
        got = spike_conv2d(s.to(DEVICE), weight.to(DEVICE), stride=stride, padding=padding, backend=backend)
        bounded(got, want, terms, dtype)


@many
@given(
    leading=st.integers(0, 3), n=st.integers(0, 12), s=st.integers(0, 12), heads=st.integers(1, 4), width=st.integers(1, 70),
    density=densities, seed=seeds, dtype=st.sampled_from(list(UNIT)),
)  # fmt: skip
def test_spike_attention(leading, n, s, heads, width, density, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    parts = [(torch.rand(leading, t, heads * width, generator=generator) < density).to(dtype) for t in (n, s, s)]
    q, k, v = (t.double().unflatten(-1, (heads, width)).transpose(1, 2) for t in parts)
    want = ((q @ k.mT) @ v * 0.125).transpose(1, 2).flatten(2).to(dtype)
    for backend in BACKENDS:
        got = spike_attention(*(t.to(DEVICE) for t in parts), scale=0.125, num_heads=heads, backend=backend)
        assert got.dtype == dtype and torch.equal(got.cpu(), want)
