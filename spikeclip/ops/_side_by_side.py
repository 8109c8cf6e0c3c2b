"""q, k and v of attention in three tensors or in one, side by side in its last dimension: k and v are None then."""

from __future__ import annotations

from torch import Tensor


def parts(q: Tensor, k: Tensor | None, v: Tensor | None, channels: int) -> list[tuple[Tensor, int]]:
    """The words of q, of k and of v, and where in a row their bits begin."""
    if k is None:
        return [(q, 0), (q, channels), (q, 2 * channels)]
    return [(q, 0), (k, 0), (v, 0)]


def gradients(
    dy: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, channels: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor]]:
    """Empty gradients in ``dy``'s dtype, three [L, rows, channels] or one [L, rows, 3 channels], and those of q, k, v."""
    if k is None:
        whole = dy.new_empty((*q.shape[:2], 3 * channels))
        return (whole,), whole.chunk(3, -1)
    three = tuple(dy.new_empty((*words.shape[:2], channels)) for words in (q, k, v))
    return three, three
