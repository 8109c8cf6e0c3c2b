"""Products of packed spikes with the neurons behind as their epilogue, in Triton: the `triton` backend of
``ops.spike_matmul_lif`` and ``ops.spike_conv2d_lif``.

A program owns the same rows and columns of every time-step, up to STEPS of them at once in one tile: weights are read once for
all of these, membranes stay in registers, currents are stored only where they are asked for, and spikes leave at one bit each.
"""

import triton
import triton.language as tl

from spikeclip.ops._device import device_of
from spikeclip.ops._native import as_float
from spikeclip.ops.weights import tiles_are_for

from ._bits import table
from ._step import charge, has_exact_inverse, neuron_numbers, reset
from .spike_conv2d import ONE_PIXEL, check_rows, geometry, product, tile

STEPS = 8


@triton.jit
def _spike_product_lif(
    words_ptr, w_ptr, scale_ptr, bias_ptr, table_ptr, add_ptr, currents_ptr, out_ptr,
    steps, m, n, channels, per_row, out_per_row,
    height, width, out_height, out_width, kernel_width, stride_h, stride_w, pad_h, pad_w, taps,
    stride_part, stride_tap, stride_k, stride_n,
    tau, v_threshold, v_reset, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, KEEP: tl.constexpr,
    DECAY_INPUT: tl.constexpr, SOFT_RESET: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Row t ROWS + r of a tile is step t of the program's row r."""
    tiles = tl.cdiv(n, BN)
    first = tl.program_id(0) // tiles * ROWS
    start = tl.program_id(0) % tiles * BN
    columns = start + tl.arange(0, BN)
    inner = tl.arange(0, STEPS * ROWS)
    step, row = inner // ROWS, first + inner % ROWS
    rows = first + tl.arange(0, ROWS)
    mask = (rows < m)[:, None] & (columns < n)[None, :]
    word = start // 32 + tl.arange(0, BN // 32)
    word_mask = (rows < m)[:, None] & (word < out_per_row)[None, :]
    inverse = tl.div_rn(1.0, tau)
    v = tl.zeros((ROWS, BN), tl.float32) + v_reset
    inside = tl.arange(0, ROWS)[:, None] * n + columns[None, :]
    word_inside = tl.arange(0, ROWS)[:, None] * out_per_row + word[None, :]
    done = first.to(tl.int64)
    for group in range(0, steps, STEPS):
        currents = product(
            words_ptr, w_ptr, scale_ptr, bias_ptr, table_ptr, (group + step) * m + row, (group + step < steps) & (row < m),
            columns, n, channels, per_row, height, width, out_height, out_width, kernel_width, stride_h, stride_w, pad_h, pad_w,
            taps, stride_part, stride_tap, stride_k, stride_n, HAS_SCALE, HAS_BIAS, PARTS, STEPS * ROWS, BN, J,
        )  # fmt: skip
        for t in range(group, tl.minimum(group + STEPS, steps)):
            if STEPS == 1:
                x = currents
            else:
                of_step = tl.arange(0, STEPS)[:, None, None] == t - group
                x = tl.sum(tl.where(of_step, currents.reshape(STEPS, ROWS, BN), 0.0), axis=0)
            if HAS_ADD:
                x += tl.load(add_ptr + done * n + inside, mask=mask, other=0.0)
            if KEEP:
                tl.store(currents_ptr + done * n + inside, x, mask=mask)
            h = charge(v, x, tau, inverse, v_reset, DECAY_INPUT, EXACT)
            bits = (mask & (h >= v_threshold)).to(tl.int32).reshape(ROWS, BN // 32, 32) << tl.arange(0, 32)[None, None, :]
            tl.store(out_ptr + done * out_per_row + word_inside, tl.sum(bits, axis=2), mask=word_mask)
            v = reset(h, v_threshold, v_reset, SOFT_RESET)
            done += m


def launch(steps: int) -> dict[str, int]:
    """Tile and warps for so many steps."""
    together = min(triton.next_power_of_2(steps), STEPS)
    return {"STEPS": together, "ROWS": 64 // together, "BN": 32, "J": 2, "num_warps": 4, "num_stages": 3, "maxnreg": 255}


def spike_lif(words, channels, w, bias, window, pool, add, currents, tau, v_threshold, v_reset, decay_input, out):
    """As ``NativeCpu.spike_lif``, but for the pool, which must be None."""
    assert pool is None
    steps = words.shape[0]
    if window is None:
        shape, m = ONE_PIXEL, words.shape[1:-1].numel()
    else:
        shape = geometry(words.shape[2:4], w.values.shape[2:], *window)
        m = words.shape[1] * shape.out_height * shape.out_width
    check_rows(words, steps * m)
    tiles = w.tiles if tiles_are_for("triton", words.device.type) else tile(w.values)
    launched, n = launch(steps), tiles.shape[3]
    words = words.contiguous()
    scale, bias = as_float(w.scale), as_float(bias)
    _, *numbers = neuron_numbers(tau, v_threshold, v_reset, words)
    with device_of(words):
        _spike_product_lif[(triton.cdiv(m, launched["ROWS"]) * triton.cdiv(n, launched["BN"]),)](
            words, tiles, *(words if x is None else x for x in (scale, bias)), table(words.device),
            *(words if x is None else x for x in (add, currents)), out, steps, m, n, channels, words.shape[-1], out.shape[-1],
            *shape, *tiles.stride(), *numbers,
            HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, HAS_ADD=add is not None, KEEP=currents is not None,
            DECAY_INPUT=decay_input, SOFT_RESET=v_reset is None, EXACT=has_exact_inverse(tau), PARTS=tiles.shape[0],
            enable_fp_fusion=False, **launched,
        )  # fmt: skip
