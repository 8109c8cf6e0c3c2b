import copy
import gc
import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch
from compare import assert_error_bounded

from spikeclip.ops import _backends, pack_spikes, prepare_weights, reference, spike_matmul
from spikeclip.ops._density import LARGE_ON_GPU, event_driven
from spikeclip.ops.spike_matmul import goes_dense

INTERPRETED = _backends.triton_interpreted()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in _backends.BACKENDS if _backends.unavailable(name, DEVICE) is None]
FUSED = [name for name in BACKENDS if name != "torch"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SIZES = [(1, 1, 1), (5, 31, 17), (7, 33, 1), (64, 63, 65), (9, 65, 16), (40, 400, 33), (0, 5, 3), (1, 1000, 40)]


def tensors(m, k, n, density=0.2, dtype=torch.float32):
    s = (torch.rand(m, k) < density).to(dtype)
    s[: m // 3] = 0
    s[m // 3 : m // 3 + 1] = 1
    return s, (torch.randn(k, n) / k**0.5).to(dtype), torch.randn(n).to(dtype)


def gradients(s, w, bias, dy, backend, packed=False):
    leaves = [t.clone().to(DEVICE).requires_grad_() for t in (s, w, bias)]
    y = spike_matmul(pack_spikes(leaves[0].detach()) if packed else leaves[0], *leaves[1:], backend=backend)
    y.backward(dy.to(DEVICE, y.dtype))
    return [t.detach().cpu() for t in (y, *(leaf.grad for leaf in leaves[packed:]))]


def check(backend, s, w, bias, packed=False):
    dy = torch.randn(s.shape[0], w.shape[1]).to(w.dtype)
    leaves = [t.double().requires_grad_() for t in (s, w, bias)]
    y = leaves[0] @ leaves[1] + leaves[2]
    y.backward(dy.double())
    got = gradients(s, w, bias, dy, backend, packed)
    plain = gradients(s, w, bias, dy, "torch", packed)
    for mine, ref, want in zip(got, plain, [y.detach(), *(leaf.grad for leaf in leaves[packed:])], strict=True):
        assert mine.dtype == w.dtype
        assert_error_bounded(mine, ref, want, floor=FLOOR[w.dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_product_and_gradients_match_the_oracle(backend, size, packed):
    check(backend, *tensors(*size), packed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(backend, dtype):
    check(backend, *tensors(50, 129, 70, dtype=dtype))


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(3, 10240, 40), (2500, 384, 48), (700, 1536, 100)], ids=str)
def test_large(backend, size):
    check(backend, *tensors(*size))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_leading_dimensions(backend):
    s, w, bias = (t.to(DEVICE) for t in tensors(24, 100, 40))
    want = s.double() @ w.double() + bias.double()
    strided = [w.t().contiguous().t(), torch.stack([w, w], -1)[..., 0], torch.cat([w, w], 1)[:, :40]]
    for weights in strided:
        got = spike_matmul(s.view(2, 3, 4, 100), weights, bias, backend=backend)
        torch.testing.assert_close(got, want.float().view(2, 3, 4, 40), rtol=1e-5, atol=1e-5)
    across = s.t().contiguous().t()
    torch.testing.assert_close(spike_matmul(across, w, bias, backend=backend), want.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spike_matmul(s[0], w, bias, backend=backend), want[0].float(), rtol=1e-5, atol=1e-5)
    one = spike_matmul(s[:1].expand(5, 100), w, backend=backend)
    torch.testing.assert_close(one, (want[:1] - bias.double()).float().expand(5, 40), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["int16", "int8"])
@pytest.mark.parametrize("length", [1, 33, 256, 257, 1000])
def test_integer_weights_are_multiplied_exactly(backend, kind, length):
    s, w, bias = (t.to(DEVICE) for t in tensors(30, length, 70, density=0.5))
    weights = prepare_weights(w, kind)
    want = (s.double() @ weights.values.double()) * weights.scale.double() + bias.double()
    for spikes in (s, pack_spikes(s)):
        got = spike_matmul(spikes, weights, bias, backend=backend)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if not INTERPRETED or name != "triton"])
@pytest.mark.parametrize("kind", ["fp32", "int16", "int8"])
@pytest.mark.parametrize("density", [0.001, 0.03, 0.12])
@pytest.mark.parametrize("length", [449, 1000, 1536, 5000, 9000])
def test_rows_so_sparse_that_kernels_take_more_of_them_at_once(backend, kind, density, length):
    s = (torch.rand(90, length, device=DEVICE) < density).float()
    s[:, -1] = 1
    w, bias = torch.randn(length, 70, device=DEVICE) / length**0.5, torch.randn(70, device=DEVICE)
    weights = prepare_weights(w, kind)
    want = s.double() @ weights.dequantize().double() + bias.double()
    got = spike_matmul(pack_spikes(s), weights, bias, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name == "triton"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int16, torch.int8], ids=str)
def test_the_16_bit_parts_of_weights_sum_to_them_exactly(backend, dtype):
    if dtype.is_floating_point:
        w = (torch.randn(5, 33, 3, 2) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1)).to(dtype)
        w[0, 0, 0, 0], w[1, 1, 1, 1] = torch.inf, torch.finfo(dtype).max
    else:
        limits = torch.iinfo(dtype)
        w = torch.randint(limits.min, limits.max + 1, (5, 33, 3, 2), dtype=dtype)
    w = w.to(DEVICE)
    by_tap = w.permute(2, 3, 1, 0).flatten(0, 1).double()
    cases = [(w, by_tap), (w.contiguous(memory_format=torch.channels_last), by_tap), (w[:, :, 0, 0].t(), by_tap[:1])]
    for weights, want in [*cases, (w[:, :, 0, 1].t().contiguous(), by_tap[1:2])]:
        tiles = _backends.functions(backend, DEVICE, torch.float32).tile(weights)
        assert tiles.dtype == (dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16)
        assert torch.equal(tiles.double().sum(0), want)


