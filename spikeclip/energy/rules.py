"""What every op that PyTorch dispatches is to the count: product, neurons, norm, arithmetic on elements, or none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .nonzeros import Operand

aten = torch.ops.aten


class Matmul(NamedTuple):
    """``source @ b``: ``[..., K]`` and ``[K, N]``, or ``[n, M, K]`` and ``[n, K, N]``.

    ``weighted``: ``b`` is known to be weights.
    """

    source: Operand
    b: Tensor
    out: Tensor
    weighted: bool = False


class Convolution(NamedTuple):
    """``options``: aten.convolution's arguments from stride on. ``last``: the source's channels are its last dimension."""

    source: Operand
    w: Tensor
    options: tuple
    last: bool
    out: Tensor


class Attention(NamedTuple):
    """``q (k^T v)`` per head, in this order, q the ``source``, of ``[..., N, C]``."""

    source: Operand
    k: Operand
    v: Operand
    heads: int
    out: Tensor


class Neurons(NamedTuple):
    """Spikes, the ``source``, of neurons that integrated ``currents``, time first. ``norm``: a BatchNorm went before."""

    source: Operand
    currents: Tensor
    norm: bool


def _mm(a, b, out):
    return Matmul(Operand(a), b, out)


def _mv(a, b, out):
    return Matmul(Operand(a), b[:, None], out)


def _dot(a, b, out):
    return Matmul(Operand(a[None]), b[:, None], out)


def _spikes(source: Tensor, length: int) -> Operand:
    return Operand(None, source, length) if source.dtype == torch.int32 else Operand(source)


def _lif(args, out):
    x = args[0]
    return Neurons(_spikes(out[0], x.shape[-1]), x, False)


def _bn_lif(args, out):
    x = args[0]
    return Neurons(_spikes(out, x.shape[-1]), x, True)


def _spike_matmul(args, out):
    s, length, w = args[:3]
    return Matmul(_spikes(s, length), w, out[0], True)


def _spike_conv2d(args, out):
    s, channels, w = args[:3]
    stride, padding = args[6:8]
    options = (list(stride), list(padding), [1, 1], False, [0, 0], 1)
    return Convolution(_spikes(s, channels), w, options, s.dtype == torch.int32, out[0])


def _spike_attention(args, out):
    q, k, v, channels, heads = args[:5]
    q, k, v = _thirds(q, channels) if k is None else (q, k, v)
    return Attention(_spikes(q, channels), _spikes(k, channels), _spikes(v, channels), heads, out[0])


def _thirds(qkv: Tensor, channels: int) -> list[Tensor]:
    """Queries, keys and values that lie side by side, dense or as words."""
    if qkv.dtype == torch.int32 and channels % 32:  # words hold spikes of two of them
        dense = torch.ops.spikeclip.unpack_spikes(qkv, 3 * channels, torch.uint8, "auto")
        return [torch.ops.spikeclip.pack_spikes(part, "auto") for part in dense.chunk(3, -1)]
    return [part.contiguous() for part in qkv.chunk(3, -1)]


EXACT: dict[object, Callable] = {
    aten.mm.default: lambda args, out: _mm(args[0], args[1], out),
    aten.addmm.default: lambda args, out: _mm(args[1], args[2], out),
    aten.bmm.default: lambda args, out: _mm(args[0], args[1], out),
    aten.baddbmm.default: lambda args, out: _mm(args[1], args[2], out),
    aten.mv.default: lambda args, out: _mv(args[0], args[1], out),
    aten.addmv.default: lambda args, out: _mv(args[1], args[2], out),
    aten.dot.default: lambda args, out: _dot(args[0], args[1], out),
    aten.convolution.default: lambda args, out: Convolution(Operand(args[0]), args[1], tuple(args[3:9]), False, out),
    torch.ops.spikeclip.spike_matmul.default: _spike_matmul,
    torch.ops.spikeclip.spike_conv2d.default: _spike_conv2d,
    torch.ops.spikeclip.spike_attention.default: _spike_attention,
    torch.ops.spikeclip.lif_fwd.default: _lif,
    torch.ops.spikeclip.bn_lif_fwd.default: _bn_lif,
}

# Softmax attention in one op.
FUSED_ATTENTION = frozenset(
    """_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention
    _scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable""".split()
)
# With parameters, they fold into the product before them.
AFFINE = frozenset("add add_ sub sub_ mul mul_ div div_".split())
_NORMS = frozenset(
    """native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm
    batch_norm_with_update native_layer_norm native_group_norm _fused_rms_norm""".split()
)
_REDUCTIONS = frozenset(
    """max_pool2d max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d adaptive_max_pool2d cumsum topk sort _softmax _log_softmax max min aminmax all any sum mean var std
    var_mean norm prod count_nonzero logsumexp""".split()
)
_MOVES = frozenset(
    """clone copy_ _to_copy cat stack embedding index index_select gather scatter index_put_ constant_pad_nd repeat roll flip
    masked_fill masked_fill_ zero_ fill_ tril triu _local_scalar_dense _unsafe_view _reshape_alias lift_fresh detach alias
    native_dropout bernoulli_ one_hot split_with_sizes unbind _pin_memory is_pinned resolve_conj resolve_neg equal
    im2col col2im unsafe_split unsafe_split_with_sizes
    upsample_nearest2d reflection_pad2d view_as_real item set_ record_stream pixel_shuffle""".split()
)
# They make values out of nothing that was computed.
_FACTORIES = frozenset(
    """empty zeros ones full arange new_empty new_zeros new_ones new_full rand randn scalar_tensor eye linspace randint randperm
    empty_strided new_empty_strided empty_like zeros_like ones_like full_like rand_like randn_like bernoulli poisson normal_
    uniform_""".split()
)
_MOVING = {torch.Tag.view_copy, torch.Tag.inplace_view}
_OURS = {"pack_spikes": "move", "unpack_spikes": "move", "max_pool": "reduction"}


@cache
def category(func: torch._ops.OpOverload) -> str:
    """``norm``, ``elementwise``, ``reduction``, ``move`` or ``unknown``, for an op that is not in ``EXACT``."""
    namespace, name = func.namespace, func._opname
    if namespace == "spikeclip":
        return _OURS.get(name, "unknown")
    if namespace not in ("aten", "prims", "prim"):
        return "unknown"
    if func.is_view or name in _MOVES or name in _FACTORIES or _MOVING & set(func.tags):
        return "move"
    if name in _NORMS:
        return "norm"
    if name in _REDUCTIONS or torch.Tag.reduction in func.tags:
        return "reduction"
    return "elementwise" if torch.Tag.pointwise in func.tags else "unknown"
