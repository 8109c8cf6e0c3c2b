"""The rules for comparing: spikes exactly outside the rounding band, errors against those of plain torch in the same dtype."""

import torch
from torch import Tensor


def assert_spikes(got: Tensor, want: Tensor, distance: Tensor, band: float) -> None:
    """``got`` equals ``want`` wherever ``distance`` (of the membrane to the threshold) exceeds ``band``; few lie inside it."""
    assert set(got.unique().tolist()) <= {0.0, 1.0}
    wrong = (got.double() != want.double()) & (distance.abs() > band)
    assert not bool(wrong.any()), f"{int(wrong.sum())} spikes differ outside the band"


def assert_error_bounded(got: Tensor, reference: Tensor, oracle: Tensor, *, factor: float = 2.0, floor: float) -> None:
    """max|got - oracle| <= factor * max|reference - oracle| + floor * max|oracle|; NaN never passes."""
    error = (got.double() - oracle).abs().max().item() if got.numel() else 0.0
    allowed = (reference.double() - oracle).abs().max().item() if got.numel() else 0.0
    scale = oracle.abs().max().item() if got.numel() else 0.0
    assert torch.isfinite(got).all()
    assert error <= factor * allowed + floor * scale, f"error {error:.3e}, plain torch {allowed:.3e}, scale {scale:.3e}"
