"""``ops.spike_attention``: softmax-free attention on spikes, as a torch op with its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _backends
from ._autograd import below_autocast, below_autograd, no_second_derivative, with_autograd
from ._dtypes import FLOATS, NUMBERS, compute_dtype
from .packed import PackedSpikes, pack, pack_spikes, word_count
from .spike_matmul import check_beside, spikes_of

_LARGEST = torch.finfo(torch.float32).max

_library = torch.library.Library("spikeclip", "FRAGMENT")
_library.define(
    "spike_attention(Tensor q, Tensor? k, Tensor? v, SymInt channels, int num_heads, float scale, bool keep, "
    "ScalarType? dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "spike_attention_bwd(Tensor dy, Tensor q, Tensor? k, Tensor? v, SymInt channels, int num_heads, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)


def spike_attention(
    q: Tensor | PackedSpikes,
    k: Tensor | PackedSpikes | None = None,
    v: Tensor | PackedSpikes | None = None,
    *,
    scale: float,
    num_heads: int,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Spikformer's attention per head, ``(q k^T) v * scale`` without a softmax (Zhou et al. 2023, arXiv 2209.15425).

    Heads lie side by side in the channels. Products of spikes are integers below 2^24, so both associations are exact; the
    kernels form ``k^T v`` first and never an N x S matrix. Differentiable in ``q``, ``k`` and ``v``, without such a matrix
    either; one bit a spike is kept for that.

    Args:
        q: spikes ``[..., N, C]``, zeros and ones, or :class:`PackedSpikes`; or queries, keys and values in one, side by side,
            ``[..., N, 3 C]``, whose gradient is one too.
        k, v: the same with S tokens, ``[..., S, C]``; None beside queries, keys and values in one.
        scale: factor of the result (the paper: 0.125), finite.
        num_heads: divides C.
        mask: floating or bool, broadcast to ``[..., num_heads, N, S]``, multiplies ``q k^T`` (0 hides a pair). The scores
            then exist: dense tensors, ``auto`` or ``torch`` alone.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton`` or ``torch``; a named one never falls back.

    Returns:
        ``[..., N, C]`` in ``v``'s dtype, or ``q``'s where that is all three (float32 for packed, bool and bytes; under
        autocast, the autocast dtype).

    Raises:
        TypeError: an argument of the wrong type. ValueError: a shape, dtype or device outside the above, a value that is
        neither 0 nor 1 (see :func:`pack_spikes`), or counts that could reach 2^24. RuntimeError: the named backend is not
        available, or a second derivative is asked for.
    """
    sources, channels = check_attention(q, k, v, scale, num_heads, backend)
    if mask is not None:
        q, k, v = q.chunk(3, -1) if k is None and isinstance(q, Tensor) else (q, k, v)
        return _masked(q, k, v, scale, num_heads, mask, backend)
    y = _spike_attention(*sources, channels, num_heads, scale, False, None, backend)[0]
    edges = [s.edge if isinstance(s, PackedSpikes) else None for s in (q, k, v)]
    if torch.is_grad_enabled() and any(edge is not None for edge in edges):
        words = [s if s is None or s.dtype == torch.int32 else pack_spikes(s.detach()).words for s in sources]
        return _ToEdges.apply(y, *edges, *words, channels, num_heads, scale, backend)
    return y