@pytest.mark.parametrize("kind", ["int16", "int8"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("length", [256, 448, 449, 5000])
def test_integers_cannot_overflow(kind, sign, length):
    """All weights as large as they come and of one sign, every input firing."""
    w = torch.full((length, 40), 0.7 * sign)
    w[::7] *= 0.5
    weights = prepare_weights(w, kind)
    if kind == "int16":
        assert all(b.clamp(min=0).sum(0).max() < 2**15 and b.clamp(max=0).sum(0).min() >= -(2**15)
                   for b in weights.values.long().split({256: 256, 448: 448, 449: 232, 5000: 424}[length]))  # fmt: skip
    got = spike_matmul(torch.ones(9, length), weights, backend="cpu")
    want = weights.values.double().sum(0) * weights.scale.double()
    torch.testing.assert_close(got, want.float().expand(9, 40), rtol=1e-6, atol=1e-6)


def test_int16_weights_are_closer_than_bfloat16s_product():
    torch.manual_seed(1)
    for k, n in [(384, 384), (384, 1536), (1536, 384)]:
        s, w = (torch.rand(256, k) < 0.1).float(), torch.randn(k, n) / k**0.5
        want = s.double() @ w.double()
        errors = {kind: (spike_matmul(s, prepare_weights(w, kind)) - want).norm() / want.norm() for kind in ("int16", "int8")}
        bfloat = ((s.bfloat16() @ w.bfloat16()).double() - want).norm() / want.norm()
        assert errors["int16"] < bfloat and errors["int8"] < 0.02


@pytest.mark.parametrize("backend", FUSED)
def test_results_do_not_depend_on_the_number_of_threads(backend):
    s, w, bias = tensors(1500 if not INTERPRETED else 40, 100, 50)
    dy = torch.randn(s.shape[0], 50)
    threads = torch.get_num_threads()
    runs = []
    for count in (1, 2):
        torch.set_num_threads(count)
        runs.append(gradients(s, w, bias, dy, backend)[::2] + gradients(s[:3], w, bias, dy[:3], backend)[::2])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="about the C++ extension")
def test_every_instruction_set_of_this_machine_passes(isa):
    for dtype in DTYPES:
        check("cpu", *tensors(100, 420, 50, dtype=dtype))
    s, w, _ = tensors(40, 700, 90)
    for kind in ("int16", "int8"):
        weights = prepare_weights(w, kind)
        want = (s.double() @ weights.values.double()) * weights.scale.double()
        torch.testing.assert_close(spike_matmul(s, weights, backend="cpu").double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="about the C++ extension")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_the_documented_switch_takes_a_smaller_instruction_set(isa):
    code = (
        "import torch, spikeclip; from spikeclip import _cpu; s = (torch.rand(20, 70) < 0.3).float(); w = torch.randn(70, 20);"
        "y = spikeclip.ops.spike_matmul(s, w, backend='cpu');"
        "torch.testing.assert_close(y, s @ w); print(_cpu.isa())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SPIKECLIP_CPU_ISA": isa},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(__file__),
    )
    assert done.stdout.strip() == isa or "must be one of" in done.stderr, done.stderr


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="about the C++ extension")
def test_ten_thousand_calls_leave_no_memory_behind():
    s, w, bias = tensors(32, 96, 64)
    w.requires_grad_()

    def calls(count):
        for _ in range(count):
            spike_matmul(s, w, bias, backend="cpu").sum().backward()
        gc.collect()
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

    before = calls(500)
    assert calls(10_000) - before < 4 * 2**20


