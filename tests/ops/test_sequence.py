import weakref

import pytest
import torch

from spikeclip.ops import (
    Sequence,
    _backends,
    lif,
    pack_spikes,
    prepare_weights,
    spike_attention_lif,
    spike_conv2d_lif,
    spike_matmul_lif,
)

NEURON = {"tau": 3.0, "v_threshold": 0.4, "v_reset": None, "decay_input": True}
KINDS = ["fp32", "int16", "int8"]

pytestmark = pytest.mark.skipif(_backends.unavailable("cpu", "cpu") is not None, reason="the C++ extension is not here")


def spikes(*shape, rate=0.2):
    return (torch.rand(shape) < rate).float()


class Network:
    """First neurons, a pooled convolution, products with a stream, attention, a mean: at once, or recorded."""

    def __init__(self, kind: str):
        self.conv = prepare_weights(torch.randn(96, 40, 3, 3) * 0.1, kind)
        self.qkv, self.project = (prepare_weights(torch.randn(96, n) * 0.3, kind) for n in (288, 96))
        self.bias, self.weights = torch.randn(96) * 0.1, torch.rand(3)

    def __call__(self, x, stream, sequence=None):
        if sequence is None:
            s = lif(x.expand(3, *x.shape), packed=True, **NEURON)[0]
        else:
            s = sequence.lif(x, 3, **NEURON)
        s = spike_conv2d_lif(s, self.conv, self.bias, padding=1, pool=(3, 2, 1), sequence=sequence, **NEURON).flatten(2, 3)
        qkv = spike_matmul_lif(s, self.qkv, sequence=sequence, **NEURON)
        s = spike_attention_lif(qkv, scale=0.2, num_heads=6, sequence=sequence, **NEURON)
        s = spike_matmul_lif(s, self.project, self.bias, add=stream, currents=stream, sequence=sequence, **NEURON)
        if sequence is None:
            return s, torch.einsum("t,tbnc->bc", self.weights, stream) / stream.shape[2]
        return s, sequence.mean(stream, self.weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_gives_what_the_calls_give(kind):
    network = Network(kind)
    x, stream, sequence = torch.empty(2, 9, 7, 40), torch.empty(3, 2, 20, 96), Sequence()
    got = network(x, stream, sequence)
    for _ in range(3):
        now, start = torch.randn(x.shape), torch.randn(stream.shape)
        x.copy_(now)
        stream.copy_(start)
        sequence.run()
        s, mean = network(now, start)
        assert 0.02 < s.density() < 0.9 and torch.equal(got[0].words, s.words)
        assert torch.equal(stream, start)
        torch.testing.assert_close(got[1], mean)


def test_it_keeps_its_tensors():
    sequence = Sequence()
    w, bias = prepare_weights(torch.full((70, 40), 0.1)), torch.ones(40)
    seen = weakref.ref(w.tiles)
    out = spike_matmul_lif(pack_spikes(spikes(4, 50, 70)), w, bias.bfloat16(), sequence=sequence)
    del w, bias
    sequence.run()
    assert seen() is not None and out.count() > 0


def test_a_run_follows_the_threads():
    sequence, found, threads = Sequence(), [], torch.get_num_threads()
    out = spike_matmul_lif(pack_spikes(spikes(4, 50, 70)), prepare_weights(torch.full((70, 40), 0.1)), sequence=sequence)
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            sequence.run()
            found.append(out.words.clone())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found) and out.count() > 0


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_run_goes_on_whatever_the_density(backend):
    w, s, sequence = prepare_weights(torch.randn(70, 40)), pack_spikes(spikes(4, 50, 70)), Sequence()
    out = spike_matmul_lif(s, w, backend=backend, sequence=sequence)
    for rate in (0.1, 0.9):
        now = spikes(4, 50, 70, rate=rate)
        s.words.copy_(pack_spikes(now).words)
        sequence.run()
        want = lif(now.double() @ w.dequantize().double())[0]
        assert (out.unpack() != want).float().mean() < 1e-3


def test_bad_arguments():
    sequence, s, w = Sequence(), pack_spikes(spikes(4, 2, 5, 96)), prepare_weights(torch.randn(96, 40))
    with pytest.raises(TypeError, match=r"sequence must be an ops.Sequence or None; got list"):
        spike_matmul_lif(s, w, sequence=[])
    with pytest.raises(ValueError, match="sequence must be None for the torch backend"):
        spike_matmul_lif(s, w, backend="torch", sequence=sequence)
    with pytest.raises(
        ValueError, match=r"sequence needs heads of 16, 32, 48 or 64 channels, and tokens; got 4 of 24 channels"
    ):
        spike_attention_lif(s, s, s, scale=0.1, num_heads=4, sequence=sequence)
    with pytest.raises(ValueError, match=r"weights must have shape \[4\], one for each of x's steps; got \[3\]"):
        sequence.mean(torch.zeros(4, 2, 5, 96), torch.zeros(3))
    with pytest.raises(ValueError, match="x must be contiguous float32 on a CPU"):
        sequence.mean(torch.zeros(4, 2, 5, 96).transpose(1, 2), torch.zeros(4))
    with pytest.raises(TypeError, match="weights must be a torch.Tensor; got list"):
        sequence.mean(torch.zeros(4, 2, 5, 96), [0.0])
    with pytest.raises(ValueError, match="T must be an integer >= 1; got 0"):
        sequence.lif(torch.zeros(3, 4), 0, **NEURON)
    with pytest.raises(ValueError, match="x must be contiguous float32 on a CPU, not empty"):
        sequence.lif(torch.zeros(0, 4), 2, **NEURON)
    with pytest.raises(ValueError, match="tau must be > 1"):
        sequence.lif(torch.zeros(3, 4), 2, **{**NEURON, "tau": 1.0})
    sequence.run()
    assert sequence.nbytes == 0
