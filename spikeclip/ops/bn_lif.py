"""``ops.bn_lif``: BatchNorm and the neurons behind it in one, with one gradient."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from . import _backends
from ._autograd import no_second_derivative, with_autograd
from ._dtypes import FLOATS, NUMBERS, compute_dtype
from .lif import check_neuron, check_tau, lif, spikes_dtype
from .max_pool import check_pool
from .packed import PackedSpikes, new_edge, word_count
from .reference.bn_lif import affine, bn_factors, unbiased
from .reference.max_pool import pooled_size
from .spike_product import SpikeProduct, again
from .surrogate import SURROGATES

_NEURON = "float tau, float v_threshold, float? v_reset, bool decay_input"

_library = torch.library.Library("spikeclip", "FRAGMENT")
_library.define("bn_stats(Tensor x, str backend) -> (Tensor, Tensor)")
_library.define(
    "bn_affine(Tensor x, Tensor? weight, Tensor? bias, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "bn_factors(Tensor sums, Tensor scale, Tensor inverse, Tensor mean, SymInt count, bool apart, str backend) "
    "-> (Tensor, Tensor)"
)
_library.define(f"bn_lif_fwd(Tensor x, Tensor scale, Tensor shift, {_NEURON}, ScalarType spike_dtype, str backend) -> Tensor")
_library.define(
    f"bn_lif_bwd(Tensor ds, Tensor x, Tensor scale, Tensor shift, Tensor mean, Tensor? factors, bool sums, {_NEURON}, "
    "bool detach_reset, str surrogate, float alpha, str backend) -> (Tensor, Tensor)"
)
_library.define("bn_dx(Tensor(a!) dz, Tensor x, Tensor factors, str backend) -> ()")


def bn_lif(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: dist.ProcessGroup | None = None,
    pool: tuple[int, int, int] | None = None,
    product: SpikeProduct | None = None,
    tau: float = 2.0,
    v_threshold: float = 1.0,
    v_reset: float | None = 0.0,
    decay_input: bool = True,
    detach_reset: bool = False,
    surrogate: str = "sigmoid",
    alpha: float | None = None,
    packed: bool = False,
    backend: str = "auto",
) -> Tensor | PackedSpikes:
    """``lif(batch_norm(x))`` over all time-steps, differentiable in ``x``, ``weight`` and ``bias``.

    One pass takes the statistics, a second one normalises, integrates and fires, and the backward pass recomputes currents and
    membranes from ``x``: the normalised currents never exist in memory, and what is kept is ``x``, or what it was made of
    (and, packed, one bit a spike). Statistics, running statistics and numbers are those of
    :func:`torch.nn.functional.batch_norm` over all dimensions but the last (Ioffe & Szegedy 2015, arXiv 1502.03167; over the
    steps too, as Zheng et al. 2021, arXiv 2011.05280) and of :func:`spikeclip.ops.lif` from rest. Currents are float32 inside
    whatever the dtype of ``x``.

    Args:
        x: float32, float16, bfloat16 or float64, ``[T, ..., C]``, channels last; other memory orders are copied.
        running_mean, running_var: floating ``[C]``, updated in place in training; used where ``training`` is False. None, both:
            the batch's own statistics always.
        weight, bias: floating ``[C]`` or None, as in ``batch_norm``.
        training: whether to normalise by the batch's statistics.
        momentum, eps: as in ``batch_norm``.
        process_group: in training, take statistics over the processes of a ``torch.distributed`` group, as ``SyncBatchNorm``
            does; every process needs a batch that is not empty.
        pool: (size, stride, padding) of a max-pool between norm and neurons, ``F.max_pool2d`` of ``x`` ``[T, B, H, W, C]``;
            normalised currents do not exist for it either.
        product: what ``x`` was made of; the backward pass makes it, and what ``pool`` made of it, again: neither is kept.
        tau: membrane time constant in steps, a number > 1.
        v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, packed, backend: as for :func:`spikeclip.ops.lif`.

    Returns:
        Spikes of ``x``'s shape (pooled: of the smaller image), as from :func:`spikeclip.ops.lif`.

    Raises:
        TypeError: an argument of the wrong type. ValueError: a shape, dtype, device or number outside the above, or one value a
        channel in training. RuntimeError: the named backend is not available, or a second derivative is asked for.
    """
    _check(x, running_mean, running_var, weight, bias, momentum, eps, pool, product, tau)
    check_neuron(v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha, backend)
    alpha = SURROGATES[surrogate].alpha if alpha is None else float(alpha)
    batch = training or running_mean is None
    neuron = (float(tau), float(v_threshold), None if v_reset is None else float(v_reset), decay_input)
    learning = (detach_reset, surrogate, alpha, backend)
    if not x.numel():
        if batch:
            raise ValueError(f"x must have more than one value a channel in training; got {list(x.shape)}")
        left = x if pool is None else x.new_empty((*x.shape[:2], *pooled_size(x.shape[2:4], pool), x.shape[-1]))
        return lif(left, packed=packed, backend=backend)[0]
    given = (None, None) if batch else (running_mean, running_var)
    process_group = process_group if training else None  # as SyncBatchNorm, which asks no other process in evaluation
    dtype = torch.int32 if packed else spikes_dtype(x)
    made = (None,) * 6 if product is None else (product.options, *product.tensors)
    spikes, edge, mean, var = _BnLif.apply(
        x.contiguous(), weight, bias, *given, float(eps), process_group, pool, neuron, learning, dtype, *made
    )
    if training and running_mean is not None:
        with torch.no_grad():
            new = [mean.to(running_mean.dtype), var.to(running_var.dtype)]
            torch._foreach_lerp_([running_mean, running_var], new, float(momentum))
    return PackedSpikes.trusted(spikes, x.shape[-1], edge) if packed else spikes


def _check(x, running_mean, running_var, weight, bias, momentum, eps, pool, product, tau) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor; got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise ValueError(f"x must be float32, float16, bfloat16 or float64; got {x.dtype}")
    if x.dim() < 2 or not x.shape[0] or not x.shape[-1]:
        raise ValueError(f"x must have shape [T, ..., C] with T and C >= 1; got {list(x.shape)}")
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None; got {type(tensor).__name__}")
        if tensor.shape != x.shape[-1:] or tensor.dtype not in FLOATS or tensor.device != x.device:
            raise ValueError(
                f"{name} must be floating, of shape [{x.shape[-1]}], on x's device {x.device}; "
                f"got {tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
            )
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given both or neither")
    for name, value, fits, limits in (
        ("momentum", momentum, lambda n: 0.0 <= n <= 1.0, "in 0..1"),
        ("eps", eps, lambda n: 0.0 <= n < math.inf, "finite and >= 0"),
    ):
        if not isinstance(value, NUMBERS):
            raise TypeError(f"{name} must be a number; got {value!r}")
        if not fits(value):
            raise ValueError(f"{name} must be {limits}; got {value}")
    check_tau(tau)
    if pool is not None:
        check_pool(pool, x.shape)
    if product is not None and not isinstance(product, SpikeProduct):
        raise TypeError(f"product must be a SpikeProduct or None; got {type(product).__name__}")
    if product is not None:
        merged = x.dim() - len(product.shape) + 1
        if merged < 1 or (math.prod(x.shape[:merged]), *x.shape[merged:]) != tuple(product.shape):
            raise ValueError(
                f"product must be what x of shape {list(x.shape)} was made of; got one of shape {list(product.shape)}"
            )


def _together(mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over all processes, from each one's own."""
    mine = torch.cat([mean.double(), var.double(), mean.new_full((1,), count, dtype=torch.float64)])
    every = mine.new_empty(dist.get_world_size(group), mine.numel())
    dist.all_gather(list(every.unbind()), mine, group=group)
    means, variances, counts = every.split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    centre = (means * counts).sum(0) / total
    spread = ((variances + (means - centre).square()) * counts).sum(0) / total
    return centre.to(mean.dtype), spread.to(mean.dtype), total


