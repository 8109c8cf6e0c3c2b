"""Labelled image sets by name: the embedded compositions, torchvision's, and a folder of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from . import compositions

SPLITS = ("train", "val", "test")
VAL_FRACTION = 0.1


@dataclass
class ImageTextData(Dataset):
    """Pairs (image float32 [3, H, W] in [0, 1], label), with the names and prompts that zero-shot needs.

    Attributes:
        images: anything indexable that yields (image, label). classes: names, by label. templates: prompts with one ``{}``.
    """

    images: Dataset
    classes: tuple[str, ...]
    templates: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index]


class Rendered(Dataset):
    """Pictures of :mod:`compositions` in memory, 8 bits a value, yielding (image, label).

    ``labels`` index all of ``compositions.LABELS``, or ``classes`` alone with ``relabel``.
    """

    def __init__(
        self,
        n: int,
        *,
        seed: int,
        classes: tuple[int, ...] = compositions.SEEN,
        style: str = "photo",
        relabel: bool = False,
    ):
        drawn = compositions.render(n, seed=seed, classes=classes, style=style)
        self.pixels = (drawn.images * 255).round().to(torch.uint8)
        self.labels = drawn.labels
        if relabel:
            self.labels = torch.searchsorted(torch.tensor(classes), self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index].float() / 255, int(self.labels[index])


# name -> (style, classes), and how many pictures and which seed each split has.
_COMPOSED = {
    "compositions": ("photo", compositions.SEEN),
    "compositions-unseen": ("photo", compositions.UNSEEN),
    "compositions-sketch": ("sketch", compositions.SEEN),
    "compositions-sketch-unseen": ("sketch", compositions.UNSEEN),
}
_SIZES = {"train": (32_000, 1_000), "val": (1_000, 2_000), "test": (2_000, 3_000)}
_TORCHVISION = {
    "cifar10": ("CIFAR10", lambda s: {"train": s != "test"}, ("a photo of a {}.", "a blurry photo of a {}.")),
    "cifar100": ("CIFAR100", lambda s: {"train": s != "test"}, ("a photo of a {}.", "a blurry photo of a {}.")),
    "flowers102": ("Flowers102", lambda s: {"split": s}, ("a photo of a {}, a type of flower.",)),
    "caltech101": ("Caltech101", lambda s: {}, ("a photo of a {}.",)),
    "pets": ("OxfordIIITPet", lambda s: {"split": "test" if s == "test" else "trainval"}, ("a photo of a {}, a type of pet.",)),
    "stl10": ("STL10", lambda s: {"split": "test" if s == "test" else "train"}, ("a photo of a {}.",)),
}
# Sets whose own test or validation split is used as it is; Caltech101 has neither, so both are cut by seed.
_OWN_VAL = {"flowers102"}
_NO_TEST = {"caltech101", "folder"}

DATASETS = (*_COMPOSED, *_TORCHVISION, "folder")


def load(
    name: str,
    root: str | Path | None = None,
    *,
    split: str = "train",
    image_size: int = 32,
    n: int | None = None,
    seed: int = 0,
) -> ImageTextData:
    """An image set by name.

    Args:
        name: one of ``DATASETS``; train and val of the compositions name and label the seen pairs alone, test all pairs.
        root: folder with torchvision's files, or, for ``folder``, one subfolder per class.
        split: train, val or test. val is cut off train by ``seed`` where a set has none; never off test.
        image_size: images are resized to this and cropped to a square. n: first so many (compositions: how many to draw).

    Raises:
        ValueError: unknown name or split, files that are not there, or too few for the split.
    """
    if name not in DATASETS:
        raise ValueError(f"data must be one of {', '.join(DATASETS)}; got {name!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    if n is not None and n < 1:
        raise ValueError(f"n must be >= 1; got {n}")
    if name in _COMPOSED:
        if image_size != compositions.IMAGE_SIZE:
            raise ValueError(f"image_size of {name} is {compositions.IMAGE_SIZE}; got {image_size}")
        style, classes = _COMPOSED[name]
        if len(classes) == len(compositions.UNSEEN) and split == "train":
            raise ValueError(f"{name} holds the pairs that no training may see: it has val and test only")
        count, first_seed = _SIZES[split]
        offset = list(_COMPOSED).index(name)
        learnable = split != "test" and classes == compositions.SEEN  # what training chooses among names no unseen pair
        names = tuple(compositions.LABELS[y] for y in classes) if learnable else compositions.LABELS
        drawn_by = 10_000 * seed + first_seed + offset
        rendered = Rendered(n or count, seed=drawn_by, classes=classes, style=style, relabel=learnable)
        return ImageTextData(rendered, names, compositions.TEMPLATES)
    if root is None or not Path(root).is_dir():
        raise ValueError(f"root must be a folder with the files of {name}; got {root!r}")
    whole, classes, templates = _from_disk(name, Path(root), split, _square(image_size))
    if name not in _OWN_VAL:
        whole = _cut(whole, split, seed, three_ways=name in _NO_TEST)
    if len(whole) == 0:
        raise ValueError(f"root must hold enough images for a {split} split of {name}; got too few in {root}")
    if n is not None:
        whole = Subset(whole, range(min(n, len(whole))))
    return ImageTextData(whole, classes, templates)


def open_image(path: str | Path, image_size: int) -> Tensor:
    """One image file as float32 [3, image_size, image_size] in [0, 1]. Raises ValueError when it cannot be read."""
    return _square(image_size)(_picture(path))


def _picture(path: str | Path):
    """The file as a PIL image in RGB."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return file.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL raises SyntaxError for a broken PNG
        raise ValueError(f"image must be a readable picture; {path}: {error}") from error


def _square(image_size: int) -> Callable:
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(image_size, antialias=True),
            v2.CenterCrop(image_size),
            v2.ToDtype(torch.float32, scale=True),
            v2.ToPureTensor(),
        ]
    )


def _from_disk(name: str, root: Path, split: str, transform: Callable):
    from torchvision import datasets

    if name == "folder":
        try:
            images = datasets.ImageFolder(root, transform, loader=_picture)
        except FileNotFoundError as error:
            raise ValueError(f"root must hold one subfolder of images per class: {error}") from error
        return images, _readable(images.classes), ("a photo of a {}.",)
    kind, arguments, templates = _TORCHVISION[name]
    try:
        if kind == "Caltech101" and not (root / "caltech101").is_dir():  # torchvision would leave an empty one
            raise RuntimeError("Dataset not found")
        images = getattr(datasets, kind)(root, transform=transform, **arguments(split))
    except RuntimeError as error:
        raise ValueError(
            f"{root} does not hold torchvision's {kind}; fetch it with torchvision.datasets.{kind}({str(root)!r}, "
            f"download=True): {str(error).splitlines()[0]}"
        ) from error
    classes = images.categories if name == "caltech101" else images.classes
    return images, _readable(classes), templates


def _readable(classes: list[str]) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in classes)


def _cut(whole: Dataset, split: str, seed: int, three_ways: bool) -> Dataset:
    """val is a tenth of what is not test; where there is no test split, test is another tenth."""
    if split == "test" and not three_ways:
        return whole
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    tenth = max(1, int(len(whole) * VAL_FRACTION))
    parts = {
        "val": order[:tenth],
        "test": order[tenth : 2 * tenth] if three_ways else [],
        "train": order[(1 + three_ways) * tenth :],
    }
    return Subset(whole, parts[split])
