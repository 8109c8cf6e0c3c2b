"""The two losses of SpikeCLIP (arXiv 2310.06488): alignment, and cross-entropy with distillation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def alignment_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of 1 - cos between features ``[B, E]`` of student and teacher: a scalar in [0, 2].

    Raises:
        ValueError: shapes that differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"teacher must have student's shape, {list(student.shape)}; got {list(teacher.shape)}")
    return (1.0 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def dual_loss(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, *, kl_weight: float = 1.0, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """CE + ``kl_weight`` * KL(teacher || student), both means over the batch.

    The paper sums the two with weight 1 and temperature 1. Its released code sums KL over the batch while it averages CE, so
    that their balance follows the batch size, and has no logit scale; here logits come scaled by the teacher's.

    Args:
        logits, teacher_logits: ``[B, K]``, scaled cosines of student and teacher; without a teacher CE stands alone.
        labels: ``[B]``. temperature: softens both distributions; KL is multiplied by its square (Hinton et al. 2015).

    Returns:
        (loss, CE, KL), scalars.

    Raises:
        ValueError: shapes other than the above.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits and labels must be [B, K] and [B]; got {list(logits.shape)} and {list(labels.shape)}")
    if teacher_logits is not None and teacher_logits.shape != logits.shape:
        raise ValueError(f"teacher_logits must have logits' shape, {list(logits.shape)}; got {list(teacher_logits.shape)}")
    ce = F.cross_entropy(logits, labels)
    if teacher_logits is None:
        return ce, ce.detach(), ce.new_zeros(())
    kl = F.kl_div(
        F.log_softmax(logits / temperature, dim=-1),
        F.log_softmax(teacher_logits / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    kl = kl * temperature**2
    return ce + kl_weight * kl, ce.detach(), kl.detach()
