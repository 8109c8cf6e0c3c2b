"""The stages of SpikeCLIP (arXiv 2310.06488): align text, align images, adapt the teacher, fine-tune with the dual loss.

The released scripts use Adam with amsgrad, a cosine from lr 5e-3 to 5e-4 and batches of 1024 (text) and 196 (images) for
alignment, and 5e-4 to 1e-5 with batches of 196 for fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, StackDataset, TensorDataset

from ..models import SpikeCLIP, Teacher
from ..zeroshot import class_vectors
from ..zeroshot.evaluate import check_labels
from .loop import History, Settings, fit
from .losses import alignment_loss, dual_loss


@torch.no_grad()
def image_features(teacher: Teacher, data: Dataset, *, batch_size: int = 250) -> Tensor:
    """The teacher's features ``[len(data), E]`` of a data set that yields (image, ...), in its order, of unit length.

    They come to the CPU. Raises ValueError when ``data`` is empty.
    """
    if len(data) == 0:
        raise ValueError("data must hold at least one sample")
    device = next(teacher.parameters()).device
    return torch.cat(
        [teacher.encode_image(batch[0].to(device), normalize=True).cpu() for batch in DataLoader(data, batch_size)]
    )


def align_text(
    model: SpikeCLIP, teacher: Teacher, sentences: Sequence[str], settings: Settings, *, log: Path | None = None, save=None
) -> History:
    """Stage 1a: train ``model.text`` so that its features of ``sentences`` point where the teacher's do (1 - cos).

    The teacher's token and position embeddings and its logit scale are copied into the student first.

    Raises:
        ValueError: no sentences, or a teacher whose embeddings do not fit.
    """
    if not sentences:
        raise ValueError("sentences must hold at least one sentence")
    model.text.load_embedding(teacher)
    model.logit_scale.data.copy_(teacher.logit_scale)
    sentences = list(sentences)
    device = next(teacher.parameters()).device
    with torch.no_grad():
        target = torch.cat(
            [
                teacher.encode_text(teacher.tokenizer(sentences[i : i + 512]).to(device), normalize=True).cpu()
                for i in range(0, len(sentences), 512)
            ]
        )
    data = TensorDataset(model.tokenizer(sentences), target)

    def loss(tower, batch):
        tokens, wanted = batch
        return alignment_loss(tower(tokens), wanted), {}

    return fit(model.text, data, loss, settings, name="text alignment", log=log, save=save)


def align_image(
    model: SpikeCLIP,
    teacher: Teacher,
    data: Dataset,
    settings: Settings,
    *,
    validate: Callable[[], float] | None = None,
    log: Path | None = None,
    save: Callable[[], None] | None = None,
) -> History:
    """Stage 1b: train ``model.visual`` so that its features of the images point where the teacher's do (1 - cos).

    ``data`` yields (image, ...); labels are not used. The teacher runs over it once, and its E features an image are kept.
    """
    paired = StackDataset(data, image_features(teacher, data))

    def loss(tower, batch):
        (images, *_), wanted = batch
        return alignment_loss(tower(images), wanted), {}

    return fit(model.visual, paired, loss, settings, name="image alignment", validate=validate, log=log, save=save)


def adapt_teacher(
    teacher: Teacher, data: Dataset, classes: Sequence[str], templates: Sequence[str], settings: Settings
) -> tuple[Teacher, History]:
    """Before stage 2: a copy of the teacher whose image tower is fine-tuned on the task with cross-entropy; (copy, history).

    Raises:
        ValueError: labels that do not index ``classes``.
    """
    adapted = teacher.image_tower_unfrozen()
    vectors, scale = class_vectors(teacher, classes, templates), teacher.logit_scale.exp()

    def loss(tower, batch):
        images, labels = batch
        check_labels(labels, len(vectors))
        features = tower((images - adapted.mean) / adapted.std)
        logits = scale * torch.nn.functional.normalize(features, dim=-1) @ vectors.T
        return torch.nn.functional.cross_entropy(logits, labels), {}

    history = fit(adapted.clip.visual, data, loss, settings, name="teacher adaptation")
    adapted.requires_grad_(False)
    return adapted.eval(), history


def check_weights(kl_weight: float, temperature: float, replay_weight: float = 0.0) -> None:
    """Raise ValueError unless these are weights and a temperature that :func:`finetune` takes."""
    for name, value in (("kl_weight", kl_weight), ("replay_weight", replay_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and >= 0; got {value}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0; got {temperature}")


def finetune(
    model: SpikeCLIP,
    teacher: Teacher | None,
    data: Dataset,
    classes: Sequence[str],
    templates: Sequence[str],
    settings: Settings,
    *,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    replay: Dataset | None = None,
    replay_weight: float = 1.0,
    validate: Callable[[], float] | None = None,
    log: Path | None = None,
    save: Callable[[], None] | None = None,
) -> History:
    """Stage 2: train ``model.visual`` on a task with CE + ``kl_weight`` * KL(teacher || student); see :func:`dual_loss`.

    Class vectors come from the student's frozen text tower, the teacher's distribution from its own towers, and both use the
    teacher's logit scale, as the released code does not. ``teacher`` None leaves cross-entropy alone.

    Args:
        data: yields (image, label), labels indexing ``classes``. templates: prompts of the class vectors.
        replay: images of the alignment stage with the features to keep, (image, feature): an alignment term on as many of
            them as there are task images in a batch, times ``replay_weight``, so that what was aligned is not forgotten. Not
            in the paper.
        validate, log, save: see :func:`fit`.

    Raises:
        ValueError: a weight outside its range, no data or replay, or labels that do not index ``classes``.
    """
    check_weights(kl_weight, temperature, replay_weight)
    if replay is not None and len(replay) == 0:
        raise ValueError("replay must hold at least one sample, or be None")
    vectors = class_vectors(model.eval(), classes, templates)
    source = model if teacher is None else teacher
    scale = source.logit_scale.exp().detach().to(vectors.device)
    teacher_logits = torch.zeros(len(data), 0)
    if teacher is not None:
        theirs = class_vectors(teacher, classes, templates).cpu()
        teacher_logits = scale.cpu() * image_features(teacher, data) @ theirs.T
    paired = StackDataset(data, teacher_logits)
    replayed = None if replay is None else _shuffled(replay, settings)

    def loss(tower, batch):
        (images, labels), wanted = batch
        check_labels(labels, len(vectors))
        kept = None if replayed is None else next(replayed)
        features = tower(images if kept is None else torch.cat([images, kept[0].to(images.device)]))
        logits = scale * torch.nn.functional.normalize(features[: len(images)], dim=-1) @ vectors.T
        total, ce, kl = dual_loss(
            logits, labels, None if teacher is None else wanted, kl_weight=kl_weight, temperature=temperature
        )
        parts = {"ce": ce.item(), "kl": kl.item()}
        if kept is not None:
            drift = alignment_loss(features[len(images) :], kept[1].to(images.device))
            total, parts["replay"] = total + replay_weight * drift, drift.item()
        return total, parts

    title = "fine-tuning, CE" if teacher is None else "fine-tuning, CE + KL"
    return fit(model.visual, paired, loss, settings, name=title, validate=validate, log=log, save=save)


def _shuffled(data: Dataset, settings: Settings):
    generator = torch.Generator().manual_seed(settings.seed + 1)
    batch_size = min(settings.batch_size, len(data))
    while True:
        yield from DataLoader(data, batch_size, shuffle=True, drop_last=True, generator=generator)