def check_attention(q, k, v, scale, num_heads, backend) -> tuple[list[Tensor | None], int]:
    """(What the op is given for q, k and v, channels). Raises as :func:`spike_attention` says."""
    q_source, channels = spikes_of("q", q)
    sources = [q_source, None, None]
    if (k is None) != (v is None):
        raise TypeError(f"k and v must both be spikes or both None; got {type(k).__name__} and {type(v).__name__}")
    if k is None:
        if q_source.dim() < 2 or channels % 3:
            raise ValueError(f"q must have shape [..., N, 3 C] without k and v; got {list(q.shape)}")
        channels, tokens = channels // 3, q_source.shape[-2]
    else:
        (sources[1], k_channels), (sources[2], v_channels) = spikes_of("k", k), spikes_of("v", v)
        if q_source.dim() < 2 or not channels == k_channels == v_channels:
            shapes = f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
            raise ValueError(f"q, k and v must have shapes [..., N or S, C]; got {shapes}")
        if sources[1].shape[:-1] != sources[2].shape[:-1] or q_source.shape[:-2] != sources[1].shape[:-2]:
            raise ValueError(
                f"k and v must have the shape [..., S, C] with q's leading sizes; got {list(k.shape)}, {list(v.shape)}"
            )
        for name, source in zip("kv", sources[1:], strict=True):
            check_beside(name, source, q_source)
        tokens = sources[1].shape[-2]
    if isinstance(num_heads, bool) or not isinstance(num_heads, int) or num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads must be an integer that divides C = {channels}; got {num_heads!r}")
    if not isinstance(scale, NUMBERS):
        raise TypeError(f"scale must be a number; got {scale!r}")
    if not -_LARGEST <= scale <= _LARGEST:
        raise ValueError(f"scale must be a finite number in float32's range; got {scale}")
    if tokens * (channels // num_heads) >= 2**24:
        raise ValueError(f"S * C / num_heads must be < 2^24 for exact counts; got {tokens} * {channels // num_heads}")
    _backends.check_name(backend)
    return sources, channels


def _masked(q, k, v, scale, num_heads, mask, backend):
    if any(isinstance(s, PackedSpikes) for s in (q, k, v)):
        raise ValueError("mask needs dense q, k and v; got PackedSpikes")
    if backend not in ("auto", "torch"):
        raise ValueError(f"mask needs backend 'auto' or 'torch'; got {backend!r}")
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor or None; got {type(mask).__name__}")
    wanted = (*q.shape[:-2], num_heads, q.shape[-2], k.shape[-2])
    fits = mask.dim() <= len(wanted) and all(m in (1, n) for m, n in zip(mask.shape[::-1], wanted[::-1], strict=False))
    if not fits or (mask.dtype != torch.bool and mask.dtype not in FLOATS):
        raise ValueError(
            f"mask must be floating or bool and broadcast to [..., num_heads, N, S] = {list(wanted)}; "
            f"got {mask.dtype} of shape {list(mask.shape)}"
        )
    check_beside("mask", mask, q)
    if _backends.checks_spikes(q.device.type) and not torch.compiler.is_compiling():
        for s in (q, k, v):
            pack_spikes(s.detach())
    # In float32 at least: counts of spikes overflow half precision, or lose their last digits.
    compute = compute_dtype(v)
    with torch.autocast(q.device.type, enabled=False):
        heads = [s.to(compute).unflatten(-1, (num_heads, -1)).transpose(-2, -3) for s in (q, k, v)]
        mixed = ((heads[0] @ heads[1].mT) * mask.to(compute)) @ heads[2] * scale
    dtype = _out_dtype(q, v)
    if torch.is_autocast_enabled(q.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
    return mixed.transpose(-2, -3).flatten(-2).to(dtype)


def _out_dtype(q: Tensor, v: Tensor | None) -> torch.dtype:
    source = q if v is None else v
    return source.dtype if source.is_floating_point() else torch.float32


def _fwd(q, k, v, channels, num_heads, scale, keep, dtype, backend):
    dtype = dtype or _out_dtype(q, v)
    functions = _backends.functions(backend, q.device.type, dtype)
    words = [s if s is None or s.dtype == torch.int32 else pack(s, functions) for s in (q, k, v)]
    y = functions.spike_attention(*map(_flat, words), channels, num_heads, scale, dtype)
    # What came packed is not handed back: an op's outputs may not be its inputs.
    kept = [w if keep and w is not s else q.new_empty(0, dtype=torch.int32) for w, s in zip(words, (q, k, v), strict=True)]
    return y.view(*q.shape[:-1], channels), *kept


def _flat(words: Tensor | None) -> Tensor | None:
    """Words [L, tokens, W], contiguous."""
    return None if words is None else words.reshape(words.shape[:-2].numel(), *words.shape[-2:]).contiguous()


def _bwd(dy, q, k, v, channels, num_heads, scale, backend):
    functions = _backends.functions(backend, dy.device.type, dy.dtype)
    flat = dy.reshape(dy.shape[:-2].numel(), *dy.shape[-2:]).contiguous()
    grads = functions.spike_attention_bwd(flat, *map(_flat, (q, k, v)), channels, num_heads, scale)
    found = [g.view(*w.shape[:-1], g.shape[-1]) for g, w in zip(grads, (q, k, v), strict=False)]
    return *found, *(dy.new_empty(0) for _ in range(3 - len(found)))


def _fwd_fake(q, k, v, channels, num_heads, scale, keep, dtype, backend):
    kept = [keep and s is not None and s.dtype != torch.int32 for s in (q, k, v)]
    length = 3 * channels if k is None else channels
    shapes = [(*s.shape[:-1], word_count(length)) if keeps else (0,) for s, keeps in zip((q, k, v), kept, strict=True)]
    y = q.new_empty((*q.shape[:-1], channels), dtype=dtype or _out_dtype(q, v))
    return y, *(q.new_empty(shape, dtype=torch.int32) for shape in shapes)


def _bwd_fake(dy, q, k, v, channels, num_heads, scale, backend):
    if k is None:
        return dy.new_empty((*q.shape[:-1], 3 * channels)), dy.new_empty(0), dy.new_empty(0)
    return tuple(dy.new_empty((*w.shape[:-1], channels)) for w in (q, k, v))


class _SpikeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, channels, num_heads, scale, keep, dtype, backend):
        with below_autograd():
            y, *words = _spike_attention(q, k, v, channels, num_heads, scale, True, dtype, backend)
        kept = (s if s is None or s.dtype == torch.int32 else w for s, w in zip((q, k, v), words, strict=True))
        ctx.save_for_backward(*kept)
        ctx.options = (channels, num_heads, scale, backend)
        ctx.dtypes = [None if s is None else s.dtype for s in (q, k, v)]
        ctx.mark_non_differentiable(*words)
        ctx.set_materialize_grads(False)
        return y, *words

    @staticmethod
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 9
        channels, num_heads, scale, backend = ctx.options
        grads = _spike_attention_bwd(dy, *ctx.saved_tensors, channels, num_heads, scale, backend)
        wanted = zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return *(g.to(dtype) if wants else None for g, dtype, wants in wanted), *(None,) * 6


class _ToEdges(torch.autograd.Function):
    """Attention as it is, whose backward pass sends packed spikes their gradients."""

    @staticmethod
    def forward(ctx, y, q_edge, k_edge, v_edge, q, k, v, *options):
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        ctx.dtypes = [None if edge is None else edge.dtype for edge in (q_edge, k_edge, v_edge)]
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        *options, backend = ctx.options
        grads = _spike_attention_bwd(dy, *ctx.saved_tensors, *options, backend)
        return dy, *(None if d is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)), *(None,) * 7


def _autocast(device_type: str):
    def call(q, k, v, channels, num_heads, scale, keep, dtype, backend):
        if dtype is None and _out_dtype(q, v) != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
        with below_autocast(device_type):
            return _spike_attention(q, k, v, channels, num_heads, scale, keep, dtype, backend)

    return call


_spike_attention = torch.ops.spikeclip.spike_attention.default
_spike_attention_bwd = torch.ops.spikeclip.spike_attention_bwd.default
for _device in ("CPU", "CUDA"):
    _library.impl("spike_attention", _fwd, _device)
    _library.impl("spike_attention_bwd", _bwd, _device)
    _library.impl("spike_attention", _autocast(_device.lower()), f"Autocast{_device}")
_library.impl("spike_attention", with_autograd(_SpikeAttention, _spike_attention), "Autograd")
_library.impl(
    "spike_attention_bwd",
    with_autograd(no_second_derivative("spike_attention", _spike_attention_bwd), _spike_attention_bwd),
    "Autograd",
)
torch.library.register_fake("spikeclip::spike_attention", _fwd_fake, lib=_library)
torch.library.register_fake("spikeclip::spike_attention_bwd", _bwd_fake, lib=_library)
