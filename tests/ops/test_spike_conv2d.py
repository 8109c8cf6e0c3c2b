import sys

import pytest
import torch
from compare import assert_error_bounded

from spikeclip.ops import _backends, pack_spikes, prepare_weights, spike_conv2d

INTERPRETED = _backends.triton_interpreted()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in _backends.BACKENDS if _backends.unavailable(name, DEVICE) is None]
FUSED = [name for name in BACKENDS if name != "torch"]
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# batch, channels, height, width, outputs, kernel, stride, padding
CASES = [
    (2, 3, 8, 8, 5, (3, 3), 1, 1),
    (1, 40, 7, 9, 33, (3, 2), (2, 1), (0, 1)),
    (3, 33, 4, 4, 17, (1, 1), 1, 0),
    (2, 65, 5, 6, 20, (5, 5), 2, 2),
    (2, 8, 1, 1, 4, (1, 1), 1, 0),
    (1, 5, 6, 6, 3, (2, 2), 3, 0),
    (2, 4, 3, 3, 3, (3, 3), 1, 3),
    (0, 4, 5, 5, 3, (3, 3), 1, 1),
    (2, 9, 13, 50, 5, (3, 3), 1, (0, 2)),
    (1, 5, 4, 147, 3, (3, 3), 1, (2, 0)),
    (1, 5, 4, 150, 3, (3, 3), 1, 1),
]


def tensors(batch, channels, height, width, outputs, kernel, dtype=torch.float32, density=0.2):
    s = (torch.rand(batch, channels, height, width) < density).to(dtype)
    return s, (torch.randn(outputs, channels, *kernel) / 3 / channels**0.5).to(dtype), torch.randn(outputs).to(dtype)


def gradients(function, s, w, bias, dy):
    leaves = [t.clone().to(DEVICE).requires_grad_() for t in (s, w, bias)]
    y = function(*leaves)
    y.backward(dy.to(DEVICE, y.dtype))
    return [t.detach().cpu() for t in (y, *(leaf.grad for leaf in leaves))]