def test_auto_goes_dense_where_spikes_are_dense_and_stays_right():
    for rows, density, kind, wanted in (
        (1000, 0.1, torch.float32, True),
        (1000, 0.9, torch.float32, False),
        (5000, 0.9, torch.float32, False),
        (3, 0.9, torch.float32, True),
        (1000, 0.9, torch.int8, True),
    ):
        spikes = torch.rand(rows, 100) < density
        assert event_driven(spikes, 100, kind, torch.float32, None) is wanted
        assert event_driven(pack_spikes(spikes).words, 100, kind, torch.float32, reference.count) is wanted
    for density in (0.0, 0.1, 0.6, 1.0):
        s, w, bias = tensors(200, 384, 64, density)
        for spikes in (s, pack_spikes(s)):
            for weights in (w, prepare_weights(w)):
                got = spike_matmul(spikes, weights, bias)
                torch.testing.assert_close(got, s @ w + bias, rtol=1e-4, atol=1e-4)
        check("auto", s, w, bias)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_a_dense_product_in_place_of_the_kernel_is_right(backend, dtype, packed, monkeypatch):
    sizes = set()
    monkeypatch.setattr(sys.modules[spike_matmul.__module__], "goes_dense", lambda *given: sizes.add(given[-1]) or True)
    check(backend, *tensors(50, 129, 70, dtype=dtype), packed)
    assert sizes == {50 * 129 * 70}


def test_auto_leaves_large_products_with_16_bit_weights_to_a_gpus_library():
    s = torch.ones(4096, 12, dtype=torch.int32)
    for backend, name, dtype, size, wanted in (
        ("auto", "triton", torch.bfloat16, LARGE_ON_GPU, True),
        ("auto", "triton", torch.bfloat16, LARGE_ON_GPU - 1, False),
        ("auto", "triton", torch.float32, LARGE_ON_GPU, False),
        ("triton", "triton", torch.bfloat16, LARGE_ON_GPU, False),
        ("auto", "cuda", torch.bfloat16, LARGE_ON_GPU, False),
    ):
        assert goes_dense(backend, name, s, 384, dtype, dtype, reference, size) is wanted


