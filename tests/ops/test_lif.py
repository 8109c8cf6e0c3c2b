import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
from compare import assert_error_bounded, assert_spikes

from spikeclip.ops import _backends, lif
from spikeclip.ops.surrogate import SURROGATES

INTERPRETED = _backends.triton_interpreted()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in _backends.BACKENDS if _backends.unavailable(name, DEVICE) is None]
FUSED = [name for name in BACKENDS if name != "torch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
RESETS = list(itertools.product((0.0, -0.2, None), (True, False), (True, False)))
# Largest rounding error of h near the threshold, float32 inside, and of x where x has fewer bits (x itself is exact).
BAND = 1e-5


def run(x, v0, tau, backend, ds, dv, **options):
    x, v0, tau = (t.clone().to(DEVICE).requires_grad_() for t in (x, v0, tau))
    spikes, v_last = lif(x, v0, tau=tau, backend=backend, **options)
    torch.autograd.backward([spikes, v_last], [ds.to(DEVICE), dv.to(DEVICE)])
    return [t.detach().cpu() for t in (spikes, v_last, x.grad, v0.grad, tau.grad)]


def inputs(steps, shape, dtype):
    x = (torch.randn(steps, *shape) * 1.2 + 0.4).to(dtype)
    return x, torch.randn(shape) * 0.3, torch.tensor(2.3), torch.randn(steps, *shape).to(dtype), torch.randn(shape)


def check(backend, case, **options):
    x, v0, tau, ds, dv = case
    leaves = [t.double().requires_grad_() for t in (x, v0, tau)]
    merged = {"v_threshold": 1.0, "v_reset": 0.0, "decay_input": True, "detach_reset": False, "surrogate": "sigmoid", **options}
    merged["alpha"] = options.get("alpha") or SURROGATES[merged["surrogate"]].alpha
    spikes, v_last, h = oracle.lif(*leaves, **merged)
    torch.autograd.backward([spikes, v_last], [ds.double(), dv.double()])
    got = run(*case[:3], backend, ds, dv, **options)
    plain = run(*case[:3], "torch", ds, dv, **options)
    assert got[0].dtype == x.dtype and got[1].dtype == torch.float32
    assert_spikes(got[0], spikes, h - merged["v_threshold"], BAND)
    assert torch.equal(got[0], plain[0])
    assert torch.equal(plain[0].double(), spikes)  # the seeds leave no spike inside the band that rounding turned
    floor = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[x.dtype]
    for mine, ref, want, low in zip(
        got[1:], plain[1:], [v_last.detach(), *(leaf.grad for leaf in leaves)], [2e-6, floor, 5e-6, 1e-5], strict=True
    ):
        assert_error_bounded(mine, ref, want, floor=low)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_and_reset_matches_the_oracle(backend, surrogate):
    for v_reset, decay_input, detach_reset in RESETS:
        case = inputs(5, (3, 67), torch.float32)
        check(backend, case, surrogate=surrogate, v_reset=v_reset, decay_input=decay_input, detach_reset=detach_reset)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 9, 33])
