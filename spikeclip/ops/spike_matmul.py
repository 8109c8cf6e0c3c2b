"""``ops.spike_matmul``: a product of spikes with weights, as a torch op with its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from ._autograd import below_autocast, below_autograd, no_second_derivative, with_autograd
from ._dense import dense_product, fused_product_pays
from ._density import dense_dtype, event_driven, large_on_gpu, product_dtype
from ._dtypes import FLOATS, compute_dtype
from .packed import PackedSpikes, check_spikes, pack, word_count
from .weights import SpikeWeights, tiles_are_for

_library = torch.library.Library("spikeclip", "FRAGMENT")
# A backward pass makes a product again under another name: a compiler would merge the two, and keep what was to be freed.
_NAMES = ("spike_matmul", "spike_matmul_again")
for _name in _NAMES:
    _library.define(
        f"{_name}(Tensor s, SymInt length, Tensor w, Tensor? scale, Tensor? tiles, Tensor? bias, bool keep, "
        "ScalarType? dtype, str backend) -> (Tensor, Tensor)"
    )
_library.define("spike_matmul_ds(Tensor dy, Tensor w, ScalarType dtype, str backend) -> Tensor")
_library.define("spike_matmul_dw(Tensor words, SymInt length, Tensor dy, str backend) -> Tensor")


def spike_matmul(
    s: Tensor | PackedSpikes, w: Tensor | SpikeWeights, bias: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """``s @ w + bias`` for spikes ``s``, differentiable in ``s``, ``w`` and ``bias``.

    On a CPU the product is event-driven: the rows of ``w`` that spikes name are added. ``auto`` multiplies densely instead
    where a sample of ``s`` is denser than the break-even of ``ops/_density.py``. On a GPU spikes are read at one bit each and
    expanded in registers for a dense product on tensor cores; with Triton float32 weights go there as three bfloat16 that sum
    to them exactly, int16 as two. ``auto`` leaves large products with 16-bit weights to cuBLAS and cuDNN, spikes unpacked for
    the time of the call, sums and ``dw`` rounded as these do. Other sums are made in float32 (float64 for float64 ``w``). The
    backward pass keeps one bit a spike; ``dw`` is made in the same way, ``ds`` is dense. What is NaN or infinite in a row of
    ``w`` reaches the rows of ``s`` that spike there; a dense product spreads it to all.

    Args:
        s: spikes ``[..., K]``, zeros and ones, floating, bool or uint8; or :class:`PackedSpikes`.
        w: floating weights ``[K, N]``, any strides, or :func:`prepare_weights`' (no gradient).
        bias: floating ``[N]``, or None.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton`` or ``torch``; a named one never falls back.

    Returns:
        ``[..., N]`` in ``w``'s dtype (float32 for integer weights; under autocast, the autocast dtype).

    Raises:
        TypeError: an argument of the wrong type. ValueError: a shape, dtype or device outside the above, or a value of ``s``
        that is neither 0 nor 1 (see :func:`pack_spikes`; where the product is dense it is right for any value, and no error
        is raised). RuntimeError: the named backend is not available, or a second derivative is asked for.
    """
    source, length = spikes_of("s", s)
    values, scale, tiles = weights_of(w, 2, "[K, N]")
    if length != values.shape[0]:
        raise ValueError(f"s must have K = {values.shape[0]} spikes in its last dimension, as w [K, N] has rows; got {length}")
    check_beside("w", values, source)
    check_bias(bias, values.shape[1], source)
    _backends.check_name(backend)
    y = _spike_matmul(source, length, values, scale, tiles, bias, False, None, backend)[0]
    if isinstance(s, PackedSpikes) and s.requires_grad and torch.is_grad_enabled():
        weights = w.dequantize() if isinstance(w, SpikeWeights) else w.detach()
        return _ToEdge.apply(y, s.edge, weights, backend)
    return y


def spikes_of(name: str, s: Tensor | PackedSpikes) -> tuple[Tensor, int]:
    """What an op is given for spikes: words or the dense tensor, and how many there are a row."""
    if isinstance(s, PackedSpikes):
        return s.words, s.length
    check_spikes(name, s)
    return s, s.shape[-1]


def weights_of(w: Tensor | SpikeWeights, dim: int, form: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(values, scale, tiles) of either kind of weights, checked."""
    if isinstance(w, SpikeWeights):
        if w.values.dim() != dim:
            raise ValueError(f"w must have shape {form}; got {list(w.shape)}")
        return w.values, w.scale, w.tiles
    if not isinstance(w, Tensor):
        raise TypeError(f"w must be a torch.Tensor or SpikeWeights; got {type(w).__name__}")
    if w.dim() != dim or w.dtype not in FLOATS:
        raise ValueError(
            f"w must be float32, float16, bfloat16 or float64, of shape {form}; got {w.dtype} of shape {list(w.shape)}"
        )
    return w, None, None