def check(backend, s, w, bias, stride, padding):
    def ours(name):
        return lambda *leaves: spike_conv2d(*leaves, stride=stride, padding=padding, backend=name)

    leaves = [t.double().requires_grad_() for t in (s, w, bias)]
    y = torch.nn.functional.conv2d(*leaves, stride, padding)
    dy = torch.randn(y.shape).to(w.dtype)
    y.backward(dy.double())
    got, plain = gradients(ours(backend), s, w, bias, dy), gradients(ours("torch"), s, w, bias, dy)
    for mine, ref, want in zip(got, plain, [y.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        assert mine.dtype == w.dtype and mine.shape == want.shape
        assert_error_bounded(mine, ref, want, floor=FLOOR[w.dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_and_gradients_match_the_oracle(backend, case):
    *sizes, stride, padding = case
    check(backend, *tensors(*sizes), stride, padding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_dtype(backend, dtype):
    check(backend, *tensors(2, 40, 6, 6, 18, (3, 3), dtype), 1, 1)


@pytest.mark.skipif(INTERPRETED, reason="minutes in the interpreter")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [(20, 384, 8, 8, 40, (3, 3), 1, 1), (2, 400, 40, 33, 33, (3, 3), 1, 1)], ids=str)
def test_large(backend, case):
    *sizes, stride, padding = case
    check(backend, *tensors(*sizes), stride, padding)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_order_of_inputs_and_packed_input(backend):
    s, w, bias = (t.to(DEVICE) for t in tensors(3, 37, 6, 5, 21, (3, 3)))
    want = torch.nn.functional.conv2d(s, w, bias, padding=1)
    packed = pack_spikes(s.permute(0, 2, 3, 1))
    for spikes in (s, s.contiguous(memory_format=torch.channels_last), packed):
        got = spike_conv2d(spikes, w.contiguous(memory_format=torch.channels_last), bias, padding=1, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["int16", "int8"])
def test_integer_weights_are_multiplied_exactly(backend, kind):
    s, w, bias = (t.to(DEVICE) for t in tensors(2, 300, 5, 5, 70, (3, 3), density=0.7))
    weights = prepare_weights(w, kind)
    y = torch.nn.functional.conv2d(s.double(), weights.values.double(), padding=1)
    want = y * weights.scale.double().view(1, -1, 1, 1) + bias.double().view(1, -1, 1, 1)
    got = spike_conv2d(s, weights, bias, padding=1, backend=backend)
    exact = 1e-5 if (backend, DEVICE) == ("torch", "cuda") else 1e-6  # cuDNN may transform the window
    torch.testing.assert_close(got.double(), want, rtol=exact, atol=exact)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if not INTERPRETED or name != "triton"])
@pytest.mark.parametrize("kind", ["fp32", "int16", "int8"])
@pytest.mark.parametrize("density", [0.003, 0.03, 0.12])
@pytest.mark.parametrize("channels", [60, 96, 210, 500])
def test_windows_so_sparse_that_kernels_take_more_of_them_at_once(backend, kind, density, channels):
    s, w, bias = (t.to(DEVICE) for t in tensors(2, channels, 6, 5, 70, (3, 3), density=density))
    s[:, -1] = 1
    weights = prepare_weights(w, kind)
    want = torch.nn.functional.conv2d(s.double(), weights.dequantize().double(), bias.double(), padding=1)
    got = spike_conv2d(pack_spikes(s.permute(0, 2, 3, 1)), weights, bias, padding=1, backend=backend)
    exact = 1e-4 if (backend, DEVICE) == ("torch", "cuda") else 1e-5  # cuDNN may transform the window
    torch.testing.assert_close(got.double(), want, rtol=exact, atol=exact)


@pytest.mark.parametrize("backend", FUSED)
def test_results_do_not_depend_on_the_number_of_threads(backend):
    s, w, bias = tensors(3, 40, 9, 7, 20, (3, 3))
    dy = torch.randn(3, 20, 9, 7)
    threads, runs = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        got = gradients(lambda *leaves: spike_conv2d(*leaves, padding=1, backend=backend), s, w, bias, dy)
        runs.append([got[0], got[2]])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="about the C++ extension")
def test_every_instruction_set_of_this_machine_passes(isa):
    check("cpu", *tensors(2, 40, 7, 9, 33, (3, 2)), (2, 1), (0, 1))


def test_auto_goes_dense_where_spikes_are_dense_and_stays_right():
    for density in (0.0, 0.1, 1.0):
        s, w, bias = tensors(2, 64, 6, 6, 32, (3, 3), density=density)
        check("auto", s, w, bias, 1, 1)
        want = torch.nn.functional.conv2d(s, w, bias, padding=1)
        got = spike_conv2d(pack_spikes(s.permute(0, 2, 3, 1)), prepare_weights(w), bias, padding=1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
def test_a_dense_convolution_in_place_of_the_kernel_is_right(backend, dtype, monkeypatch):
    sizes = set()
    monkeypatch.setattr(sys.modules[spike_conv2d.__module__], "goes_dense", lambda *given: sizes.add(given[-1]) or True)
    check(backend, *tensors(2, 40, 7, 9, 33, (3, 2), dtype), (2, 1), (0, 1))
    assert sizes == {2 * 3 * 10 * 3 * 2 * 40 * 33}


@pytest.mark.parametrize("backend", FUSED)
def test_backward_keeps_one_bit_a_spike(backend):
    s, w, _ = (t.to(DEVICE) for t in tensors(2, 64, 6, 6, 16, (3, 3)))
    s.requires_grad_(), w.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spike_conv2d(s, w, padding=1, backend=backend)
    assert sum(t.nbytes for t in saved if t.data_ptr() != w.data_ptr()) == s.numel() // 8


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cannot be traced")
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend):
    s, w, bias = (t.to(DEVICE) for t in tensors(2, 10, 5, 6, 7, (3, 3)))
    w.requires_grad_()
    op = torch.ops.spikeclip.spike_conv2d.default
    torch.library.opcheck(op, (s, 10, w, None, None, bias, [1, 1], [1, 1], True, None, backend))
    torch.library.opcheck(op, (s.requires_grad_(), 10, w, None, None, bias, [2, 1], [0, 1], False, None, backend))
    words = pack_spikes(s.detach().permute(0, 2, 3, 1)).words
    torch.library.opcheck(
        torch.ops.spikeclip.spike_conv2d_dw.default,
        (words, 10, torch.randn(2, 7, 5, 6, device=DEVICE), [3, 3], [1, 1], [1, 1], backend),
    )

    def model(x):
        return spike_conv2d((x > 0).float(), w, bias, padding=1, backend=backend).square().sum()

    x, grads = torch.randn(2, 10, 5, 6, device=DEVICE), []
    for function in (model, torch.compile(model, fullgraph=True)):
        w.grad = None
        function(x).backward()
        grads.append(w.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_gives_its_dtype(backend):
    s, w, bias = (t.to(DEVICE) for t in tensors(2, 32, 5, 5, 16, (3, 3)))
    w.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = spike_conv2d(s, w, bias, padding=1, backend=backend)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
    want = torch.nn.functional.conv2d(s, w.detach(), bias, padding=1)
    torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_channels_is_the_bias(backend):
    s, w, bias = torch.zeros(2, 0, 5, 5, device=DEVICE), torch.zeros(4, 0, 3, 3, device=DEVICE), torch.randn(4, device=DEVICE)
    y = spike_conv2d(s, w, bias, padding=1, backend=backend)
    assert torch.equal(y, bias.view(1, 4, 1, 1).expand(2, 4, 5, 5))


BAD = {
    r"s must have shape \[B, C, H, W\]": lambda s, w: spike_conv2d(s[0], w),
    "s must have C = 3 channels": lambda s, w: spike_conv2d(s[:, :2], w),
    "w must be float32, float16, bfloat16 or float64, of shape": lambda s, w: spike_conv2d(s, w[0]),
    "stride must be an integer >= 1 or a pair": lambda s, w: spike_conv2d(s, w, stride=0),
    "stride must be an integer .*got 2.0": lambda s, w: spike_conv2d(s, w, stride=2.0),
    "stride must be an integer .*got None": lambda s, w: spike_conv2d(s, w, stride=None),
    "padding must be an integer >= 0 or a pair": lambda s, w: spike_conv2d(s, w, padding=(1, -1)),
    "must fit into the image": lambda s, w: spike_conv2d(s[:, :, :2], w),
    "bias must be float32": lambda s, w: spike_conv2d(s, w, torch.zeros(9)),
    "backend must be one of": lambda s, w: spike_conv2d(s, w, backend="gpu"),
    "s must hold spikes": lambda s, w: spike_conv2d(s - 1, w, backend="cpu"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(message):
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message](torch.zeros(2, 3, 6, 6), torch.zeros(4, 3, 3, 3))
