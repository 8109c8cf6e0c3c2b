"""What a SpikeCLIP model is made of, as dataclasses read from JSON (``configs/*.json`` or a saved model's config)."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class LIFConfig:
    """Neuron settings shared by both towers (paper: tau 2, threshold 1, hard reset to 0, sigmoid surrogate, alpha 4)."""

    tau: float = 2.0
    v_threshold: float = 1.0
    v_reset: float | None = 0.0
    detach_reset: bool = True
    surrogate: str = "sigmoid"

    def neuron(self) -> dict[str, Any]:
        """The arguments of ``spikeclip.nn.LIF``."""
        return {
            "tau": self.tau,
            "v_threshold": self.v_threshold,
            "v_reset": self.v_reset,
            "surrogate_function": self.surrogate,
            "detach_reset": self.detach_reset,
        }


@dataclass(frozen=True)
class VisionConfig:
    """Spiking image tower: ``channels`` of the tokenizer's 3x3 convolutions; ``pools`` says after which a 3x3/2 pool halves."""

    image_size: int
    channels: tuple[int, ...]
    pools: tuple[bool, ...]
    depth: int
    num_heads: int
    mlp_ratio: float
    attention_scale: float = 0.125
    attention_v_threshold: float = 0.5
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        _require(self.image_size >= 1, "vision.image_size must be >= 1", self.image_size)
        _require(
            len(self.channels) >= 2 and min(self.channels) >= 1, "vision.channels must be two or more sizes", self.channels
        )
        _require(len(self.pools) == len(self.channels), "vision.pools must be as long as vision.channels", self.pools)
        _require(self.depth >= 0, "vision.depth must be >= 0", self.depth)
        _require(
            self.num_heads >= 1 and self.channels[-1] % self.num_heads == 0,
            f"vision.num_heads must divide the width {self.channels[-1]}",
            self.num_heads,
        )
        _require(min(self.std) > 0, "vision.std must be > 0", self.std)

    @property
    def width(self) -> int:
        return self.channels[-1]


@dataclass(frozen=True)
class TextConfig:
    """Spiking text MLP over ``context_length`` token embeddings; ``vocabulary`` cuts the token table (None: all of CLIP's).

    ``norm`` puts a BatchNorm before both neurons: without it a token table of small scale drives no neuron at all.
    """

    context_length: int
    embedding_width: int
    hidden: int
    norm: bool = False
    vocabulary: tuple[int, ...] | None = None

    def __post_init__(self):
        _require(self.context_length >= 3, "text.context_length must be >= 3", self.context_length)
        _require(self.embedding_width >= 1, "text.embedding_width must be >= 1", self.embedding_width)
        _require(self.hidden >= 1, "text.hidden must be >= 1", self.hidden)


@dataclass(frozen=True)
class SpikeCLIPConfig:
    """A whole model: ``embed_dim`` is the teacher's feature size, ``T`` the number of time-steps.

    ``vision``, ``text`` and ``lif`` may be given as dicts of their settings. ``weights`` is None for a model that learns, else
    what the image tower of one made for inference is held in: fp32, int16 or int8.
    """

    embed_dim: int
    T: int
    vision: VisionConfig
    text: TextConfig
    lif: LIFConfig = LIFConfig()
    weights: str | None = None

    def __post_init__(self):
        for key, part in (("vision", VisionConfig), ("text", TextConfig), ("lif", LIFConfig)):
            if not isinstance(getattr(self, key), part):
                object.__setattr__(self, key, _build(part, key, getattr(self, key)))
        _require(self.embed_dim >= 1, "embed_dim must be >= 1", self.embed_dim)
        _require(self.T >= 1, "T must be >= 1", self.T)
        allowed = (None, "fp32", "int16", "int8")
        _require(self.weights in allowed, "weights must be fp32, int16, int8 or null", self.weights)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SpikeCLIPConfig:
        """Raises ValueError that names a missing or unknown key or a bad value."""
        return _build(cls, "config", values)


def _require(condition: bool, message: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{message}; got {got}")


def _build(kind: type, name: str, values: object):
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a table of settings; got {values!r}")
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{name} has unknown settings {', '.join(unknown)}; known are {', '.join(known)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    types = get_type_hints(kind)
    for key, value in values.items():
        if not _fits(value, types[key]):
            wanted = next(field.type for field in fields(kind) if field.name == key)
            raise ValueError(f"{name}.{key} must be of type {wanted}; got {value!r}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{name} is incomplete: {error}") from error


def _fits(value: object, kind: Any) -> bool:
    """Whether a value from JSON is of an annotated type; whole numbers pass for floats, true and false for bool alone."""
    parts = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_fits(value, part) for part in parts)
    if get_origin(kind) is tuple:
        wanted = parts[:1] * len(value) if isinstance(value, tuple) and parts[-1] is ... else parts
        return isinstance(value, tuple) and len(value) == len(wanted) and all(map(_fits, value, wanted))
    if is_dataclass(kind):
        return True  # a table, built and checked by its owner
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def available() -> list[str]:
    """Names that ``load_config`` knows."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def load_config(name: str) -> SpikeCLIPConfig:
    """A named config (``spikeclip-4-384``, ``spikeclip-8-512``, ``spikeclip-demo``) or a path to a JSON file of the same form.

    Raises:
        ValueError: no such name or file, or not a valid config.
    """
    path = Path(name) if name.endswith(".json") else CONFIGS / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"config must be one of {', '.join(available())}, or a JSON file; got {name!r}")
    try:
        return SpikeCLIPConfig.from_dict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
