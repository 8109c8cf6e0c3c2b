"""``ops.spike_conv2d``: a convolution of spikes, as a torch op with its gradient."""

from __future__ import annotations

import math
from numbers import Integral

import torch
from torch import Tensor

from . import _backends
from ._autograd import below_autocast, below_autograd, no_second_derivative, with_autograd
from ._dense import conv2d_input_gradient, winograd_pays
from ._density import dense_dtype, product_dtype
from ._dtypes import compute_dtype
from .packed import PackedSpikes, pack, word_count
from .spike_matmul import check_beside, check_bias, float_dtype, goes_dense, in_dtype, spikes_of, weights_of
from .weights import SpikeWeights, tiles_are_for

_library = torch.library.Library("spikeclip", "FRAGMENT")
_NAMES = ("spike_conv2d", "spike_conv2d_again")  # as spike_matmul's
for _name in _NAMES:
    _library.define(
        f"{_name}(Tensor s, SymInt channels, Tensor w, Tensor? scale, Tensor? tiles, Tensor? bias, SymInt[] stride, "
        "SymInt[] padding, bool keep, ScalarType? dtype, str backend) -> (Tensor, Tensor)"
    )
_library.define(
    "spike_conv2d_dw(Tensor words, SymInt channels, Tensor dy, "
    "SymInt[] kernel, SymInt[] stride, SymInt[] padding, str backend) -> Tensor"
)
_library.define("spike_conv2d_ds(Tensor w, Tensor dy, SymInt[] size, SymInt[] stride, SymInt[] padding, str backend) -> Tensor")


def spike_conv2d(
    s: Tensor | PackedSpikes,
    w: Tensor | SpikeWeights,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    backend: str = "auto",
) -> Tensor:
    """``torch.nn.functional.conv2d`` for spikes ``s``, differentiable in ``s``, ``w`` and ``bias``.

    How it computes, what ``auto`` chooses, dtypes and the binary contract are those of :func:`spike_matmul`. Spikes are packed
    along the channels, so channels-last inputs are read fastest. The gradient of ``s`` is a dense convolution; on the CPU, in
    float32, large ones of 3x3 windows and stride 1 are made by Winograd's F(4x4, 3x3) (Lavin and Gray 2016, arXiv 1509.09308),
    in a quarter of the multiplications, with about six times the rounding error of a direct sum (10^-6 of its size).

    Args:
        s: spikes ``[B, C, H, W]``, zeros and ones; or :class:`PackedSpikes` of shape ``[B, H, W, C]``, channels last.
        w: floating weights ``[O, C, kh, kw]``, any strides, or :func:`prepare_weights`' (no gradient).
        bias: floating ``[O]``, or None.
        stride: step of the window, >= 1. padding: zeros around the image, >= 0. Dilation and groups are 1.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton`` or ``torch``; a named one never falls back.

    Returns:
        ``[B, O, OH, OW]``, in memory channels last.

    Raises:
        As :func:`spike_matmul`; also ValueError for a window larger than the padded image.
    """
    source, channels = spikes_of("s", s)
    values, scale, tiles = weights_of(w, 4, "[O, C, kh, kw]")
    if source.dim() != 4:
        raise ValueError(f"s must have shape [B, C, H, W] (packed: [B, H, W, C]); got {list(s.shape)}")
    packed = isinstance(s, PackedSpikes)
    channels, size = (channels, source.shape[1:3]) if packed else (source.shape[1], source.shape[2:])
    if channels != values.shape[1]:
        raise ValueError(f"s must have C = {values.shape[1]} channels, as w [O, C, kh, kw] has; got {channels}")
    stride, padding = checked_window(values.shape[2:], size, stride, padding)
    check_beside("w", values, source)
    check_bias(bias, values.shape[0], source)
    _backends.check_name(backend)
    y = _spike_conv2d(source, channels, values, scale, tiles, bias, stride, padding, False, None, backend)[0]
    if packed and s.requires_grad and torch.is_grad_enabled():
        return _ToEdge.apply(y, s.edge, w.dequantize() if isinstance(w, SpikeWeights) else w.detach(), stride, padding, backend)
    return y