@pytest.mark.parametrize("backend", FUSED)
def test_backward_keeps_one_bit_a_spike(backend):
    s = (torch.rand(64, 320, device=DEVICE) < 0.2).float().requires_grad_()
    w = torch.randn(320, 16, device=DEVICE, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spike_matmul(s, w, backend=backend)
    assert sum(t.nbytes for t in saved if t.data_ptr() != w.data_ptr()) == s.numel() // 8


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    s, w, bias = (t.to(DEVICE) for t in tensors(12, 40, 24))
    w.requires_grad_()
    op = torch.ops.spikeclip.spike_matmul.default
    torch.library.opcheck(op, (s, 40, w, None, None, bias, True, None, backend))
    torch.library.opcheck(op, (s.requires_grad_(), 40, w, None, None, bias, False, None, backend))
    words = pack_spikes(s.detach()).words
    torch.library.opcheck(op, (words, 40, w.detach(), None, None, None, False, torch.bfloat16, backend))
    torch.library.opcheck(torch.ops.spikeclip.spike_matmul_dw.default, (words, 40, torch.randn(12, 24, device=DEVICE), backend))

    def model(x):
        return spike_matmul((x > 0).float(), w, bias, backend=backend).square().sum()

    x, grads = torch.randn(12, 40, device=DEVICE), []
    for function in (model, torch.compile(model, fullgraph=True)):
        w.grad = None
        function(x).backward()
        grads.append(w.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_gives_its_dtype(backend):
    s, w, bias = (t.to(DEVICE) for t in tensors(20, 64, 30))
    w.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = spike_matmul(s, w, bias, backend=backend)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), s @ w.detach() + bias, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(w.grad, s.sum(0).unsqueeze(1).expand(64, 30), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_a_clear_error(backend):
    s, w, _ = (t.to(DEVICE) for t in tensors(4, 10, 6))
    w.requires_grad_()
    y = spike_matmul(s, w, backend=backend)
    (grad,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", ["fp32", "int16", "int8"])
def test_prepared_weights_are_a_copy_at_any_density(kind):
    w = torch.randn(100, 37, device=DEVICE)
    prepared = prepare_weights(w, kind)
    held = prepared.dequantize().clone()
    w.zero_()
    for density in (0.1, 1.0):
        s = (torch.rand(64, 100, device=DEVICE) < density).float()
        torch.testing.assert_close(spike_matmul(s, prepared), s @ held, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["fp32", "int16", "int8"])
def test_prepared_weights_of_no_inputs_leave_the_bias(kind):
    weights, bias = prepare_weights(torch.randn(0, 8, device=DEVICE), kind), torch.randn(8, device=DEVICE)
    assert torch.equal(spike_matmul(torch.zeros(3, 0, device=DEVICE), weights, bias), bias.expand(3, 8))


@pytest.mark.parametrize("kind", ["fp32", "int16", "int8"])
def test_copies_and_pickles_of_prepared_weights_hold_no_layout(kind):
    s, w = (torch.rand(9, 100) < 0.3).float(), torch.randn(100, 70)
    weights = prepare_weights(w, kind)
    want = spike_matmul(s, weights)
    for other in (copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        assert torch.equal(spike_matmul(s, other), want)
    assert len(pickle.dumps(weights)) < weights.values.numel() * weights.values.element_size() + 2000


def test_prepared_weights_see_a_lazy_sign():
    w = torch.randn(40, 7, dtype=torch.complex64, device=DEVICE).conj().imag
    assert w.is_neg()
    s = torch.eye(40, device=DEVICE)
    torch.testing.assert_close(spike_matmul(s, prepare_weights(w)), w.clone())


def test_integers_hold_weights_near_the_end_of_float32():
    w, s = torch.full((384, 4), 1e36, device=DEVICE), torch.ones(8, 384, device=DEVICE)
    for kind in ("int16", "int8"):
        torch.testing.assert_close(spike_matmul(s, prepare_weights(w, kind)), s @ w, rtol=1e-2, atol=0)


def test_float64_gradients_are_float64_throughout():
    s, w = torch.ones(5, 9, device=DEVICE), torch.randn(9, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    spike_matmul(s, w).backward(torch.full((5, 4), 1e40, dtype=torch.float64, device=DEVICE))
    torch.testing.assert_close(w.grad, torch.full_like(w.grad, 5e40), rtol=1e-15, atol=0)


def test_a_forward_mode_derivative_is_a_clear_error():
    s, w, _ = (t.to(DEVICE) for t in tensors(4, 10, 6))
    with pytest.raises(RuntimeError, match="spike_matmul has no forward-mode derivative"):
        torch.func.jvp(lambda w: spike_matmul(s, w), (w,), (torch.ones_like(w),))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
def test_prepared_weights_inside_a_compiled_function():
    s, w, _ = (t.to(DEVICE) for t in tensors(5, 64, 32))
    prepared = prepare_weights(w)
    y = torch.compile(lambda s: spike_matmul(s, prepared), fullgraph=True)(s)
    torch.testing.assert_close(y, s @ w, rtol=1e-4, atol=1e-4)


BAD = {
    "s must be a torch.Tensor or PackedSpikes": lambda s, w: spike_matmul([1.0], w),
    "s must be one of float32, .*bool, uint8": lambda s, w: spike_matmul(s.long(), w),
    "s must have K = 5 spikes": lambda s, w: spike_matmul(s[:, :3], w),
    "w must be a torch.Tensor or SpikeWeights": lambda s, w: spike_matmul(s, 1.0),
    r"w must be float32, float16, bfloat16 or float64, of shape \[K, N\]": lambda s, w: spike_matmul(s, w[0]),
    r"w must have shape \[K, N\]": lambda s, w: spike_matmul(s, prepare_weights(torch.zeros(2, 5, 1, 1))),
    "w must be on s's device": lambda s, w: spike_matmul(s, w.to("meta")),
    r"bias must be float32, float16, bfloat16 or float64, of shape \[2\]": lambda s, w: spike_matmul(s, w, torch.zeros(3)),
    r"w must be float32, .*float8_e4m3fn": lambda s, w: spike_matmul(s, w.to(torch.float8_e4m3fn)),
    "backend must be a name": lambda s, w: spike_matmul(s, w, backend=["cpu"]),
    "dtype must be one of fp32, int16": lambda s, w: prepare_weights(w, ["int8"]),
    "bias must be a torch.Tensor": lambda s, w: spike_matmul(s, w, 0.0),
    "backend must be one of": lambda s, w: spike_matmul(s, w, backend="gpu"),
    "s must hold spikes": lambda s, w: spike_matmul(s + 0.5, w, backend="cpu"),
    "dtype must be one of fp32, int16, int8": lambda s, w: prepare_weights(w, "int4"),
    "w must be finite": lambda s, w: prepare_weights(w * float("nan"), "int8"),
    r"w must be float32, float16, bfloat16 or float64, \[K, N\] or": lambda s, w: prepare_weights(w[0]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message](torch.zeros(4, 5), torch.zeros(5, 2))
