"""Cost models: prices of counted operations, as data with a source (``costs/*.toml``), and the networks that are compared."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .counts import Profile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COSTS = Path(__file__).parent / "costs"


@dataclass(frozen=True)
class Energy:
    """Picojoules per sample, by what they were spent on."""

    compute: float = 0.0
    neurons: float = 0.0
    weights: float = 0.0
    activations: float = 0.0
    state: float = 0.0
    addressing: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def millijoules(self) -> float:
        return self.total * 1e-9

    def __add__(self, other: Energy) -> Energy:
        return Energy(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Network:
    """A network as a cost model sees it: the SNN that was profiled, or an ANN of its topology that runs once.

    ``bits``: None for the SNN in the cost model's own precision, else (weights, activations) of the ANN.
    """

    profile: Profile
    bits: tuple[int, int] | None = None

    @property
    def spiking(self) -> bool:
        return self.bits is None


def ann(profile: Profile, weights: int, activations: int) -> Network:
    """The ANN of the same topology: each product once, dense, on values of so many bits."""
    return Network(profile, (weights, activations))


def baselines(profile: Profile) -> dict[str, Network]:
    """What an SNN is compared with: the same topology in fp32, in int8, and with activations of ceil(log2(T + 1)) bits.

    So many levels has a rate code of T steps (arXiv 2409.08290); weights of the last have 8 bits.
    """
    bits = max(1, math.ceil(math.log2(profile.steps + 1)))
    return {
        "ANN fp32": ann(profile, 32, 32),
        "ANN W8A8": ann(profile, 8, 8),
        f"ANN W8A{bits}": ann(profile, 8, bits),
    }


# pJ at 45 nm (Horowitz 2014): adds by bits; a multiply of 8 bits is 0.2, of 32 3.1, which is nearly a * b / 64 of the former.
_ADDS = ((0, 0.0), (8, 0.03), (16, 0.05), (32, 0.1))
_FLOAT = {"multiply": 3.7, "add": 0.9}


def mac_of_bits(weights: int, activations: int) -> float:
    """pJ of a multiply-accumulate at 45 nm: floating for 32 x 32 bits, else of integers."""
    if weights == activations == 32:
        return _FLOAT["multiply"] + _FLOAT["add"]
    return 0.2 * weights * activations / 64 + _line(_ADDS, max(weights, activations))


def _line(points: tuple[tuple[float, float], ...], x: float) -> float:
    """The straight lines through ``points``, level beyond their ends."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


@dataclass(frozen=True)
class CostModel:
    """Prices and a formula. :func:`cost_model` reads one; its fields are those of the TOML file.

    Attributes:
        name, title, source: what it is and where it comes from. bits: of the SNN's weights and analog activations.
        formula: ``arithmetic`` (operations alone), ``once`` (and every value moved once), ``events`` (and an access for every
            operation, and addressing; Lemaire et al., arXiv 2210.13107), ``movement`` (and weights once a step, spikes as
            bitmaps or addresses, states; after arXiv 2409.08290).
        leaves_out: what ran and is not in the figure.
        pj: picojoules of a ``mac``, ``ac``, ``multiply``, ``add``. memory: (bytes, pJ an access) by memory.
    """

    name: str
    title: str
    source: str
    formula: str
    bits: int
    leaves_out: tuple[str, ...]
    pj: dict[str, float]
    memory: dict[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    levels: dict[str, str] = field(default_factory=dict)
    fifo: dict[str, int] = field(default_factory=dict)
    state: dict[str, int] = field(default_factory=dict)

    def mac(self, network: Network) -> float:
        return self.pj["mac"] if network.spiking else mac_of_bits(*network.bits)

    def access(self, memory: str, size: float) -> float:
        """pJ of one access to a memory of so many bytes."""
        return _line(self.memory[memory], size)


def available() -> list[str]:
    """Names that :func:`cost_model` knows."""
    return sorted(path.stem for path in COSTS.glob("*.toml"))


def cost_model(name: str | Path | CostModel) -> CostModel:
    """A cost model by name, or from a TOML file of the same form as those in ``spikeclip/energy/costs``.

    Raises:
        ValueError: no such name or file, not TOML, or settings that are missing, unknown or out of range.
    """
    if isinstance(name, CostModel):
        return name
    path = Path(name) if str(name).endswith(".toml") else COSTS / f"{name}.toml"
    if not path.is_file():
        raise ValueError(f"cost model must be one of {', '.join(available())}, or a TOML file; got {str(name)!r}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    return _checked(path, values)


_NEEDS = {  # formula -> prices, memories and further settings
    "arithmetic": (("mac", "ac"), (), ()),
    "once": (("mac", "ac", "multiply", "add"), (), ("levels",)),
    "events": (("mac", "ac", "multiply", "add"), ("sram",), ("fifo",)),
    "movement": (("mac", "ac", "multiply", "add"), ("sram",), ("state",)),
}


def _checked(path: Path, values: dict[str, Any]) -> CostModel:
    def need(condition: bool, what: str, got: object) -> None:
        if not condition:
            raise ValueError(f"{path}: {what}; got {got!r}")

    known = [f.name for f in fields(CostModel) if f.name != "name"]
    need(set(values) <= set(known), f"settings must be of {', '.join(known)}", sorted(set(values) - set(known)))
    for key, kind in (("title", str), ("source", str), ("formula", str), ("bits", int), ("pj", dict), ("leaves_out", list)):
        need(type(values.get(key)) is kind, f"{key} must be given, as a {kind.__name__}", values.get(key))
    need(values["formula"] in _NEEDS, f"formula must be one of {', '.join(_NEEDS)}", values["formula"])
    need(1 <= values["bits"] <= 64, "bits must be 1 to 64", values["bits"])
    prices, memories, settings = _NEEDS[values["formula"]]
    need(set(values["pj"]) == set(prices), f"pj must give {', '.join(prices)}", sorted(values["pj"]))
    for key, price in values["pj"].items():
        need(_number(price), f"pj.{key} must be a number >= 0 (picojoules)", price)
    for key in settings:
        need(isinstance(values.get(key), dict), f"{key} must be a table", values.get(key))
    if "levels" in settings:
        need(
            set(values["levels"]) == {"weights", "activations", "state"},
            "levels must name weights, activations and state",
            values["levels"],
        )
        memories = tuple(values["levels"].values())
    for key, wanted in (("fifo", "entries"), ("state", "bits")):
        if key in settings:
            need(
                set(values[key]) == {wanted} and _number(values[key][wanted]),
                f"{key} must give {wanted}, a number",
                values[key],
            )
    memory = values.get("memory", {})
    for name in memories:
        points = memory.get(name)
        good = (
            isinstance(points, list)
            and points
            and all(isinstance(p, list) and len(p) == 2 and all(map(_number, p)) for p in points)
        )
        need(good and points == sorted(points), f"memory.{name} must be pairs [bytes, pJ], by size", points)
    values["memory"] = {name: tuple(map(tuple, points)) for name, points in memory.items()}
    return CostModel(path.stem, **{**values, "leaves_out": tuple(values["leaves_out"])})


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
