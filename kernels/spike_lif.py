"""Products of packed spikes with the neurons behind as their epilogue, in Triton: the `triton` backend of
``ops.spike_matmul_lif`` and ``ops.spike_conv2d_lif``.

A program owns the same rows and columns of every time-step: membranes stay in registers, currents are stored only where they
are asked for, and spikes leave at one bit each.
"""

import torch
import triton
import triton.language as tl

from ._step import charge, neuron_numbers, reset
from .spike_conv2d import COMPUTE, ONE_PIXEL, check_rows, geometry, product


@triton.jit
def _fwd(
    words_ptr, w_ptr, scale_ptr, bias_ptr, add_ptr, currents_ptr, out_ptr, steps, m, n, channels, per_row, pixels, out_per_row,
    height, width, out_height, out_width, kernel_width, stride_h, stride_w, pad_h, pad_w, taps, stride_tap, stride_k, stride_n,
    tau, v_threshold, v_reset, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, KEEP: tl.constexpr,
    DECAY_INPUT: tl.constexpr, SOFT_RESET: tl.constexpr, COMPUTE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(n, BN)
    rows = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    start = tl.program_id(0) % tiles * BN
    columns = start + tl.arange(0, BN)
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    word = start // 32 + tl.arange(0, BN // 32)
    word_mask = (rows < m)[:, None] & (word < out_per_row)[None, :]
    w_ptr += start.to(tl.int64) * stride_n
    inverse = tl.div_rn(1.0, tau)
    v = tl.zeros((BM, BN), tl.float32) + v_reset
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    word_at = rows.to(tl.int64)[:, None] * out_per_row + word[None, :]
    for _ in range(steps):
        x = product(
            words_ptr, w_ptr, scale_ptr, bias_ptr, rows, m, columns, n, channels, per_row, height, width, out_height, out_width,
            kernel_width, stride_h, stride_w, pad_h, pad_w, taps, stride_tap, stride_k, stride_n,
            HAS_SCALE, HAS_BIAS, COMPUTE, BM, BN, BK,
        )  # fmt: skip
        if HAS_ADD:
            x += tl.load(add_ptr + at, mask=mask, other=0.0)
        if KEEP:
            tl.store(currents_ptr + at, x, mask=mask)
        h = charge(v, x, tau, inverse, v_reset, DECAY_INPUT)
        bits = (mask & (h >= v_threshold)).to(tl.int32).reshape(BM, BN // 32, 32) << tl.arange(0, 32)[None, None, :]
        tl.store(out_ptr + word_at, tl.sum(bits, axis=2), mask=word_mask)
        v = reset(h, v_threshold, v_reset, SOFT_RESET)
        words_ptr += tl.cast(pixels, tl.int64) * per_row
        at += tl.cast(m, tl.int64) * n
        word_at += tl.cast(m, tl.int64) * out_per_row


def launch(dtype: torch.dtype, m: int, n: int) -> dict[str, int]:
    """Tile and warps for m rows of a step and n columns: smaller than a product's alone, as a membrane lies beside each sum."""
    if m <= 16:
        tile = {"BM": 16, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 1}
    elif COMPUTE[dtype] == tl.float32:
        tile = {"BM": 64, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 1}
    else:
        tile = {"BM": 64, "BN": 32 if n <= 32 else 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    return {**tile, "maxnreg": 255}  # unbound, the assembler spills to make do with fewer


def spike_lif(words, channels, w, bias, window, pool, add, currents, tau, v_threshold, v_reset, decay_input, out):
    """As ``NativeCpu.spike_lif``, but for the pool, which must be None."""
    assert pool is None
    values, batch = w.values, words.shape[1:-1].numel()
    if window is None:
        shape, m, n, strides = ONE_PIXEL, batch, values.shape[1], (0, *values.stride())
    else:
        shape, n = geometry(words.shape[2:4], values.shape[2:], *window), values.shape[0]
        m = words.shape[1] * shape.out_height * shape.out_width
        values, strides = values.permute(2, 3, 1, 0).contiguous(), (channels * n, n, 1)
    check_rows(words, m)
    tile = launch(values.dtype, m, n)
    words = words.contiguous()
    scale, bias = (x if x is None else x.to(torch.float32).contiguous() for x in (w.scale, bias))
    _, *numbers = neuron_numbers(tau, v_threshold, v_reset, words)
    with torch.cuda.device(words.device if words.is_cuda else -1):
        _fwd[(triton.cdiv(m, tile["BM"]) * triton.cdiv(n, tile["BN"]),)](
            words, values, *(words if x is None else x for x in (scale, bias, add, currents)), out, words.shape[0], m, n,
            channels, words.shape[-1], batch, out.shape[-1], *shape, *strides, *numbers,
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, HAS_ADD=add is not None, KEEP=currents is not None,
            DECAY_INPUT=decay_input, SOFT_RESET=v_reset is None, COMPUTE=COMPUTE[values.dtype],
            enable_fp_fusion=False, **tile,
        )  # fmt: skip
