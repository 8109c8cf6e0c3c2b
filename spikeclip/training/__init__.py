"""Train SpikeCLIP: data, losses, one loop, and the stages of the paper."""

from .loop import History, Settings, fit
from .losses import alignment_loss, dual_loss
from .recipe import adapt_teacher, align_image, align_text, finetune

__all__ = [
    "History",
    "Settings",
    "adapt_teacher",
    "align_image",
    "align_text",
    "alignment_loss",
    "dual_loss",
    "finetune",
    "fit",
]
