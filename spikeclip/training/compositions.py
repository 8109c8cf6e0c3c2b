"""Procedural 32x32 pictures of composed things, "a photo of a large striped green star on a black background".

Two of the eight colours of every shape are held out: those 20 of the 80 (colour, shape) pairs never appear in images or
captions of any training stage, the teacher's included, so that recognising them is zero-shot.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "moon", "hourglass", "bar", "arrow")
TEXTURES = ("solid", "striped", "dotted")
SIZES = ("small", "large")
BACKGROUNDS = ("black", "gray", "white")
STYLES = ("photo", "sketch")
IMAGE_SIZE = 32

LABELS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
UNSEEN = tuple(sorted((shape + k) % 8 * len(SHAPES) + shape for shape in range(len(SHAPES)) for k in (0, 3)))
SEEN = tuple(label for label in range(len(LABELS)) if label not in UNSEEN)

TEMPLATES = (
    "a photo of a {}.",
    "a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a photo of a {} on a black background.",
    "a photo of a {} on a gray background.",
    "a photo of a {} on a white background.",
    "a sketch of a {}.",
)

_RGB = torch.tensor(
    [
        (0.86, 0.10, 0.10),
        (0.98, 0.52, 0.05),
        (0.95, 0.90, 0.10),
        (0.10, 0.68, 0.15),
        (0.10, 0.85, 0.88),
        (0.12, 0.20, 0.90),
        (0.52, 0.10, 0.75),
        (0.98, 0.50, 0.75),
    ]
)
_GRAY = torch.tensor([0.06, 0.50, 0.94])


class Compositions(NamedTuple):
    """``images`` float32 [n, 3, 32, 32] in [0, 1], ``labels`` int64 [n] in 0..79, ``captions`` n strings."""

    images: Tensor
    labels: Tensor
    captions: list[str]


def render(n: int, *, seed: int, classes: tuple[int, ...] = SEEN, style: str = "photo") -> Compositions:
    """Draw ``n`` pictures, balanced over ``classes``, the same ones for the same arguments.

    Args:
        n: how many, >= 1. seed: of the pictures. classes: label ids to draw from, indices into ``LABELS``.
        style: ``photo`` (filled shapes under varying light) or ``sketch`` (coloured outlines on noisy paper), the
            shifted domain of the downstream task.

    Raises:
        ValueError: an argument outside the above.
    """
    if n < 1:
        raise ValueError(f"n must be >= 1; got {n}")
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}; got {style!r}")
    if not classes or min(classes) < 0 or max(classes) >= len(LABELS):
        raise ValueError(f"classes must be label ids in 0..{len(LABELS) - 1}; got {classes!r}")
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=g) % len(classes)
    labels = torch.tensor(classes)[order]
    texture, size, background = (torch.randint(len(options), (n,), generator=g) for options in (TEXTURES, SIZES, BACKGROUNDS))
    chunks = [_draw(labels[i], texture[i], size[i], background[i], style, g) for i in torch.arange(n).split(512)]
    captions = [
        f"a {style} of a {SIZES[s]} {TEXTURES[t]} {LABELS[y]} on a {BACKGROUNDS[b]} background"
        for y, t, s, b in zip(labels.tolist(), texture.tolist(), size.tolist(), background.tolist(), strict=True)
    ]
    return Compositions(torch.cat(chunks), labels, captions)


def caption_corpus(classes: tuple[int, ...] = SEEN) -> list[str]:
    """Every sentence about ``classes``: full captions in both styles, and every template. No other pair is named."""
    full = [
        f"a {style} of a {size} {texture} {LABELS[y]} on a {background} background"
        for y in classes
        for style in STYLES
        for size in SIZES
        for texture in TEXTURES
        for background in BACKGROUNDS
    ]
    return full + [template.format(LABELS[y]) for y in classes for template in TEMPLATES]


def _uniform(n: int, low: float, high: float, g: torch.Generator) -> Tensor:
    return torch.rand(n, generator=g) * (high - low) + low


def _draw(labels: Tensor, texture: Tensor, size: Tensor, background: Tensor, style: str, g: torch.Generator) -> Tensor:
    n = len(labels)
    colour, shape = labels // len(SHAPES), labels % len(SHAPES)
    radius = torch.where(size == 0, _uniform(n, 0.45, 0.53, g), _uniform(n, 0.64, 0.78, g))
    slack = 0.95 - radius
    cx, cy = (_uniform(n, -1, 1, g) * slack for _ in range(2))
    angle = _uniform(n, -math.pi, math.pi, g)

    # Twice the resolution, averaged down at the end, for smooth edges.
    ticks = (torch.arange(2 * IMAGE_SIZE) + 0.5) / IMAGE_SIZE - 1.0
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    dx, dy = x.reshape(1, -1) - cx[:, None], y.reshape(1, -1) - cy[:, None]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    u, v = (cos * dx + sin * dy) / radius[:, None], (cos * dy - sin * dx) / radius[:, None]
    inside = _inside(shape, u, v)

    period = 7.0 * _uniform(n, 0.85, 1.15, g)[:, None]
    striped = torch.sin(dx * math.pi * period * 1.3) > 0
    dotted = (torch.sin(dx * math.pi * period) * torch.sin(dy * math.pi * period)) > 0.25
    pattern = torch.where(texture[:, None] == 1, striped, torch.where(texture[:, None] == 2, dotted, torch.zeros(()).bool()))

    paint = (_RGB[colour] + 0.05 * torch.randn(n, 3, generator=g)).clamp(0, 1)
    ground = (_GRAY[background][:, None] + 0.04 * torch.randn(n, 3, generator=g)).clamp(0, 1)
    if style == "photo":
        alpha = inside.float() * torch.where(pattern, 0.45, 1.0)
    else:
        edge = inside & ~_inside(shape, u * 1.6, v * 1.6)
        alpha = torch.where(edge, 0.9, inside.float() * torch.where(pattern, 0.55, 0.4))
        ground = 0.7 * ground + 0.2
    picture = paint[:, :, None] * alpha[:, None] + ground[:, :, None] * (1 - alpha[:, None])
    picture = F.avg_pool2d(picture.reshape(n, 3, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE), 2)

    light_x, light_y = (_uniform(n, -0.2, 0.2, g)[:, None, None, None] for _ in range(2))
    ramp = torch.linspace(-1, 1, IMAGE_SIZE)
    light = 1.0 + light_x * ramp + light_y * ramp[:, None]
    noise = 0.03 if style == "photo" else 0.08
    return (picture * light + noise * torch.randn(picture.shape, generator=g)).clamp(0, 1)


def _inside(shape: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Which points (u, v) [n, p], in each shape's own frame of about unit radius, belong to shape [n]."""
    inside = torch.zeros(u.shape, dtype=torch.bool)
    for index, name in enumerate(SHAPES):
        rows = (shape == index).nonzero()[:, 0]
        if len(rows):
            inside[rows] = _MEMBERSHIP[name](u[rows], v[rows])
    return inside


