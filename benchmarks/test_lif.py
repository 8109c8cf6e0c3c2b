"""Multi-timestep LIF against its peers. Every result is checked against plain torch before it is timed."""

import pytest
import torch
from peers import PEERS, Missing, Neuron, ours

from spikeclip.ops import _backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE = 32 * 384 * 64  # one layer of the paper's image tower: batch 32, 384 channels, 64 tokens
OURS = [
    n
    for n in _backends.BACKENDS
    if n != "torch" and not _backends.triton_interpreted() and not _backends.unavailable(n, DEVICE)
]
MAKERS = {**{f"spikeclip ({name})": ours(name) for name in OURS}, **PEERS}
IN_FULL = list(MAKERS)
SHORT = [name for name in MAKERS if name not in ("plain loop", "snnTorch Leaky")]


def make(who, neuron):
    try:
        return MAKERS[who](neuron)
    except Missing as reason:
        pytest.skip(str(reason))


def checked(run, neuron, x, g):
    """Spikes and gradient equal plain torch's, but where rounding (fused multiply-add, say) turned a spike."""
    with torch.no_grad():
        small = x[:, : 1 << 16].float()
    small.requires_grad_()
    want = PEERS["plain loop"](neuron)(small)
    (want_grad,) = torch.autograd.grad(want, small, g[:, : 1 << 16].float())
    mine = small.detach().to(x.dtype).requires_grad_()
    spikes = run(mine)
    (grad,) = torch.autograd.grad(spikes, mine, g[:, : 1 << 16].to(spikes.dtype))
    turned = (spikes.float() != want).any(0)
    assert turned.float().mean() < 1e-4, f"{int(turned.sum())} neurons differ"
    error = (grad.float() - want_grad)[:, ~turned].abs().max() / want_grad.abs().max()
    assert error < (1e-5 if x.dtype == torch.float32 else 1e-2), f"gradient error {error:.1e}"


def forward_backward(run, x, g):
    x.requires_grad_()

    def call():
        torch.autograd.grad(run(x), x, g)
        if x.is_cuda:
            torch.cuda.synchronize()

    return call


def inference(run, x):
    def call():
        with torch.no_grad():
            run(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    return call


def tensors(steps, n, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(steps, n) * 1.2 + 0.2).to(DEVICE, dtype), torch.randn(steps, n).to(DEVICE, dtype)


@pytest.mark.parametrize("who", IN_FULL)
@pytest.mark.parametrize("surrogate", ["sigmoid", "atan"])
def test_forward_backward(benchmark, surrogate, who):
    neuron = Neuron(surrogate)
    benchmark.group = f"forward + backward, {surrogate}, [4, 32*384*64] fp32"
    run, (x, g) = make(who, neuron), tensors(4, WIDE)
    checked(run, neuron, x, g)
    benchmark(forward_backward(run, x, g))


@pytest.mark.parametrize("who", SHORT)
def test_forward_backward_of_sixteen_steps(benchmark, who):
    neuron = Neuron("sigmoid")
    benchmark.group = "forward + backward, sigmoid, [16, 32*384*64] fp32"
    run, (x, g) = make(who, neuron), tensors(16, WIDE)
    checked(run, neuron, x, g)
    benchmark(forward_backward(run, x, g))


@pytest.mark.parametrize("who", IN_FULL)
def test_inference(benchmark, who):
    neuron = Neuron("sigmoid")
    benchmark.group = "forward, no grad, [4, 32*384*64] fp32"
    run, (x, g) = make(who, neuron), tensors(4, WIDE)
    checked(run, neuron, x, g)
    benchmark(inference(run, x))


@pytest.mark.parametrize("who", [name for name in IN_FULL if name.startswith("spikeclip") or name == "snnTorch Leaky"])
def test_snntorchs_neuron(benchmark, who):
    """Input not divided by tau: what snnTorch's Leaky computes."""
    neuron = Neuron("atan", decay_input=False)
    benchmark.group = "forward + backward, snnTorch's neuron, atan, [4, 32*384*64] fp32"
    run, (x, g) = make(who, neuron), tensors(4, WIDE)
    checked(run, neuron, x, g)
    benchmark(forward_backward(run, x, g))


@pytest.mark.parametrize("who", [name for name in IN_FULL if name.startswith("spikeclip")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(benchmark, who, dtype):
    neuron = Neuron("sigmoid")
    benchmark.group = "forward + backward, sigmoid, [4, 32*384*64] by dtype"
    run, (x, g) = make(who, neuron), tensors(4, WIDE, getattr(torch, dtype))
    checked(run, neuron, x, g)
    benchmark(forward_backward(run, x, g))


@pytest.mark.parametrize("who", SHORT)
def test_overhead(benchmark, who):
    neuron = Neuron("sigmoid")
    benchmark.group = "one call with grad, [4, 8] fp32"
    run, (x, g) = make(who, neuron), tensors(4, 8)
    checked(run, neuron, x, g)
    x.requires_grad_()
    benchmark(lambda: run(x))