def check_beside(name: str, tensor: Tensor, s: Tensor) -> None:
    if tensor.device != s.device:
        raise ValueError(f"{name} must be on s's device, {s.device}; got {tensor.device}")


def check_bias(bias: Tensor | None, columns: int, s: Tensor) -> None:
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a torch.Tensor or None; got {type(bias).__name__}")
    if bias.shape != (columns,) or bias.dtype not in FLOATS:
        allowed = f"float32, float16, bfloat16 or float64, of shape [{columns}]"
        raise ValueError(f"bias must be {allowed}; got {bias.dtype} of shape {list(bias.shape)}")
    check_beside("bias", bias, s)


def float_dtype(w: Tensor) -> torch.dtype:
    """The dtype a product with ``w`` has when nothing else is said."""
    return w.dtype if w.is_floating_point() else torch.float32


def goes_dense(
    backend: str, name: str, s: Tensor, length: int, weights: torch.dtype, dense: torch.dtype, functions, multiplications: int
) -> bool:
    """Whether ``auto`` leaves the kernel for spikes for a product in ``dense``; s is [M, K], or words [M, W]."""
    if backend != "auto" or not s.numel():
        return False
    if name == "triton":
        return large_on_gpu(dense, multiplications)
    return name == "cpu" and not event_driven(s, length, weights, dense, functions.count)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def in_dtype(w: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The weights of a product that comes out in ``dtype``: on a GPU in it too."""
    return w if dtype is None or w.device.type != "cuda" or not w.is_floating_point() else w.to(dtype)


def _fwd(s, length, w, scale, tiles, bias, keep, dtype, backend):
    w = in_dtype(w, dtype)
    compute = float_dtype(w)
    name = _backends.chosen(backend, s.device.type, compute)
    functions = _backends.functions(backend, s.device.type, compute)
    packed = s.dtype == torch.int32
    leading, rows = s.shape[:-1], _rows(s)
    out = dtype or compute
    product = dense_dtype(w, out)
    if goes_dense(backend, name, rows, length, w.dtype, product, functions, rows.shape[0] * w.numel()):
        dense = functions.unpack(rows.contiguous(), length, product) if packed else rows.to(product)
        y = dense_product(dense, (w if scale is None else w * scale).to(product), bias, out)
        words = pack(s, functions) if keep else None
    else:
        words = s if packed else pack(s, functions)
        ready = {"tiles": tiles} if tiles is not None and tiles_are_for(name, s.device.type) else {}
        y = functions.spike_matmul(_rows(words), length, w, scale, bias, out, **ready)
    return y.view(*leading, w.shape[1]), words if keep else s.new_empty(0, dtype=torch.int32)


def _dw(words, length, dy, backend):
    name = _backends.chosen(backend, dy.device.type, dy.dtype)
    functions = _backends.functions(backend, dy.device.type, dy.dtype)
    words, dy = _rows(words).contiguous(), _rows(dy).contiguous()
    # A dense float32 product was measured to be slower at any density: its left operand is transposed.
    size = dy.numel() * length
    product = product_dtype(dy)
    if product != torch.float32 and goes_dense(backend, name, words, length, torch.float32, product, functions, size):
        dense = functions.unpack(words, length, dy.dtype)
        dw = (dy.t() @ dense).t() if name == "triton" else dense.t() @ dy
        return dw.to(compute_dtype(dy))
    return functions.spike_matmul_dw(words, length, dy)


def _ds(dy, w, dtype, backend):
    if _backends.chosen(backend, dy.device.type, dy.dtype) == "cpu":
        functions = _backends.functions(backend, dy.device.type, dy.dtype)
        if fused_product_pays(dy, w.shape[0], functions.isa()):
            return functions.dense_product(dy, w.t(), dtype)
    return dense_product(dy, w.t(), dtype=dtype)


def _gradient_of_spikes(dy: Tensor, w: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """``dy w^T``; an op where it is not made in the dtype of ``dy``: a compiler would leave out that it is then rounded."""
    if product_dtype(dy) == dy.dtype:
        return dense_product(dy, w.t(), dtype=dtype)
    return _spike_matmul_ds(dy, w, dtype, backend)


def _fwd_fake(s, length, w, scale, tiles, bias, keep, dtype, backend):
    y = s.new_empty((*s.shape[:-1], w.shape[1]), dtype=dtype or float_dtype(w))
    return y, s.new_empty((*s.shape[:-1], word_count(length)) if keep else (0,), dtype=torch.int32)


def _dw_fake(words, length, dy, backend):
    if _backends.chosen(backend, dy.device.type, dy.dtype) == "triton":  # as the weights of a linear layer lie
        return dy.new_empty((dy.shape[-1], length), dtype=compute_dtype(dy)).t()
    return dy.new_empty((length, dy.shape[-1]), dtype=compute_dtype(dy))


def _ds_fake(dy, w, dtype, backend):
    return dy.new_empty((*dy.shape[:-1], w.shape[0]), dtype=dtype)


class _SpikeMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s, length, w, scale, tiles, bias, keep, dtype, backend):
        packed = s.dtype == torch.int32
        with below_autograd():
            y, words = _spike_matmul(s, length, w, scale, tiles, bias, w.requires_grad and not packed, dtype, backend)
        ctx.save_for_backward((s if packed else words) if w.requires_grad else None, w if s.requires_grad else None)
        ctx.options = (length, s.dtype, w.dtype, None if bias is None else bias.dtype, backend)
        ctx.mark_non_differentiable(words)
        ctx.set_materialize_grads(False)
        return y, words

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 9
        words, w = ctx.saved_tensors
        length, s_dtype, w_dtype, bias_dtype, backend = ctx.options
        wants_s, _, wants_w, _, _, wants_bias = ctx.needs_input_grad[:6]
        ds = _gradient_of_spikes(dy, w, s_dtype, backend) if wants_s else None
        dw = _spike_matmul_dw(words, length, dy, backend).to(w_dtype) if wants_w else None
        dbias = dy.sum_to_size(dy.shape[-1:]).to(bias_dtype) if wants_bias else None
        return ds, None, dw, None, None, dbias, None, None, None


class _ToEdge(torch.autograd.Function):
    """A product as it is, whose backward pass sends packed spikes their gradient."""

    @staticmethod
    def forward(ctx, y, edge, w, backend):
        ctx.save_for_backward(w)
        ctx.options = (edge.dtype, backend)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        (w,) = ctx.saved_tensors
        return dy, _gradient_of_spikes(dy, w, *ctx.options), None, None


def _autocast(device_type: str, op):
    """The op's autocast kernel: the product comes out in the autocast dtype, and on a GPU the weights go in it too."""

    def call(s, length, w, scale, tiles, bias, keep, dtype, backend):
        if dtype is None and w.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        with below_autocast(device_type):
            return op(s, length, w, scale, tiles, bias, keep, dtype, backend)

    return call


_spike_matmul = torch.ops.spikeclip.spike_matmul.default
_spike_matmul_ds = torch.ops.spikeclip.spike_matmul_ds.default
_spike_matmul_dw = torch.ops.spikeclip.spike_matmul_dw.default
_spike_matmul_again = torch.ops.spikeclip.spike_matmul_again.default
for _device in ("CPU", "CUDA"):
    for _name, _op in zip(_NAMES, (_spike_matmul, _spike_matmul_again), strict=True):
        _library.impl(_name, _fwd, _device)
        _library.impl(_name, _autocast(_device.lower(), _op), f"Autocast{_device}")
    _library.impl("spike_matmul_ds", _ds, _device)
    _library.impl("spike_matmul_dw", _dw, _device)
_library.impl("spike_matmul", with_autograd(_SpikeMatmul, _spike_matmul), "Autograd")
for _name, _op in (
    ("spike_matmul_ds", _spike_matmul_ds),
    ("spike_matmul_dw", _spike_matmul_dw),
    ("spike_matmul_again", _spike_matmul_again),
):
    _library.impl(_name, with_autograd(no_second_derivative("spike_matmul", _op), _op), "Autograd")
torch.library.register_fake("spikeclip::spike_matmul_ds", _ds_fake, lib=_library)
for _name in _NAMES:
    torch.library.register_fake(f"spikeclip::{_name}", _fwd_fake, lib=_library)
torch.library.register_fake("spikeclip::spike_matmul_dw", _dw_fake, lib=_library)
