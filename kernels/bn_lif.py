"""BatchNorm before LIF in Triton: the `triton` backend of ``ops.bn_lif``.

Tensors arrive as dense ``[T, R, C]`` blocks of memory, the forward pass's x maybe as one step that stands for all. Forward, a
program owns whole words of spikes for all T steps. Where sums by channel are made, a program owns CHANNELS channels of
neighbouring rows, which it walks ROWS at a time; sums lie in float32 until each program has written its own, ``[programs, 2,
C]``; a small kernel adds those up in float64, in an order that no run changes. The backward pass recomputes currents and
membranes of up to SEGMENT steps from x, in registers, and keeps the currents' gradient where x has float32's range; more steps
go by the currents themselves and ``lif_bwd``.
"""

import torch
import triton
import triton.language as tl

from spikeclip.ops._device import device_of
from spikeclip.ops._sums import mean_and_variance
from spikeclip.ops.reference.bn_lif import bn_lif_bwd_by
from spikeclip.ops.surrogate import SURROGATES

from ._bits import elements
from ._step import (
    SEGMENT,
    advanced,
    charge,
    fma,
    has_exact_inverse,
    load_steps,
    neuron_numbers,
    of_step,
    reset,
    segments,
    single,
    step_grad,
)
from .lif import lif_bwd

LAUNCH_FORWARD = {"BLOCK": 16, "num_warps": 4}  # words a program, 4 neurons a thread
LAUNCH_STATS = {"ROWS": 64, "CHANNELS": 32, "num_warps": 4}
LAUNCH_BACKWARD = {"ROWS": 4, "CHANNELS": 64, "num_warps": 4}  # 2 neurons a thread: all their steps lie in registers
LAUNCH_DX = {"ROWS": 16, "CHANNELS": 64, "num_warps": 4}
LAUNCH_SUMS = {"ROWS": 256, "CHANNELS": 8, "num_warps": 8, "maxnreg": 96}  # few channels, so that many programs share the sums
LAUNCH_FACTORS = {"CHANNELS": 128, "num_warps": 4}
PROGRAMS = 2048  # about as many as a large device holds at once, as each has sums to begin and to end; more where tiles end
MOST_TILES = 64  # a program's, so that its float32 sums stay short


@triton.jit
def _place(rows, channels, rows_each, CHANNELS: tl.constexpr):
    """(Which part of the rows a program has, its first row, the one behind its last, its channels, a mask of them)."""
    blocks = (channels + CHANNELS - 1) // CHANNELS
    part = tl.program_id(0) // blocks
    channel = (tl.program_id(0) - part * blocks) * CHANNELS + tl.arange(0, CHANNELS)
    begin = part.to(tl.int64) * rows_each
    return part.to(tl.int64), begin, tl.minimum(begin + rows_each, rows), channel, channel < channels


@triton.jit
def _of(ptr, channel, inside):
    """The values of a program's channels, [1, CHANNELS]."""
    return tl.load(ptr + channel, mask=inside, other=0.0)[None, :]


@triton.jit
def _store_sums(sums_ptr, first, second, part, channel, inside, channels):
    at = sums_ptr + part * 2 * channels + channel
    tl.store(at, tl.sum(first, axis=0), mask=inside)
    tl.store(at + channels, tl.sum(second, axis=0), mask=inside)