def checked_window(kernel: tuple[int, int], size: tuple[int, int], stride, padding) -> tuple[tuple[int, int], tuple[int, int]]:
    """(stride, padding), each over height and width. Raises ValueError unless the window fits into the padded image."""
    stride, padding = pair("stride", stride, 1), pair("padding", padding, 0)
    if min(kernel) < 1 or any(n + 2 * p < k for n, p, k in zip(size, padding, kernel, strict=True)):
        raise ValueError(f"w's window {list(kernel)} must fit into the image {list(size)} padded by {list(padding)}")
    return stride, padding


def pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    """``value`` over height and width. Raises ValueError unless it is an integer >= ``least`` or two of them."""
    pair = (value, value) if isinstance(value, Integral) else value
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(v, Integral) and v >= least for v in pair):
        raise ValueError(f"{name} must be an integer >= {least} or a pair of them; got {value!r}")
    return int(pair[0]), int(pair[1])


def out_size(size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> list[int]:
    """Height and width of a convolution's output."""
    return [(n + 2 * p - k) // step + 1 for n, k, step, p in zip(size, kernel, stride, padding, strict=True)]


def _fwd(s, channels, w, scale, tiles, bias, stride, padding, keep, dtype, backend):
    w = in_dtype(w, dtype)
    compute = float_dtype(w)
    name = _backends.chosen(backend, s.device.type, compute)
    functions = _backends.functions(backend, s.device.type, compute)
    packed = s.dtype == torch.int32
    last = s if packed else s.permute(0, 2, 3, 1).contiguous()
    rows = last.flatten(0, 2)
    out = dtype or compute
    product = dense_dtype(w, out)
    size = s.shape[0] * math.prod(out_size(last.shape[1:3], w.shape[2:], stride, padding)) * w.numel()
    if goes_dense(backend, name, rows, channels, w.dtype, product, functions, size):
        dense = functions.unpack(s, channels, product).permute(0, 3, 1, 2) if packed else s.to(product)
        weights = (w if scale is None else w * scale.view(-1, 1, 1, 1)).to(product)
        if name == "triton":
            weights = functions.channels_last(weights, product)
        y = torch.nn.functional.conv2d(dense, weights, None if bias is None else bias.to(product), stride, padding)
        y = y.to(out).contiguous(memory_format=torch.channels_last)
        words = pack(last, functions) if keep else None
    else:
        words = s if packed else pack(last, functions)
        ready = {"tiles": tiles} if tiles is not None and tiles_are_for(name, s.device.type) else {}
        y = functions.spike_conv2d(words, channels, w, scale, bias, stride, padding, out, **ready)
    return y, words if keep else s.new_empty(0, dtype=torch.int32)


def _dw(words, channels, dy, kernel, stride, padding, backend):
    name = _backends.chosen(backend, dy.device.type, dy.dtype)
    functions = _backends.functions(backend, dy.device.type, dy.dtype)
    rows, size = words.flatten(0, 2), dy.numel() * channels * math.prod(kernel)
    product = product_dtype(dy)
    if dy.numel() and goes_dense(backend, name, rows, channels, torch.float32, product, functions, size):
        s = functions.unpack(words, channels, product).permute(0, 3, 1, 2)
        dw = torch.nn.grad.conv2d_weight(s, (dy.shape[1], channels, *kernel), dy.to(product), stride, padding)
        return dw.to(compute_dtype(dy), memory_format=torch.contiguous_format)
    return functions.spike_conv2d_dw(words, channels, dy, tuple(kernel), tuple(stride), tuple(padding))


def _ds(w, dy, size, stride, padding, backend):
    name, dtype = _backends.chosen(backend, dy.device.type, dy.dtype), dy.dtype
    if name == "cpu" and winograd_pays(w, dy, size, stride, padding):
        functions = _backends.functions(backend, dy.device.type, dy.dtype)
        return functions.conv3x3_gradient(w, dy, tuple(size), tuple(padding))
    dy = dy.to(product_dtype(dy))
    if name == "triton":
        w = _backends.functions(backend, dy.device.type, dy.dtype).channels_last(w, dy.dtype)
    return conv2d_input_gradient((dy.shape[0], w.shape[1], *size), w, dy, stride, padding).to(dtype)


def _fwd_fake(s, channels, w, scale, tiles, bias, stride, padding, keep, dtype, backend):
    size = s.shape[1:3] if s.dtype == torch.int32 else s.shape[2:]
    out = out_size(size, w.shape[2:], stride, padding)
    y = s.new_empty((s.shape[0], *out, w.shape[0]), dtype=dtype or float_dtype(w)).permute(0, 3, 1, 2)
    return y, s.new_empty((s.shape[0], *size, word_count(channels)) if keep else (0,), dtype=torch.int32)


def _dw_fake(words, channels, dy, kernel, stride, padding, backend):
    return dy.new_empty((dy.shape[1], channels, *kernel), dtype=compute_dtype(dy))


def _ds_fake(w, dy, size, stride, padding, backend):
    return dy.new_empty((dy.shape[0], *size, w.shape[1])).permute(0, 3, 1, 2)


class _SpikeConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, channels, w, scale, tiles, bias, stride, padding, keep, dtype, backend):
        packed = s.dtype == torch.int32
        keep = w.requires_grad and not packed
        with below_autograd():
            y, words = _spike_conv2d(s, channels, w, scale, tiles, bias, stride, padding, keep, dtype, backend)
        ctx.save_for_backward((s if packed else words) if w.requires_grad else None, w if s.requires_grad else None)
        ctx.options = (channels, s.shape[2:], s.dtype, w.shape[2:], w.dtype, None if bias is None else bias.dtype)
        ctx.geometry = (stride, padding, backend)
        ctx.mark_non_differentiable(words)
        ctx.set_materialize_grads(False)
        return y, words

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 11
        words, w = ctx.saved_tensors
        channels, size, s_dtype, kernel, w_dtype, bias_dtype = ctx.options
        stride, padding, backend = ctx.geometry
        wants_s, _, wants_w, _, _, wants_bias = ctx.needs_input_grad[:6]
        ds = dw = None
        if wants_s:
            ds = _spike_conv2d_ds(w, dy, size, stride, padding, backend).to(s_dtype)
        if wants_w:
            dw = _spike_conv2d_dw(words, channels, dy, kernel, stride, padding, backend).to(w_dtype)
        dbias = dy.sum((0, 2, 3)).to(bias_dtype) if wants_bias else None
        return ds, None, dw, None, None, dbias, None, None, None, None, None


class _ToEdge(torch.autograd.Function):
    """A convolution as it is, whose backward pass sends packed spikes their gradient."""

    @staticmethod
    def forward(ctx, y, edge, w, stride, padding, backend):
        ctx.save_for_backward(w)
        ctx.options = (edge.shape[1:3], edge.dtype, stride, padding, backend)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        (w,) = ctx.saved_tensors
        size, dtype, stride, padding, backend = ctx.options
        ds = _spike_conv2d_ds(w, dy, size, stride, padding, backend)
        return dy, ds.permute(0, 2, 3, 1).to(dtype), None, None, None, None


def _autocast(device_type: str, op):
    def call(s, channels, w, scale, tiles, bias, stride, padding, keep, dtype, backend):
        if dtype is None and w.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        with below_autocast(device_type):
            return op(s, channels, w, scale, tiles, bias, stride, padding, keep, dtype, backend)

    return call


_spike_conv2d = torch.ops.spikeclip.spike_conv2d.default
_spike_conv2d_dw = torch.ops.spikeclip.spike_conv2d_dw.default
_spike_conv2d_ds = torch.ops.spikeclip.spike_conv2d_ds.default
_spike_conv2d_again = torch.ops.spikeclip.spike_conv2d_again.default
for _device in ("CPU", "CUDA"):
    for _name, _op in zip(_NAMES, (_spike_conv2d, _spike_conv2d_again), strict=True):
        _library.impl(_name, _fwd, _device)
        _library.impl(_name, _autocast(_device.lower(), _op), f"Autocast{_device}")
    _library.impl("spike_conv2d_dw", _dw, _device)
    _library.impl("spike_conv2d_ds", _ds, _device)
_library.impl("spike_conv2d", with_autograd(_SpikeConv2d, _spike_conv2d), "Autograd")
for _name, _op in (
    ("spike_conv2d_dw", _spike_conv2d_dw),
    ("spike_conv2d_ds", _spike_conv2d_ds),
    ("spike_conv2d_again", _spike_conv2d_again),
):
    _library.impl(_name, with_autograd(no_second_derivative("spike_conv2d", _op), _op), "Autograd")
for _name in _NAMES:
    torch.library.register_fake(f"spikeclip::{_name}", _fwd_fake, lib=_library)
torch.library.register_fake("spikeclip::spike_conv2d_dw", _dw_fake, lib=_library)
torch.library.register_fake("spikeclip::spike_conv2d_ds", _ds_fake, lib=_library)