def _polygon(corners: list[tuple[float, float]]):
    def member(u: Tensor, v: Tensor) -> Tensor:
        odd = torch.zeros(u.shape, dtype=torch.bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if y0 != y1:
                crosses = (v < y0) != (v < y1)
                odd ^= crosses & (u < (x1 - x0) * (v - y0) / (y1 - y0) + x0)
        return odd

    return member


def _radial(radii: list[float]) -> list[tuple[float, float]]:
    steps = [2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(r * math.sin(a), r * math.cos(a)) for r, a in zip(radii, steps, strict=True)]


def _disc(u: Tensor, v: Tensor, radius: float) -> Tensor:
    return u * u + v * v < radius * radius


_MEMBERSHIP = {
    "circle": lambda u, v: _disc(u, v, 0.82),
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.72,
    "triangle": _polygon(_radial([1.05, 1.05, 1.05])),
    "star": _polygon(_radial([1.1, 0.42] * 5)),
    "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.27) & (torch.maximum(u.abs(), v.abs()) < 0.92),
    "ring": lambda u, v: _disc(u, v, 0.95) & ~_disc(u, v, 0.5),
    "moon": lambda u, v: _disc(u, v, 0.95) & ~_disc(u - 0.5, v, 0.8),
    "hourglass": lambda u, v: (u.abs() < 0.12 + 0.75 * v.abs()) & (v.abs() < 0.9),
    "bar": lambda u, v: (u.abs() < 1.0) & (v.abs() < 0.3),
    "arrow": _polygon([(1.0, 0.0), (0.15, 0.75), (0.15, 0.25), (-0.95, 0.25), (-0.95, -0.25), (0.15, -0.25), (0.15, -0.75)]),
}