class _BnLif(torch.autograd.Function):
    """Returns (spikes, the edge of packed ones, mean and unbiased variance of the batch, None in evaluation)."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, eps, group, pool, neuron, learning, dtype, recipe, *made_of):
        backend = learning[-1]
        compute = compute_dtype(x)
        count = x.numel() // x.shape[-1]
        ctx.batch = mean is None
        ctx.group = group if ctx.batch and group is not None and dist.get_world_size(group) > 1 else None
        if not ctx.batch:
            mean, var, new = mean.to(compute).contiguous(), var.to(compute), None
            inverse, scale, shift = affine(mean, var, weight, bias, eps)
        elif ctx.group is None:
            if count == 1:
                raise ValueError(f"x must have more than one value a channel in training; got {list(x.shape)}")
            mean, new, inverse, scale, shift = torch.ops.spikeclip.bn_affine(x, weight, bias, eps, backend)
        else:
            mean, var, count = _together(*torch.ops.spikeclip.bn_stats(x, backend), count, ctx.group)
            new = unbiased(var, count)
            inverse, scale, shift = affine(mean, var, weight, bias, eps)
        values, index = (x, None) if pool is None else torch.ops.spikeclip.max_pool(x, scale, pool, backend)
        spikes = torch.ops.spikeclip.bn_lif_fwd(values, scale, shift, *neuron, dtype, backend)
        kept = (x, values if pool else None, index) if recipe is None else (None,) * 3
        ctx.save_for_backward(*kept, mean, inverse, scale, shift, *made_of)
        ctx.options = (count, pool, neuron, learning)
        ctx.product = (x.shape, x.dtype, recipe)
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        packed = dtype == torch.int32
        edge = new_edge(x, values.shape, spikes_dtype(x)) if packed else x.new_empty(0)
        new_mean = mean if ctx.batch else None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in (spikes if packed else None, new_mean, new) if t is not None))
        return spikes, edge, new_mean, new

    @staticmethod
    def backward(ctx, ds, edge, *_):
        x, values, index, mean, inverse, scale, shift, *made_of = ctx.saved_tensors
        count, pool, neuron, learning = ctx.options
        ds = edge if ds is None or not ds.is_floating_point() else ds
        if ds is None:
            return (None,) * 17
        ds = ds.contiguous()
        shape, dtype, recipe = ctx.product
        if recipe is not None:
            x = again(made_of, recipe).reshape(shape).to(dtype).contiguous()
            if pool is not None:
                values, index = torch.ops.spikeclip.max_pool(x, scale, pool, learning[-1])
        values = x if pool is None else values

        def gradient(factors, sums):
            return torch.ops.spikeclip.bn_lif_bwd(ds, values, scale, shift, mean, factors, sums, *neuron, *learning)

        learns_x, learns_weight, learns_bias = ctx.needs_input_grad[:3]
        dx = dweight = rest = None
        if ctx.batch:
            dz, sums = gradient(None, True)
            norm = (scale, inverse, mean, count, pool is not None)
            if ctx.group is None:
                factors, dweight = torch.ops.spikeclip.bn_factors(sums, *norm, learning[-1])
            elif learns_x:
                every = sums.clone()
                dist.all_reduce(every, group=ctx.group)
                factors, _ = bn_factors(every, *norm)
            if learns_x:
                if dz.numel():
                    torch.ops.spikeclip.bn_dx(dz, values, factors[:3], learning[-1])
                    dx = dz
                else:
                    dx, _ = gradient(factors[:3], False)
                rest = factors[3:]
        else:
            straight = torch.stack([scale, *[torch.zeros_like(scale)] * 2]) if learns_x else None
            dx, sums = gradient(straight, True)
        if pool is not None and learns_x:
            dx = torch.ops.spikeclip.max_pool_bwd(dx, index, x, rest, pool, learning[-1])
        weight_dtype, bias_dtype = ctx.dtypes
        if learns_weight:
            dweight = (sums[1] * inverse if dweight is None else dweight).to(weight_dtype)
        dbias = sums[0].to(bias_dtype) if learns_bias else None
        return dx if learns_x else None, dweight if learns_weight else None, dbias, *(None,) * 14


def _stats(x, backend):
    return _backends.functions(backend, x.device.type, x.dtype).bn_stats(x)


def _affine(x, weight, bias, eps, backend):
    return _backends.functions(backend, x.device.type, x.dtype).bn_affine(x, weight, bias, eps)


def _factors(sums, scale, inverse, mean, count, apart, backend):
    return _backends.functions(backend, sums.device.type, sums.dtype).bn_factors(sums, scale, inverse, mean, count, apart)


def _fwd(x, scale, shift, tau, v_threshold, v_reset, decay_input, spike_dtype, backend):
    functions = _backends.functions(backend, x.device.type, x.dtype)
    return functions.bn_lif_fwd(x, None, scale, shift, tau, v_threshold, v_reset, decay_input, spike_dtype)[0]


def _bwd(ds, x, scale, shift, mean, factors, sums, *options):
    *neuron, backend = options
    functions = _backends.functions(backend, x.device.type, x.dtype)
    return functions.bn_lif_bwd(ds, x, scale, shift, mean, factors, sums, *neuron)


def _keeps_dz(x: Tensor, backend: str) -> bool:
    """Whether the backward pass without factors returns the currents' gradient, which ``bn_dx`` makes x's of."""
    keeps = getattr(_backends.functions(backend, x.device.type, x.dtype), "keeps_dz", None)
    return keeps is not None and keeps(x)


def _dx(dz, x, factors, backend):
    _backends.functions(backend, x.device.type, x.dtype).bn_dx(dz, x, factors)


def _stats_fake(x, backend):
    return tuple(x.new_empty(x.shape[-1:], dtype=compute_dtype(x)) for _ in range(2))


def _affine_fake(x, weight, bias, eps, backend):
    return tuple(x.new_empty(x.shape[-1:], dtype=compute_dtype(x)) for _ in range(5))


def _factors_fake(sums, scale, inverse, mean, count, apart, backend):
    return scale.new_empty(5 if apart else 3, len(scale)), torch.empty_like(scale)


def _fwd_fake(x, scale, shift, tau, v_threshold, v_reset, decay_input, spike_dtype, backend):
    last = word_count(x.shape[-1]) if spike_dtype == torch.int32 else x.shape[-1]
    return x.new_empty((*x.shape[:-1], last), dtype=spike_dtype)


def _bwd_fake(ds, x, scale, shift, mean, factors, sums, *options):
    dx = x.new_empty(0) if factors is None and not _keeps_dz(x, options[-1]) else torch.empty_like(x)
    return dx, scale.new_empty((2, x.shape[-1]) if sums else 0)


_bn_lif_bwd = torch.ops.spikeclip.bn_lif_bwd.default
_bn_factors = torch.ops.spikeclip.bn_factors.default
for _name, _call, _fake in (
    ("bn_stats", _stats, _stats_fake),
    ("bn_affine", _affine, _affine_fake),
    ("bn_factors", _factors, _factors_fake),
    ("bn_lif_fwd", _fwd, _fwd_fake),
    ("bn_lif_bwd", _bwd, _bwd_fake),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _call, _device)
    torch.library.register_fake(f"spikeclip::{_name}", _fake, lib=_library)
for _device in ("CPU", "CUDA"):
    _library.impl("bn_dx", _dx, _device)
torch.library.register_fake("spikeclip::bn_dx", lambda dz, x, factors, backend: None, lib=_library)
for _name, _op in (("bn_lif_bwd", _bn_lif_bwd), ("bn_factors", _bn_factors)):
    _library.impl(_name, with_autograd(no_second_derivative("bn_lif", _op), _op), "Autograd")
