"""Top-1, top-5 and per-class accuracy of a model on labelled images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class Accuracy:
    """Fractions of images answered right: ``top1``, ``top5`` and ``per_class`` (NaN for a class without images)."""

    top1: float
    top5: float
    per_class: tuple[float, ...]
    images: int


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless every label is the index of one of so many classes."""
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, one vector each; got {int(labels.min())}..{int(labels.max())}")


@torch.no_grad()
def evaluate(model, data: Dataset, vectors: Tensor, *, batch_size: int = 250) -> Accuracy:
    """Accuracy over all candidates of ``vectors`` ``[K, embed_dim]`` on ``data``, which yields (image, label).

    Runs the model in eval mode and leaves it as it was. Raises ValueError when ``data`` is empty or a label has no vector.
    """
    if len(data) == 0:
        raise ValueError("data must hold at least one image")
    device = next(model.parameters()).device
    vectors = vectors.to(device)
    was_training = model.training
    model.eval()
    right, labels = [], []
    top = min(5, len(vectors))
    for images, y in DataLoader(data, batch_size):
        check_labels(y, len(vectors))
        scores = model.encode_image(images.to(device), normalize=True) @ vectors.T
        right.append(scores.topk(top).indices.cpu() == y[:, None])
        labels.append(y)
    model.train(was_training)
    right, labels = torch.cat(right), torch.cat(labels)
    first = right[:, 0].double()
    sums = torch.zeros(len(vectors), dtype=torch.float64).index_add_(0, labels, first)
    per_class = sums / torch.bincount(labels, minlength=len(vectors))
    return Accuracy(first.mean().item(), right.any(1).double().mean().item(), tuple(per_class.tolist()), len(labels))