def test_every_dtype_and_number_of_steps_matches_the_oracle(backend, dtype, steps):
    check(backend, inputs(steps, (2, 131), dtype))
    check(backend, inputs(steps, (2, 131), dtype), surrogate="atan", alpha=3.0, v_threshold=0.7, v_reset=None)


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("backend", FUSED)
def test_gradients_that_outgrow_the_caches_are_those_of_their_parts(backend):
    x, ds = torch.randn(4, 70_000), torch.randn(4, 70_000)

    def gradient(x, ds):
        x = x.to(DEVICE).requires_grad_()
        return torch.autograd.grad(lif(x, backend=backend)[0], x, ds.to(DEVICE))[0]

    parts = [gradient(*part) for part in zip(x.split(1000, 1), ds.split(1000, 1), strict=True)]
    assert torch.equal(gradient(x, ds), torch.cat(parts, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_steps(backend):
    check(backend, inputs(1024, (19,), torch.float32), surrogate="piecewise_exp")
    check(backend, inputs(1024, (19,), torch.bfloat16), detach_reset=True)


@pytest.mark.parametrize("backend", FUSED)
def test_many_neurons_and_both_thread_counts_agree_bit_for_bit(backend):
    case = inputs(4, (40_003,) if not INTERPRETED else (1_003,), torch.float32)
    first = run(*case[:3], backend, *case[3:])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    second = run(*case[:3], backend, *case[3:])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    check(backend, case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_if_is_lif_without_a_leak(backend):
    x = torch.randn(6, 50, device=DEVICE)
    spikes, v = lif(x, tau=math.inf, decay_input=False, backend=backend)
    membrane = torch.zeros(50, device=DEVICE)
    for t in range(6):
        membrane = membrane + x[t]
        assert torch.equal(spikes[t], (membrane >= 1.0).float())
        membrane = torch.where(membrane >= 1.0, 0.0, membrane)
    assert torch.equal(v, membrane)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_spike_exactly_at_the_threshold_fires(backend):
    spikes, v = lif(torch.tensor([[2.0, 1.9999]], device=DEVICE), backend=backend)
    assert spikes.tolist() == [[1.0, 0.0]] and v[0] == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_halves_continue_one_run_bit_for_bit(backend, dtype):
    x = torch.randn(10, 77, device=DEVICE).to(dtype)
    whole, v_whole = lif(x, backend=backend)
    first, v = lif(x[:3], backend=backend)
    second, v = lif(x[3:], v, backend=backend)
    assert torch.equal(torch.cat([first, second]), whole) and torch.equal(v, v_whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs_give_the_same_numbers_and_keep_their_memory_order(backend):
    x = torch.randn(3, 2, 5, 4, 6, device=DEVICE)
    nhwc = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    cases = {
        "channels last": nhwc,
        "batch first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": torch.stack([x, x], -1).flatten(-2)[..., ::2],
        "repeated in time": nhwc[:1].expand(3, 2, 5, 4, 6),
        "one of a step that is repeated": nhwc[:1].expand(3, 2, 5, 4, 6)[:1],
    }
    for name, strided in cases.items():
        strided = strided.detach().requires_grad_()
        plain = strided.detach().contiguous().requires_grad_()
        outputs = []
        for leaf in (strided, plain):
            spikes, v = lif(leaf, torch.linspace(-1, 1, 240, device=DEVICE).view(2, 5, 4, 6), backend=backend)
            weight = torch.arange(spikes.numel(), device=DEVICE).view(spikes.shape) % 7
            (spikes * weight).sum().backward()
            outputs.append((spikes, v, leaf.grad))
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)), name
    assert lif(nhwc, backend=backend)[0].stride() == nhwc.stride()
    assert lif(cases["repeated in time"], backend=backend)[0].stride() == nhwc.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_input(backend):
    x = torch.empty(4, 0, 3, device=DEVICE, requires_grad=True)
    spikes, v = lif(x, backend=backend)
    spikes.sum().backward()
    assert spikes.shape == (4, 0, 3) and v.shape == (0, 3) and x.grad.shape == x.shape


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 1)])
def test_one_neuron(backend, shape):
    x, grads = torch.randn(shape, device=DEVICE, requires_grad=True), []
    for name in (backend, "torch"):
        spikes, v = lif(x, backend=name)
        grads.append(torch.autograd.grad(spikes.sum() + v.sum(), x)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_one_output_used(backend):
    x = torch.randn(4, 30, device=DEVICE)
    for pick in (0, 1):
        grads = []
        for name in (backend, "torch"):
            leaf = x.clone().requires_grad_()
            lif(leaf, backend=name)[pick].sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_the_membrane_and_not_its_neighbours(backend):
    x = torch.full((3, 40), 0.9, device=DEVICE)
    x[1, 7] = math.nan
    spikes, v = lif(x, backend=backend)
    assert v[7].isnan() and not spikes[1:, 7].any() and v.isnan().sum() == 1


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("tau", [2.0, 3.3, 10.7])
def test_the_membrane_is_plain_torchs_bit_for_bit(backend, tau):
    for scale in (1e-20, 1.0, 1e30):
        x, v0 = torch.randn(2, 5000, device=DEVICE) * scale, torch.randn(5000, device=DEVICE) * scale
        for decay_input in (True, False):
            runs = [lif(x, v0, tau=tau, decay_input=decay_input, v_reset=0.1, backend=name) for name in (backend, "torch")]
            assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("v_reset", [0.0, None])
@pytest.mark.parametrize("decay_input", [True, False])
def test_infinite_and_huge_inputs_are_those_of_plain_torch(backend, v_reset, decay_input):
    x = torch.tensor([math.inf, -math.inf, 1e38, -1e38, 1.5], device=DEVICE).repeat(3, 1)
    x[1:, :2] = 1.0
    for tau in (2.0, 3.3, math.inf):
        got = lif(x, tau=tau, v_reset=v_reset, decay_input=decay_input, backend=backend)
        want = lif(x, tau=tau, v_reset=v_reset, decay_input=decay_input, backend="torch")
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", FUSED)
def test_autocast_keeps_x_and_gives_exact_spikes_in_its_dtype(backend):
    x = torch.randn(4, 200, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        spikes, v = lif(x, backend=backend)
        half, _ = lif(x.half(), backend=backend)
    assert spikes.dtype == torch.bfloat16 and half.dtype == torch.float16 and v.dtype == torch.float32
    assert torch.equal(spikes.float(), lif(x, backend=backend)[0])
    spikes.backward(torch.ones_like(spikes))
    want = x.detach().clone().requires_grad_()
    lif(want, backend=backend)[0].sum().backward()
    assert torch.equal(x.grad, want.grad)


@pytest.mark.parametrize("backend", FUSED)
def test_nothing_the_size_of_x_is_kept_but_x(backend):
    x = torch.randn(8, 1000, device=DEVICE, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lif(x, backend=backend)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    tau = torch.tensor(2.5, device=DEVICE, requires_grad=True)
    neuron = (1.0, 0.0, True, False, "atan", 2.0)
    x, v0 = torch.randn(3, 4, 5, device=DEVICE, requires_grad=True), torch.randn(4, 5, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.spikeclip.lif_fwd.default, (x, None, 2.0, None, *neuron, None, backend))
    torch.library.opcheck(torch.ops.spikeclip.lif_fwd.default, (x, v0, 2.0, tau, *neuron, torch.bfloat16, backend))
    ds, detached = torch.randn(3, 4, 5, device=DEVICE), [t.detach() for t in (x, v0, tau)]
    torch.library.opcheck(torch.ops.spikeclip.lif_bwd.default, (ds, None, *detached[:2], 2.0, detached[2], *neuron, backend))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph_with_equal_numbers(backend):
    def model(x, w):
        spikes, v = lif(x * w, backend=backend, surrogate="atan")
        return spikes.mean() + v.sum() * 0.1

    x = torch.randn(4, 33, device=DEVICE)
    grads = []
    for function in (model, torch.compile(model, fullgraph=True)):
        w = torch.linspace(0.5, 3, 33, device=DEVICE).requires_grad_()
        function(x, w).backward()
        grads.append(w.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_a_clear_error(backend):
    x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(lif(x, backend=backend)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="about the C++ extension")
def test_every_instruction_set_of_this_machine_passes(isa):
    from spikeclip import _cpu

    for dtype in DTYPES:
        check("cpu", inputs(4, (3, 77), dtype))
        check("cpu", inputs(7, (3, 77), dtype), v_reset=None, surrogate="erf", detach_reset=True)
    wide = torch.cat([torch.randn(4096) * 1e-6, torch.randn(4096) * 7e4, torch.randn(4096)]).half()[None]
    grads = []
    for backend in ("cpu", "torch"):
        x = wide.clone().requires_grad_()
        lif(x, backend=backend)[0].backward(torch.randn(wide.shape, generator=torch.Generator().manual_seed(1)).half())
        grads.append(x.grad.float())
    torch.testing.assert_close(*grads, rtol=1e-3, atol=6e-8, equal_nan=True)
    with pytest.raises(ValueError, match="instruction set must be one of"):
        _cpu.set_isa("mmx")


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="about the C++ extension")
def test_more_than_two_to_the_31_elements():
    """bfloat16 zeros with one strong neuron at either end; 4.3 GB for x, as much for the spikes."""
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    if int(available.split()[1]) < 12 << 20:
        pytest.skip("needs 12 GiB of free memory")
    x = torch.zeros(32, 2**26 + 1, dtype=torch.bfloat16)
    x[:, 0] = x[:, -1] = 2.0
    with torch.no_grad():
        spikes, _ = lif(x)
    assert spikes[:, [0, -1]].all() and sum(int(step.count_nonzero()) for step in spikes) == 64


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
def test_compiles_with_dynamic_shapes_and_thresholds():
    x = torch.randn(4, 8, device=DEVICE)
    compiled = torch.compile(lambda x, th: lif(x, v_threshold=th)[0], fullgraph=True, dynamic=True)
    for threshold in (1.0, 0.5, 0.25):
        assert torch.equal(compiled(x, threshold), lif(x, v_threshold=threshold)[0])


def test_a_forward_mode_derivative_is_a_clear_error():
    x = torch.randn(3, 4, device=DEVICE)
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda x: lif(x)[0], (x,), (torch.ones_like(x),))


BAD = {
    "x must be a torch.Tensor": lambda x: lif([1.0]),
    "x must be float32": lambda x: lif(x.int()),
    r"x must have shape \[T": lambda x: lif(torch.tensor(1.0)),
    "T >= 1": lambda x: lif(torch.empty(0, 3)),
    r"v0 must have shape \[4\]": lambda x: lif(x, torch.zeros(5)),
    "v0 must be floating": lambda x: lif(x, torch.zeros(4, dtype=torch.int64)),
    "v0 must be a torch.Tensor": lambda x: lif(x, 0.0),
    "v0 must be on x's device": lambda x: lif(x, torch.zeros(4, device="meta")),
    "tau must be > 1.*got nan": lambda x: lif(x, tau=math.nan),
    "tau must be > 1.*got 1.0": lambda x: lif(x, tau=1.0),
    "tau must be > 1.*got 0.5": lambda x: lif(x, tau=torch.tensor(0.5)),
    "tau must be a number or a floating tensor": lambda x: lif(x, tau=torch.ones(3)),
    "v_threshold must be a finite number": lambda x: lif(x, v_threshold=math.inf),
    "v_reset must be a finite number": lambda x: lif(x, v_reset=math.nan),
    "surrogate must be one of sigmoid": lambda x: lif(x, surrogate="relu"),
    "alpha must be a finite number > 0": lambda x: lif(x, alpha=-1.0),
    "backend must be one of auto, cpu": lambda x: lif(x, backend="gpu"),
    "tau must be a number or a tensor; got '2'": lambda x: lif(x, tau="2"),
    "tau must be a number or a tensor; got None": lambda x: lif(x, tau=None),
    "v_threshold must be a number; got 'a'": lambda x: lif(x, v_threshold="a"),
    "v_reset must be a number or None": lambda x: lif(x, v_reset=[0.0]),
    "alpha must be a number or None; got '4'": lambda x: lif(x, alpha="4"),
    "surrogate must be a name": lambda x: lif(x, surrogate=["atan"]),
    "decay_input and detach_reset must be True or False; got 'no'": lambda x: lif(x, decay_input="no"),
    "backend must be a name": lambda x: lif(x, backend=1),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message](torch.zeros(2, 4))


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="needs a machine without CUDA")
def test_a_named_backend_never_falls_back():
    with pytest.raises(RuntimeError, match="backend='cuda' is not available here: it runs on cuda tensors"):
        lif(torch.zeros(2, 4), backend="cuda")
    with pytest.raises(RuntimeError, match="it takes float32, float16, bfloat16, not torch.float64"):
        lif(torch.zeros(2, 4, dtype=torch.float64), backend="cpu")
    assert lif(torch.zeros(2, 4, dtype=torch.float64))[0].dtype == torch.float64


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="starts the interpreter itself")
def test_triton_passes_these_tests_in_its_interpreter():
    pytest.importorskip("triton")
    picked = "triton and not thousand and not surrogate and not in_its_interpreter"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", picked, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=os.path.dirname(__file__))
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
