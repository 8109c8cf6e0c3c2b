"""Class vectors from prompts, and answers from them (Radford et al. 2021, arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEFAULT_TEMPLATES = ("a photo of a {}.",)


@torch.no_grad()
def class_vectors(model, classes: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
    """One unit vector per class, ``[len(classes), embed_dim]``: its prompts' features averaged and normalised again.

    Args:
        model: a SpikeCLIP, a Teacher, or anything with ``encode_text(tokens, normalize=True)`` and a ``tokenizer``.
        classes: distinct names. templates: prompts in which every ``{}`` becomes the name.

    Raises:
        ValueError: no classes or templates, one string in place of a list, names that are empty or repeat, or a template
            without ``{}``.
    """
    for name, given in (("classes", classes), ("templates", templates)):
        if isinstance(given, str):
            raise ValueError(f"{name} must be a list of strings, not a string; got {given!r}")
    if not classes:
        raise ValueError("classes must name at least one class")
    if not all(map(str.strip, classes)) or len(set(classes)) < len(classes):
        raise ValueError(f"classes must be distinct names, none empty; got {list(classes)}")
    if not templates or any("{}" not in t for t in templates):
        raise ValueError(f"templates must each hold a {{}} for the class name; got {list(templates)}")
    prompts = [template.replace("{}", name) for name in classes for template in templates]
    device = next(model.parameters()).device
    features = torch.cat(
        [
            model.encode_text(model.tokenizer(prompts[i : i + 512]).to(device), normalize=True)
            for i in range(0, len(prompts), 512)
        ]
    )
    return F.normalize(features.unflatten(0, (len(classes), len(templates))).mean(1), dim=-1)


@torch.no_grad()
def classify(model, images: Tensor, vectors: Tensor) -> Tensor:
    """Probabilities ``[B, classes]`` of images ``[B, 3, H, W]``: softmax of the model's scaled cosines to ``vectors``."""
    device = next(model.parameters()).device
    cosines = model.encode_image(images.to(device), normalize=True) @ vectors.to(device).T
    return (model.logit_scale.exp() * cosines).softmax(-1)


class ZeroShotClassifier(nn.Module):
    """A model and the classes it chooses between: images ``[B, 3, H, W]`` to probabilities ``[B, classes]``.

    The text tower runs once, here; the class vectors are kept and move with the module.

    Args:
        model, classes, templates: as for :func:`class_vectors`, whose errors are raised.
    """

    def __init__(self, model: nn.Module, classes: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES):
        super().__init__()
        self.model, self.classes = model, tuple(classes)
        self.register_buffer("vectors", class_vectors(model, classes, templates))

    def forward(self, images: Tensor) -> Tensor:
        return classify(self.model, images, self.vectors)
