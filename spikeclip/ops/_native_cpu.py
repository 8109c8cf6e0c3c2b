"""The C++ extension for the CPU: tensors become pointers here, and outputs are allocated here."""

from __future__ import annotations

import torch
from torch import Tensor

from ._native import DTYPE, Native, as_float, pointer
from ._side_by_side import gradients, parts
from .packed import word_count
from .reference.max_pool import pooled_size
from .spike_conv2d import out_size
from .surrogate import SURROGATES

_KIND = {torch.float32: 0, torch.float16: 0, torch.bfloat16: 0, torch.int16: 1, torch.int8: 2}  # enum WeightKind


def _one_type(x: Tensor) -> Tensor:
    """x as the kernels take it: bool and bytes become float32."""
    return x if x.dtype in DTYPE else x.to(torch.float32)


class NativeCpu(Native):
    """Every op over ``spikeclip._cpu``; signatures as in ``spikeclip.ops.reference``, with optional ready ``tiles``.

    ``spike_lif`` is this backend's and Triton's, ``spike_attention_lif``, ``dense_product`` and ``conv3x3_gradient`` are this
    one's alone: elsewhere they are composed of other ops, or PyTorch's.
    """

    def recording(self) -> Recording:
        return Recording(self._ext.Sequence(), self._context)

    def bn_stats(self, x):
        mean, var = (x.new_empty(x.shape[-1], dtype=torch.float32) for _ in range(2))
        rows = x.shape[:-1].numel()
        self._ext.bn_stats(x.data_ptr(), DTYPE[x.dtype], rows, x.shape[-1], mean.data_ptr(), var.data_ptr(), self._context(x))
        return mean, var

    def bn_lif_fwd(self, x, v0, scale, shift, tau, v_threshold, v_reset, decay_input, spike_dtype):
        steps, channels = x.shape[0], x.shape[-1]
        packed = spike_dtype == torch.int32
        spikes = x.new_empty((*x.shape[:-1], word_count(channels) if packed else channels), dtype=spike_dtype)
        v_last = x.new_empty(x.shape[1:], dtype=torch.float32)
        if v_last.numel():
            self._ext.bn_lif_fwd(
                x.data_ptr(), DTYPE[x.dtype], pointer(v0), pointer(scale), pointer(shift), spikes.data_ptr(),
                3 if packed else DTYPE[spike_dtype], v_last.data_ptr(), steps, v_last.numel() // channels, channels,
                *self._tau(tau, x), v_threshold, 0.0 if v_reset is None else v_reset, decay_input, v_reset is None,
                steps > 1 and x.stride(0) == 0, self._context(x),
            )  # fmt: skip
        return spikes, v_last

    def bn_lif_bwd(
        self, ds, x, scale, shift, mean, factors, sums, tau, v_threshold, v_reset, decay_input, detach_reset, surrogate, alpha
    ):
        steps, channels = x.shape[0], x.shape[-1]
        writes = factors is not None or self.keeps_dz(x)
        dx = torch.empty_like(x) if writes else x.new_empty(0)
        total = x.new_empty((2, channels) if sums else 0, dtype=torch.float32)
        self._ext.bn_lif_bwd(
            ds.data_ptr(), DTYPE[ds.dtype], x.data_ptr(), DTYPE[x.dtype], scale.data_ptr(), shift.data_ptr(), mean.data_ptr(),
            pointer(factors), dx.data_ptr() if writes else 0, total.data_ptr() if sums else 0, steps,
            x.numel() // steps // channels, channels, tau, v_threshold, 0.0 if v_reset is None else v_reset, decay_input,
            v_reset is None, detach_reset, SURROGATES[surrogate].index, alpha, self._context(x),
        )  # fmt: skip
        return dx, total

    def keeps_dz(self, x) -> bool:
        """As Triton's: the backward pass of x returns dz where it gets no factors; float16 has not its range."""
        return x.dtype != torch.float16

    def bn_dx(self, dz, x, factors):
        channels = x.shape[-1]
        rows = x.numel() // channels
        self._ext.bn_dx(dz.data_ptr(), x.data_ptr(), DTYPE[x.dtype], factors.data_ptr(), rows, channels, self._context(x))

    def max_pool(self, x, scale, window):
        shape = _pool_shape(x, window)
        values = x.new_empty((*x.shape[:2], *shape[4:6], x.shape[-1]))
        index = torch.empty_like(values, dtype=torch.uint8)
        self._ext.max_pool(
            x.data_ptr(), DTYPE[x.dtype], shape, scale.data_ptr(), values.data_ptr(), index.data_ptr(), self._context(x)
        )
        return values, index

    def max_pool_bwd(self, dvalues, index, x, factors, window):
        dx = torch.empty_like(x)
        self._ext.max_pool_grad(
            dvalues.data_ptr(), index.data_ptr(), x.data_ptr(), DTYPE[x.dtype], _pool_shape(x, window), pointer(factors),
            dx.data_ptr(), self._context(x),
        )  # fmt: skip
        return dx

    def pack(self, s: Tensor, check: bool) -> Tensor:
        s = _one_type(s)
        length = s.shape[-1]
        words = s.new_empty((*s.shape[:-1], word_count(length)), dtype=torch.int32)
        if s.numel():
            binary = self._ext.pack(
                s.data_ptr(), DTYPE[s.dtype], words.data_ptr(), s.numel() // length, length, self._context(s)
            )
            if check and not binary:
                raise ValueError("s must hold spikes, 0 or 1; got other values")
        return words

    def unpack(self, words: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        fused = dtype if dtype in DTYPE else torch.float32
        s = words.new_empty((*words.shape[:-1], length), dtype=fused)
        if s.numel():
            self._ext.unpack(words.data_ptr(), s.data_ptr(), DTYPE[fused], s.numel() // length, length, self._context(words))
        return s.to(dtype)

    def count(self, words: Tensor) -> int:
        return self._ext.count(words.data_ptr(), words.numel())

    def tile(self, w: Tensor) -> Tensor:
        """Weights [K, N] or [O, C, kh, kw] in the kernel's order, as bytes."""
        if not w.numel():
            return torch.empty(0, dtype=torch.uint8)
        tap = w.shape[1 if w.dim() == 4 else 0]
        if w.dim() == 4:  # [kh * kw * C, O]
            w = w.permute(2, 3, 1, 0).flatten(0, 2)
        kind = _KIND[w.dtype]
        tiles = torch.empty(self._ext.tile_bytes(kind, *w.shape, tap) + 64, dtype=torch.uint8)
        tiles = tiles[-tiles.data_ptr() % 64 :]
        self._ext.tile_weights(
            w.data_ptr(), DTYPE.get(w.dtype, 0), w.stride(), kind, *w.shape, tap, tiles.data_ptr(), self._context(w)
        )
        return tiles

    def spike_matmul(self, words, length, w, scale, bias, dtype, tiles=None):
        rows, columns = words.shape[0], w.shape[1]
        out = words.new_empty((rows, columns), dtype=dtype)
        if out.numel() and not length:
            return _bias_alone(out, bias)
        if out.numel():
            tiles = self.tile(w) if tiles is None else tiles
            scale, bias = as_float(scale), as_float(bias)
            self._ext.spike_matmul(
                words.data_ptr(), rows, _KIND[w.dtype], length, columns, tiles.data_ptr(), pointer(scale), pointer(bias),
                out.data_ptr(), DTYPE[dtype], self._context(words),
            )  # fmt: skip
        return out

    def spike_matmul_dw(self, words, length, dy):
        rows, columns = dy.shape
        dw = dy.new_zeros((length, columns), dtype=torch.float32)
        if dw.numel() and rows:
            self._ext.spike_matmul_grad(
                words.data_ptr(), rows, length, columns, dy.data_ptr(), DTYPE[dy.dtype], dw.data_ptr(), self._context(words)
            )
        return dw

    def spike_conv2d(self, words, channels, w, scale, bias, stride, padding, dtype, tiles=None):
        shape = _conv2d_shape(words, w.shape[2:], stride, padding)
        batch, out_height, out_width = shape[0], shape[3], shape[4]
        out = words.new_empty((batch, out_height, out_width, w.shape[0]), dtype=dtype)
        if not words.numel():
            _bias_alone(out, bias)
        elif out.numel():
            tiles = self.tile(w) if tiles is None else tiles
            scale, bias = as_float(scale), as_float(bias)
            self._ext.spike_conv2d(
                words.data_ptr(), shape, _KIND[w.dtype], channels, w.shape[0], tiles.data_ptr(), pointer(scale), pointer(bias),
                out.data_ptr(), DTYPE[dtype], self._context(words),
            )  # fmt: skip
        return out.permute(0, 3, 1, 2)

    def spike_conv2d_dw(self, words, channels, dy, kernel, stride, padding):
        columns = dy.shape[1]
        dy = dy.permute(0, 2, 3, 1).contiguous()
        dw = dy.new_zeros((*kernel, channels, columns), dtype=torch.float32)
        if dw.numel() and dy.numel():
            shape = _conv2d_shape(words, kernel, stride, padding)
            self._ext.spike_conv2d_grad(
                words.data_ptr(), shape, channels, columns, dy.data_ptr(), DTYPE[dy.dtype], dw.data_ptr(), self._context(words)
            )
        return dw.permute(3, 2, 0, 1).contiguous()

    def dense_product(self, x, w, dtype):
        """As ``dense_product`` in ``_dense``: multiplied in float32, without copies of x and of the answer in it."""
        x, w = x.contiguous(), w.to(torch.float32).contiguous()
        rows, (depth, columns) = x.shape[:-1].numel(), w.shape
        fused = dtype if dtype in DTYPE else torch.float32
        y = x.new_empty((*x.shape[:-1], columns), dtype=fused)
        if y.numel() and not depth:
            return y.zero_().to(dtype)
        if y.numel():
            self._ext.dense_product(
                x.data_ptr(), DTYPE[x.dtype], rows, depth, w.data_ptr(), columns, y.data_ptr(), DTYPE[fused], self._context(x)
            )
        return y.to(dtype)

    def isa(self) -> str:
        """The instruction set that the kernels run on."""
        return self._ext.isa()

    def conv3x3_gradient(self, w, dy, size, padding):
        """As ``conv2d_input_gradient`` in ``_dense``, for 3x3 windows of stride 1, padding at most 2; made in float32."""
        w = w.to(torch.float32).contiguous(memory_format=torch.channels_last)
        dy = dy.contiguous(memory_format=torch.channels_last)
        columns, channels = w.shape[:2]
        dx = dy.new_empty((dy.shape[0], *size, channels))
        shape = _conv2d_shape(dx, (3, 3), (1, 1), padding)
        self._ext.winograd_gradient(
            dy.data_ptr(), DTYPE[dy.dtype], shape, channels, columns, w.data_ptr(), dx.data_ptr(), self._context(dy)
        )
        return dx.permute(0, 3, 1, 2)

    def spike_lif(self, words, channels, w, bias, window, pool, add, currents, tau, v_threshold, v_reset, decay_input, out):
        """Into ``out``, the words of the neurons behind a product, or with ``window``, (stride, padding), a convolution."""
        steps, columns = words.shape[0], w.shape[1 if window is None else 0]
        if window is None:
            shape = [words.shape[1:-1].numel(), *[1] * 8, 0, 0]
        else:
            shape = _conv2d_shape(words[0], w.shape[2:], *window)
        pooled = tuple(shape[3:5]) if pool is None else pooled_size(tuple(shape[3:5]), pool)
        scale, bias = as_float(w.scale), as_float(bias)
        self._ext.spike_lif(
            words.data_ptr(), steps, shape, window is not None, channels, _KIND[w.values.dtype], columns, w.tiles.data_ptr(),
            pointer(scale), pointer(bias), [*(pool or (0, 1, 0)), *pooled], pointer(add), pointer(currents), out.data_ptr(),
            tau, v_threshold, 0.0 if v_reset is None else v_reset, decay_input, v_reset is None, self._context(words),
        )  # fmt: skip

    def spike_attention(self, q, k, v, channels, num_heads, scale, dtype):
        out = q.new_empty((*q.shape[:2], channels), dtype=dtype)
        if out.numel() and k is not None and not k.numel():
            return out.zero_()
        if out.numel():
            three = _qkv(q, k, v, channels, num_heads)
            self._ext.spike_attention(*three, scale, out.data_ptr(), DTYPE[dtype], self._context(q))
        return out

    def spike_attention_lif(self, q, k, v, channels, num_heads, scale, tau, v_threshold, v_reset, decay_input):
        """Words [T, B, N, W] of the neurons behind attention, for heads of 16, 32, 48 or 64 channels."""
        words = q.new_empty((*q.shape[:-1], word_count(channels)))
        self._ext.spike_attention_lif(
            *_qkv(q, k, v, channels, num_heads), scale, q.shape[0], words.data_ptr(), tau, v_threshold,
            0.0 if v_reset is None else v_reset, decay_input, v_reset is None, self._context(q),
        )  # fmt: skip
        return words

    def spike_attention_bwd(self, dy, q, k, v, channels, num_heads, scale):
        found, (dq, dk, dv) = gradients(dy, q, k, v, channels)
        if not (dq.numel() and dk.numel()):
            return [g.zero_() for g in found]
        self._ext.spike_attention_grad(
            *_qkv(q, k, v, channels, num_heads), scale, dy.data_ptr(), DTYPE[dy.dtype],
            [dq.data_ptr(), dk.data_ptr(), dv.data_ptr()], self._context(q),
        )  # fmt: skip
        return found


class Recording(NativeCpu):
    """``bn_lif_fwd``, ``spike_lif``, ``spike_attention_lif`` whose calls are kept, with pointers to the caller's tensors."""

    def run(self) -> None:
        self._ext.run(torch.get_num_threads())

    def mean(self, x: Tensor, weights: Tensor, out: Tensor) -> None:
        self._ext.mean(x.data_ptr(), weights.data_ptr(), x.shape, out.data_ptr())


def _pool_shape(x: Tensor, window: tuple[int, int, int]) -> list[int]:
    """As ``struct PoolShape`` in csrc/cpu/max_pool.h has it, for x [T, B, H, W, C]."""
    steps, batch, height, width, channels = x.shape
    return [steps * batch, height, width, channels, *pooled_size((height, width), window), *window]


def _qkv(q: Tensor, k: Tensor | None, v: Tensor | None, channels: int, num_heads: int) -> tuple[list[int], list[int], bool]:
    """Pointers to words, an AttentionShape of csrc/bindings_cpu.cpp, and whether all three are side by side in q."""
    words = [part for part, _ in parts(q, k, v, channels)]
    tokens = [part.shape[-2] for part in words[:2]]
    return [part.data_ptr() for part in words], [q.shape[:-2].numel(), *tokens, channels, num_heads], k is None


def _bias_alone(out: Tensor, bias: Tensor | None) -> Tensor:
    """What a product without inputs comes to."""
    return out.zero_() if bias is None else out.copy_(bias)


def _conv2d_shape(words: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> list[int]:
    """As ``struct Conv2d`` in csrc/cpu/spike_conv2d.h has it, for words [B, H, W, words] or an image [B, H, W, C]."""
    size = tuple(words.shape[1:3])
    return [words.shape[0], *size, *out_size(size, kernel, stride, padding), *kernel, *stride, *padding]
