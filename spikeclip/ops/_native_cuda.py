"""The CUDA extension: tensors become pointers here, and outputs are allocated here."""

from __future__ import annotations

import torch
from torch import Tensor

from ._device import device_of
from ._native import DTYPE, Native, as_float, pointer
from ._side_by_side import gradients, parts
from ._sums import mean_and_variance, total
from .packed import word_count
from .reference.bn_lif import bn_lif_bwd_by
from .reference.max_pool import max_pool, max_pool_bwd
from .reference.pack import count
from .surrogate import SURROGATES

_SPIKES = {**DTYPE, torch.bool: 3, torch.uint8: 3}  # enum SpikeDtype in csrc/cuda/pack.cuh
_WEIGHTS = {**DTYPE, torch.int16: 3, torch.int8: 4}  # enum WeightDtype in csrc/cuda/spike_conv2d.cuh
_ONE_PIXEL = (1, 1, 1, 1, 1, 1, 1, 0, 0, 1)
_MOST_ROWS = 2**31 - 2**16
_RECOMPUTED = 8  # steps whose membranes csrc/cuda/bn_lif.cu holds in registers
_FUSED_ROWS = 256  # above it, k^T v is made once and not anew for every 64 rows of q


def _shape(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[int, ...]:
    """The fields of struct ConvShape in csrc/cuda/spike_conv2d.cuh."""
    out = [(size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in range(2)]
    return (*size, *out, kernel[1], *stride, *padding, kernel[0] * kernel[1])


class NativeCuda(Native):
    """Every op over ``spikeclip._cuda``; signatures as in ``spikeclip.ops.reference``."""

    count = staticmethod(count)
    max_pool = staticmethod(max_pool)
    max_pool_bwd = staticmethod(max_pool_bwd)

    def lif_fwd(self, x, *args):
        with device_of(x):
            return super().lif_fwd(x, *args)

    def lif_bwd(self, ds, dv_last, x, *args):
        with device_of(x):
            return super().lif_bwd(ds, dv_last, x, *args)

    def bn_stats(self, x):
        channels = x.shape[-1]
        rows = x.numel() // channels
        parts = self._ext.bn_parts(rows, channels)
        partial = x.new_empty((parts, 2, channels), dtype=torch.float32)
        with device_of(x):
            self._ext.bn_sums(x.data_ptr(), DTYPE[x.dtype], partial.data_ptr(), rows, channels, parts, self._context(x))
        return mean_and_variance(partial, x.view(rows, channels)[0], rows)

    def bn_lif_fwd(self, x, v0, scale, shift, tau, v_threshold, v_reset, decay_input, spike_dtype):
        steps, channels = x.shape[0], x.shape[-1]
        packed = spike_dtype == torch.int32
        spikes = x.new_empty((*x.shape[:-1], word_count(channels) if packed else channels), dtype=spike_dtype)
        v_last = x.new_empty(x.shape[1:], dtype=torch.float32)
        if v_last.numel():
            with device_of(x):
                self._ext.bn_lif_fwd(
                    x.data_ptr(), DTYPE[x.dtype], pointer(v0), pointer(scale), pointer(shift), spikes.data_ptr(),
                    3 if packed else DTYPE[spike_dtype], v_last.data_ptr(), steps, v_last.numel() // channels, channels,
                    *self._tau(tau, x), v_threshold, 0.0 if v_reset is None else v_reset, decay_input, v_reset is None,
                    self._context(x),
                )  # fmt: skip
        return spikes, v_last

    def bn_lif_bwd(
        self, ds, x, scale, shift, mean, factors, sums, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha
    ):
        steps, channels = x.shape[0], x.shape[-1]
        if steps > _RECOMPUTED:
            neuron = (tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha)
            return bn_lif_bwd_by(self.lif_bwd, ds, x, scale, shift, mean, factors, sums, *neuron)
        rows = x.numel() // steps // channels
        parts = self._ext.bn_parts(rows, channels)
        dx = x.new_empty(0) if factors is None else torch.empty_like(x)
        partial = x.new_empty((parts, 2, channels) if sums else 0, dtype=torch.float32)
        with device_of(x):
            self._ext.bn_lif_bwd(
                ds.data_ptr(), DTYPE[ds.dtype], x.data_ptr(), DTYPE[x.dtype], scale.data_ptr(), shift.data_ptr(),
                mean.data_ptr(), pointer(factors), dx.data_ptr(), partial.data_ptr() if sums else 0, steps, rows, channels,
                parts, tau, v_threshold, 0.0 if v_reset is None else v_reset, decay_input, v_reset is None, detach_reset,
                SURROGATES[surrogate].index, alpha, self._context(x),
            )  # fmt: skip
        return dx, total(partial) if sums else partial

    def pack(self, s: Tensor, check: bool) -> Tensor:
        s = s.contiguous() if s.dtype in _SPIKES else s.to(torch.float32).contiguous()
        length = s.shape[-1]
        words = s.new_empty((*s.shape[:-1], (length + 31) // 32), dtype=torch.int32)
        flag = s.new_zeros(1, dtype=torch.int32) if check else None
        if s.numel():
            with device_of(s):
                self._ext.pack(
                    s.data_ptr(), _SPIKES[s.dtype], words.data_ptr(), s.numel() // length, length, pointer(flag),
                    self._context(s),
                )  # fmt: skip
            if check and flag.item():
                raise ValueError("s must hold spikes, 0 or 1; got other values")
        return words

    def unpack(self, words: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        words = words.contiguous()
        known = dtype if dtype in _SPIKES else torch.float32
        s = words.new_empty((*words.shape[:-1], length), dtype=known)
        if s.numel():
            with device_of(words):
                self._ext.unpack(
                    words.data_ptr(), s.data_ptr(), _SPIKES[known], s.numel() // length, length, self._context(words)
                )
        return s.to(dtype)

    def spike_matmul(self, words, length, w, scale, bias, dtype):
        return self._product(words, _ONE_PIXEL, words.shape[0], length, w, (0, *w.stride()), w.shape[1], scale, bias, dtype)

    def spike_matmul_dw(self, words, length, dy):
        m, n = dy.shape
        return self._gradient(words, _ONE_PIXEL, m, length, dy, (dy.stride(0), 0, 0, dy.stride(1)), n)[0]

    def spike_conv2d(self, words, channels, w, scale, bias, stride, padding, dtype):
        shape = _shape(words.shape[1:3], w.shape[2:], stride, padding)
        batch, n, out = words.shape[0], w.shape[0], shape[2:4]
        w = w.permute(2, 3, 1, 0).contiguous()  # so that a tile of it is read in whole lines
        y = self._product(words, shape, batch * out[0] * out[1], channels, w, (channels * n, n, 1), n, scale, bias, dtype)
        return y.view(batch, *out, n).permute(0, 3, 1, 2)

    def spike_conv2d_dw(self, words, channels, dy, kernel, stride, padding):
        batch, n, *size = dy.shape
        image, column, line, pixel = dy.stride()
        shape = _shape(words.shape[1:3], kernel, stride, padding)
        dw = self._gradient(words, shape, batch * size[0] * size[1], channels, dy, (image, line, pixel, column), n)
        return dw.view(*kernel, channels, n).permute(3, 2, 0, 1).contiguous()

    def _product(self, words, shape, m, channels, w, strides, n, scale, bias, dtype) -> Tensor:
        """y [m, n]; w by its strides of tap, channel and column."""
        words, scale, bias = words.contiguous(), as_float(scale), as_float(bias)
        _check_rows(words, m)
        y = words.new_empty((m, n), dtype=dtype)
        if y.numel():
            with device_of(words):
                self._ext.spike_product(
                    words.data_ptr(), shape, m, n, channels, w.data_ptr(), _WEIGHTS[w.dtype], strides, pointer(scale),
                    pointer(bias), y.data_ptr(), DTYPE[dtype], self._context(words),
                )  # fmt: skip
        return y

    def _gradient(self, words, shape, m, channels, dy, strides, n) -> Tensor:
        """float32 [taps, channels, n]; dy by its strides of image, line, pixel and column."""
        words, taps = words.contiguous(), shape[-1]
        _check_rows(words, m)
        if not (m and n and channels):
            return dy.new_zeros((taps, channels, n), dtype=torch.float32)
        splits = self._ext.gradient_splits(m, n, channels, taps)
        dw = dy.new_empty((splits, taps, channels, n), dtype=torch.float32)
        with device_of(words):
            self._ext.spike_gradient(
                words.data_ptr(), shape, m, n, channels, dy.data_ptr(), DTYPE[dy.dtype], strides, dw.data_ptr(), splits,
                self._context(words),
            )  # fmt: skip
        return dw[0] if splits == 1 else dw.sum(0)

    def spike_attention(self, q, k, v, channels, num_heads, scale, dtype):
        q, k, v = parts(q, k, v, channels)
        (sequences, n), s, width = q[0].shape[:2], k[0].shape[1], channels // num_heads
        y = q[0].new_empty((sequences, n, channels), dtype=dtype)
        if n > _FUSED_ROWS and s >= width:
            return self._apply(q, self._gram(k, v, num_heads, width), False, scale, y)
        if y.numel():
            with device_of(y):
                self._ext.spike_attention(
                    sequences, num_heads, width, n, s, *map(_spike_rows, (q, k, v)), y.data_ptr(), DTYPE[dtype], scale,
                    self._context(y),
                )  # fmt: skip
        return y

    def spike_attention_bwd(self, dy, q, k, v, channels, num_heads, scale):
        found, (dq, dk, dv) = gradients(dy, q, k, v, channels)
        q, k, v = parts(q, k, v, channels)
        if not (dq.numel() and dk.numel()):
            return [g.zero_() for g in found]
        width = channels // num_heads
        kv, q_dy = self._gram(k, v, num_heads, width), self._gram(q, dy, num_heads, width)
        self._apply(dy, kv, True, scale, dq)
        self._apply(v, q_dy, True, scale, dk)
        self._apply(k, q_dy, False, scale, dv)
        return found

    def _gram(self, a: tuple[Tensor, int], b: tuple[Tensor, int] | Tensor, num_heads: int, width: int) -> Tensor:
        """a^T b of every head, float32 [L, heads, width, width]: a packed [L, R, W], b like it or dense [L, R, channels]."""
        words = a[0]
        gram = words.new_empty((words.shape[0], num_heads, width, width), dtype=torch.float32)
        if gram.numel():
            with device_of(words):
                self._ext.head_gram(
                    words.shape[0], num_heads, width, words.shape[1], _spike_rows(a), *_rows(b), gram.data_ptr(),
                    self._context(words),
                )  # fmt: skip
        return gram

    def _apply(self, a: tuple[Tensor, int] | Tensor, gram: Tensor, transposed: bool, scale: float, y: Tensor) -> Tensor:
        """y [L, R, channels] = a gram * scale, or a gram^T * scale, of every head: a packed or dense. Returns y."""
        sequences, num_heads, width = gram.shape[:3]
        if y.numel():
            with device_of(y):
                self._ext.head_apply(
                    sequences, num_heads, width, y.shape[1], *_rows(a), gram.data_ptr(), transposed, y.data_ptr(), y.stride(1),
                    DTYPE[y.dtype], scale, self._context(y),
                )  # fmt: skip
        return y


def _spike_rows(part: tuple[Tensor, int]) -> tuple[int, int, int]:
    """The fields of struct Spikes in csrc/cuda/spike_attention.cuh."""
    words, first = part
    return words.data_ptr(), words.shape[-1], first


def _rows(x: tuple[Tensor, int] | Tensor) -> tuple[tuple[int, int, int], int, int]:
    """Spikes, dense values and their dtype, of which x is one."""
    return ((0, 0, 0), x.data_ptr(), DTYPE[x.dtype]) if isinstance(x, Tensor) else (_spike_rows(x), 0, 0)


def _check_rows(words: Tensor, m: int) -> None:
    most = max(m, words.shape[:-1].numel())
    if most >= _MOST_ROWS:
        raise ValueError(f"at most 2^31 - 2^16 rows of spikes in one product; got {most}")