@triton.jit
def _bn_stats(x_ptr, sums_ptr, rows, channels, rows_each, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    part, begin, end, channel, inside = _place(rows, channels, rows_each, CHANNELS)
    first = _of(x_ptr, channel, inside).to(tl.float32)
    plain = tl.zeros((ROWS, CHANNELS), tl.float32)
    square = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(begin, end, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        mask = (row < end) & inside[None, :]
        x = tl.load(x_ptr + row * channels + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - first, 0.0)
        plain += d
        square += d * d
    _store_sums(sums_ptr, plain, square, part, channel, inside, channels)


@triton.jit
def _column_sums(sums_ptr, parts, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a program's channels: (both sums over all parts, float64, the channels, a mask of them)."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    first = tl.zeros((ROWS, CHANNELS), tl.float64)
    second = tl.zeros((ROWS, CHANNELS), tl.float64)
    for start in range(0, parts, ROWS):
        part = (start + tl.arange(0, ROWS))[:, None]
        mask = (part < parts) & inside[None, :]
        at = sums_ptr + part.to(tl.int64) * 2 * channels + channel[None, :]
        first += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        second += tl.load(at + channels, mask=mask, other=0.0).to(tl.float64)
    return tl.sum(first, axis=0), tl.sum(second, axis=0), channel, inside


@triton.jit(do_not_specialize=["parts"])
def _bn_total(sums_ptr, total_ptr, parts, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    first, second, channel, inside = _column_sums(sums_ptr, parts, channels, ROWS, CHANNELS)
    tl.store(total_ptr + channel, first.to(tl.float32), mask=inside)
    tl.store(total_ptr + channels + channel, second.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["parts", "rows"])
def _bn_affine(
    sums_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, inverse_ptr, scale_ptr, shift_ptr, parts, rows, channels, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    plain, square, channel, inside = _column_sums(sums_ptr, parts, channels, ROWS, CHANNELS)
    count = tl.cast(rows, tl.float64)
    offset = plain / count
    var = square / count - offset * offset
    var = tl.where(var < 0.0, 0.0, var)
    mean = (tl.load(x_ptr + channel, mask=inside, other=0.0).to(tl.float64) + offset).to(tl.float32)
    inverse = (1.0 / tl.sqrt(var + eps)).to(tl.float32)
    scale = inverse
    if HAS_WEIGHT:
        scale = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32) * inverse
    shift = -mean * scale
    if HAS_BIAS:
        shift = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32) + shift
    tl.store(mean_ptr + channel, mean, mask=inside)
    tl.store(var_ptr + channel, (var * (count / (count - 1.0))).to(tl.float32), mask=inside)
    tl.store(inverse_ptr + channel, inverse, mask=inside)
    tl.store(scale_ptr + channel, scale, mask=inside)
    tl.store(shift_ptr + channel, shift, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _bn_factors(
    sums_ptr, scale_ptr, inverse_ptr, mean_ptr, factors_ptr, dweight_ptr, channels, count, APART: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    dz = tl.load(sums_ptr + channel, mask=inside, other=0.0)
    dz_x = tl.load(sums_ptr + channels + channel, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + channel, mask=inside, other=0.0)
    inverse = tl.load(inverse_ptr + channel, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + channel, mask=inside, other=0.0)
    rows = tl.cast(count, tl.float32)
    b = tl.div_rn(-scale * (inverse * inverse) * dz_x, rows)
    c = tl.div_rn(-scale * dz, rows) - b * mean
    tl.store(dweight_ptr + channel, dz_x * inverse, mask=inside)
    to = factors_ptr + channel
    tl.store(to, scale, mask=inside)
    if APART:
        nothing = tl.zeros((CHANNELS,), tl.float32)
        tl.store(to + channels, nothing, mask=inside)
        tl.store(to + 2 * channels, nothing, mask=inside)
        to += 2 * channels
    tl.store(to + channels, b, mask=inside)
    tl.store(to + 2 * channels, c, mask=inside)


@triton.jit
def _bn_lif_fwd(
    x_ptr, v0_ptr, scale_ptr, shift_ptr, spikes_ptr, v_last_ptr, tau_ptr, steps, rows, channels, per_row, x_step,
    tau, v_threshold, v_reset, HAS_V0: tl.constexpr, HAS_SCALE: tl.constexpr, TAU_TENSOR: tl.constexpr,
    DECAY_INPUT: tl.constexpr, SOFT_RESET: tl.constexpr, EXACT: tl.constexpr, SEGMENT: tl.constexpr, LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    words = tl.cast(rows, tl.int64) * per_row
    word, word_mask, column, at, mask = elements(channels, per_row, words, BLOCK)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + column, mask=mask, other=0.0)
        shift = tl.load(shift_ptr + column, mask=mask, other=0.0)
    if TAU_TENSOR:
        tau = tl.load(tau_ptr)
    inverse = tl.div_rn(1.0, tau)
    if HAS_V0:
        v = tl.load(v0_ptr + at, mask=mask, other=0.0)
    else:
        v = tl.zeros((BLOCK, 32), tl.float32) + v_reset
    stride = tl.cast(rows, tl.int64) * channels
    for first in range(0, steps if LONG else SEGMENT, SEGMENT):
        xs = load_steps(x_ptr, at, first, steps, tl.cast(x_step, tl.int64), mask, SEGMENT, LONG)
        for i in tl.static_range(SEGMENT):
            here = of_step(mask, first + i, steps, LONG)
            x = xs[i].to(tl.float32)
            if HAS_SCALE:
                x = x * scale + shift
            h = charge(v, x, tau, inverse, v_reset, DECAY_INPUT, EXACT)
            if spikes_ptr.dtype.element_ty == tl.int32:
                bits = (mask & (h >= v_threshold)).to(tl.int32) << tl.arange(0, 32)[None, :]
                word_here = of_step(word_mask, first + i, steps, LONG)
                tl.store(spikes_ptr + word + (first + i) * words, tl.sum(bits, axis=1), mask=word_here)
            else:
                spikes = (h >= v_threshold).to(tl.float32).to(spikes_ptr.dtype.element_ty)
                tl.store(spikes_ptr + at + (first + i) * stride, spikes, mask=here)
            v = advanced(reset(h, v_threshold, v_reset, SOFT_RESET), v, here, LONG)
    if not HAS_SCALE:
        tl.store(v_last_ptr + at, v, mask=mask)


@triton.jit
def _bn_lif_bwd(
    ds_ptr, x_ptr, scale_ptr, shift_ptr, mean_ptr, factors_ptr, dx_ptr, sums_ptr, rows, channels, rows_each,
    tau, v_threshold, v_reset, alpha,
    HAS_FACTORS: tl.constexpr, SUMS: tl.constexpr, WRITE: tl.constexpr, DECAY_INPUT: tl.constexpr, SOFT_RESET: tl.constexpr,
    DETACH_RESET: tl.constexpr, KIND: tl.constexpr, EXACT: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    part, begin, end, channel, inside = _place(rows, channels, rows_each, CHANNELS)
    scale = _of(scale_ptr, channel, inside)
    shift = _of(shift_ptr, channel, inside)
    if HAS_FACTORS:
        a = _of(factors_ptr, channel, inside)
        b = _of(factors_ptr + channels, channel, inside)
        c = _of(factors_ptr + 2 * channels, channel, inside)
    if SUMS:
        mean = _of(mean_ptr, channel, inside)
        plain = tl.zeros((ROWS, CHANNELS), tl.float32)
        centred = tl.zeros((ROWS, CHANNELS), tl.float32)
    inverse = tl.div_rn(1.0, tau)
    stride = tl.cast(rows, tl.int64) * channels
    for start in range(begin, end, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        mask = (row < end) & inside[None, :]
        at = row * channels + channel[None, :]
        xs = load_steps(x_ptr, at, 0, STEPS, stride, mask, STEPS, False)
        given = load_steps(ds_ptr, at, 0, STEPS, stride, mask, STEPS, False)
        v = tl.zeros((ROWS, CHANNELS), tl.float32) + v_reset
        hs = ()
        for t in tl.static_range(STEPS):
            h = charge(v, xs[t].to(tl.float32) * scale + shift, tau, inverse, v_reset, DECAY_INPUT, EXACT)
            hs = hs + (h,)
            v = reset(h, v_threshold, v_reset, SOFT_RESET)
        dv = tl.zeros((ROWS, CHANNELS), tl.float32)
        for t in tl.static_range(STEPS - 1, -1, -1):
            x, ds = xs[t].to(tl.float32), given[t].to(tl.float32)
            dh = step_grad(hs[t], ds, dv, v_threshold, v_reset, alpha, KIND, SOFT_RESET, DETACH_RESET)
            through = dh * inverse
            dv = dh - through
            if DECAY_INPUT:
                dz = through
            else:
                dz = dh
            if SUMS:  # of nothing but zeros where the mask is False
                plain += dz
                centred = fma(dz, x - mean, centred)
            if HAS_FACTORS:
                dz = fma(a, dz, fma(b, x, c))
            if WRITE:
                tl.store(dx_ptr + at + t * stride, dz.to(dx_ptr.dtype.element_ty), mask=mask)
    if SUMS:
        _store_sums(sums_ptr, plain, centred, part, channel, inside, channels)


@triton.jit
def _bn_dx(dz_ptr, x_ptr, factors_ptr, rows, channels, rows_each, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """dz becomes a dz + b x + c."""
    _, begin, end, channel, inside = _place(rows, channels, rows_each, CHANNELS)
    a = _of(factors_ptr, channel, inside)
    b = _of(factors_ptr + channels, channel, inside)
    c = _of(factors_ptr + 2 * channels, channel, inside)
    for start in range(begin, end, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        mask = (row < end) & inside[None, :]
        at = row * channels + channel[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dz = tl.load(dz_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dz_ptr + at, fma(a, dz, fma(b, x, c)).to(dz_ptr.dtype.element_ty), mask=mask)


def _split(rows: int, channels: int, launch: dict[str, int]) -> tuple[int, int, int]:
    """(Rows of a program, parts of the rows, programs)."""
    blocks = triton.cdiv(channels, launch["CHANNELS"])
    tiles = triton.cdiv(rows * blocks, launch["ROWS"] * PROGRAMS)
    rows_each = launch["ROWS"] * min(tiles, MOST_TILES)
    parts = triton.cdiv(rows, rows_each)
    return rows_each, parts, parts * blocks


def _partial(x, rows, channels):
    """[parts, 2, C]: the sums of x less its first row, and of their squares."""
    rows_each, parts, programs = _split(rows, channels, LAUNCH_STATS)
    partial = x.new_empty((parts, 2, channels), dtype=torch.float32)
    _bn_stats[(programs,)](x, partial, rows, channels, rows_each, enable_fp_fusion=False, **LAUNCH_STATS)
    return partial


def bn_stats(x):
    channels = x.shape[-1]
    rows = x.numel() // channels
    with device_of(x):
        partial = _partial(x, rows, channels)
    return mean_and_variance(partial, x.view(rows, channels)[0], rows)


def bn_affine(x, weight, bias, eps):
    channels = x.shape[-1]
    rows = x.numel() // channels
    outputs = [x.new_empty(channels, dtype=torch.float32) for _ in range(5)]
    with device_of(x):
        partial = _partial(x, rows, channels)
        _bn_affine[(triton.cdiv(channels, LAUNCH_SUMS["CHANNELS"]),)](
            partial, x, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(), *outputs,
            len(partial), rows, channels, single(eps), HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            enable_fp_fusion=False, **LAUNCH_SUMS,
        )  # fmt: skip
    return tuple(outputs)


def bn_factors(sums, scale, inverse, mean, count, apart):
    channels = sums.shape[1]
    factors, dweight = sums.new_empty((5 if apart else 3, channels)), torch.empty_like(scale)
    with device_of(sums):
        _bn_factors[(triton.cdiv(channels, LAUNCH_FACTORS["CHANNELS"]),)](
            sums, scale, inverse, mean, factors, dweight, channels, count, APART=apart, enable_fp_fusion=False,
            **LAUNCH_FACTORS,
        )  # fmt: skip
    return factors, dweight


def _sum_parts(partial):
    """[parts, 2, C] -> float32 [2, C]."""
    parts, _, channels = partial.shape
    total = torch.empty_like(partial[0])
    with device_of(partial):
        _bn_total[(triton.cdiv(channels, LAUNCH_SUMS["CHANNELS"]),)](
            partial, total, parts, channels, enable_fp_fusion=False, **LAUNCH_SUMS
        )
    return total


def bn_lif_fwd(x, v0, scale, shift, tau, v_threshold, v_reset, decay_input, spike_dtype):
    steps, channels = x.shape[0], x.shape[-1]
    per_row = triton.cdiv(channels, 32)
    last = per_row if spike_dtype == torch.int32 else channels
    spikes = x.new_empty((*x.shape[:-1], last), dtype=spike_dtype)
    v_last = x.new_empty(x.shape[1:] if scale is None else 0, dtype=torch.float32)  # behind a norm nobody asks for it
    if x.numel():
        rows = x.numel() // steps // channels
        tau_tensor, *numbers = neuron_numbers(tau, v_threshold, v_reset, x)
        with device_of(x):
            _bn_lif_fwd[(triton.cdiv(rows * per_row, LAUNCH_FORWARD["BLOCK"]),)](
                x, x if v0 is None else v0, x if scale is None else scale, x if shift is None else shift, spikes, v_last,
                tau_tensor, steps, rows, channels, per_row, x.stride(0), *numbers, HAS_V0=v0 is not None,
                HAS_SCALE=scale is not None, TAU_TENSOR=isinstance(tau, torch.Tensor), DECAY_INPUT=decay_input,
                SOFT_RESET=v_reset is None, EXACT=has_exact_inverse(tau), enable_fp_fusion=False, **segments(steps),
                **LAUNCH_FORWARD,
            )  # fmt: skip
    return spikes, v_last


def keeps_dz(x) -> bool:
    """Whether the backward pass of x returns dz where it gets no factors: float16 has not its range."""
    return x.shape[0] <= SEGMENT and x.dtype != torch.float16


def bn_lif_bwd(
    ds, x, scale, shift, mean, factors, sums, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha
):
    steps, channels = x.shape[0], x.shape[-1]
    if steps > SEGMENT:
        neuron = (tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha)
        return bn_lif_bwd_by(lif_bwd, ds, x, scale, shift, mean, factors, sums, *neuron)
    rows = x.numel() // steps // channels
    write = factors is not None or keeps_dz(x)
    dx = torch.empty_like(x) if write else x.new_empty(0)
    rows_each, parts, programs = _split(rows, channels, LAUNCH_BACKWARD)
    partial = x.new_empty((parts, 2, channels) if sums else 0, dtype=torch.float32)
    _, *numbers = neuron_numbers(tau, v_threshold, v_reset, x)
    with device_of(x):
        _bn_lif_bwd[(programs,)](
            ds, x, scale, shift, mean, x if factors is None else factors, dx, partial, rows, channels, rows_each,
            *numbers, single(alpha), HAS_FACTORS=factors is not None, SUMS=sums, WRITE=write, DECAY_INPUT=decay_input,
            SOFT_RESET=v_reset is None, DETACH_RESET=detach_reset, KIND=SURROGATES[surrogate].index,
            EXACT=has_exact_inverse(tau), STEPS=steps, enable_fp_fusion=False, **LAUNCH_BACKWARD,
        )  # fmt: skip
    return dx, _sum_parts(partial) if sums else partial


def bn_dx(dz, x, factors):
    """Turns dz of :func:`bn_lif_bwd` without factors into what it returns with these."""
    channels = x.shape[-1]
    rows = x.numel() // channels
    rows_each, _, programs = _split(rows, channels, LAUNCH_DX)
    with device_of(x):
        _bn_dx[(programs,)](dz, x, factors, rows, channels, rows_each, enable_fp_fusion=False, **LAUNCH_DX)
