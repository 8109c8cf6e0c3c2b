"""One readable training loop on accelerate: device, mixed precision and several processes are its business."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..nn import FiringRates


@dataclass(frozen=True)
class Settings:
    """How a stage is trained; the paper's optimizer is Adam with amsgrad, no weight decay, cosine from ``lr`` to ``lr_min``.

    Args:
        steps: optimizer steps. batch_size: samples a step and process. lr, lr_min: learning rates.
        amsgrad, weight_decay: Adam's.
        validate_every: steps between validations (0: only at the end). seed: of the order of samples, in 32 bits.
        mixed_precision: accelerate's ``no``, ``bf16`` or ``fp16``.

    Raises:
        ValueError: a number outside its range.
    """

    steps: int
    batch_size: int
    lr: float
    lr_min: float = 0.0
    amsgrad: bool = True
    weight_decay: float = 0.0
    validate_every: int = 0
    seed: int = 0
    mixed_precision: str = "no"

    def __post_init__(self):
        for name, low in (("steps", 1), ("batch_size", 1), ("validate_every", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise ValueError(f"{name} must be a whole number; got {value!r}")
            if value < low:
                raise ValueError(f"{name} must be >= {low}; got {value}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be < 2**32; got {self.seed}")
        if not 0 < self.lr < math.inf or not 0 <= self.lr_min <= self.lr:
            raise ValueError(f"lr must be > 0 and lr_min in [0, lr]; got lr={self.lr}, lr_min={self.lr_min}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and >= 0; got {self.weight_decay}")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"mixed_precision must be no, bf16 or fp16; got {self.mixed_precision!r}")


@dataclass
class History:
    """What a stage did: loss of every step, (step, score) of every validation, best score, silent layers, seconds."""

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    best: float | None = None
    silent_layers: list[str] = field(default_factory=list)
    seconds: float = 0.0


def fit(
    module: nn.Module,
    data: Dataset,
    loss: Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, dict[str, float]]],
    settings: Settings,
    *,
    name: str,
    validate: Callable[[], float] | None = None,
    save: Callable[[], None] | None = None,
    log: Path | None = None,
) -> History:
    """Train ``module`` for ``settings.steps`` steps; it ends with the weights that validated best.

    Args:
        module: a tower, trained in place, on the device that it is on. data: yields tuples of tensors.
        loss: (module, batch) -> (loss, numbers to log); batches come on the module's device.
        name: shown beside the progress bar. validate: score of ``module`` as it is, higher is better; never the test set.
        save: called after every best validation (at the end, without ``validate``); must write atomically.
        log: a JSON-lines file, one line a step.

    Raises:
        ValueError: ``data`` without a sample for every process.
        RuntimeError: the loss is not finite (the log ends at that step).
    """
    from accelerate.utils import broadcast_object_list

    if len(data) == 0:
        raise ValueError("data must hold at least one sample")
    accelerator = _accelerator(settings.mixed_precision, on_cpu=next(module.parameters()).device.type == "cpu")
    if len(data) < accelerator.num_processes:
        raise ValueError(f"data must hold a sample for each of {accelerator.num_processes} processes; got {len(data)}")
    generator = torch.Generator().manual_seed(settings.seed)
    batch_size = min(settings.batch_size, len(data) // accelerator.num_processes)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, generator=generator)
    trainable = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, settings.lr, amsgrad=settings.amsgrad, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps, settings.lr_min)
    model, optimizer, loader = accelerator.prepare(module, optimizer, loader)

    history, best_weights = History(), None
    started = time.perf_counter()
    with ExitStack() as stack:
        advance = stack.enter_context(_progress(name, settings.steps, accelerator.is_main_process))
        write = stack.enter_context(_json_lines(log if accelerator.is_main_process else None))
        rates = stack.enter_context(FiringRates(module))
        stack.callback(accelerator.unwrap_model, model, keep_fp32_wrapper=False)  # ends autocast inside module.forward
        for step, batch in enumerate(_endless(loader, settings.steps), start=1):
            model.train()
            with accelerator.autocast():
                value, parts = loss(model, batch)
            if not torch.isfinite(value):
                raise RuntimeError(
                    f"{name}: the loss is {value.item()} at step {step}; lower the learning rate ({settings.lr})"
                )
            optimizer.zero_grad()
            accelerator.backward(value)
            optimizer.step()
            schedule.step()
            if step == 1:
                history.silent_layers = rates.silent()
                rates.__exit__()
            history.losses.append(value.item())
            write({"step": step, "loss": history.losses[-1], "lr": schedule.get_last_lr()[0], **parts})
            advance(history.losses[-1])
            due = step == settings.steps or (settings.validate_every and step % settings.validate_every == 0)
            if due and validate is not None:
                module.eval()
                (score,) = broadcast_object_list([validate()])  # the main process decides for all
                history.scores.append((step, score))
                if history.best is None or score > history.best:
                    history.best = score
                    best_weights = copy.deepcopy(module.state_dict())
                    if save is not None and accelerator.is_main_process:
                        save()
    if best_weights is not None:
        module.load_state_dict(best_weights)
    elif save is not None and accelerator.is_main_process:
        save()
    module.eval()
    history.seconds = time.perf_counter() - started
    return history


def _accelerator(mixed_precision: str, on_cpu: bool):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps one precision and device a process; stages may differ in theirs. Process groups are kept.
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not grouped)
    return Accelerator(mixed_precision=mixed_precision, cpu=on_cpu)


def _endless(loader: DataLoader, steps: int) -> Iterator:
    done = 0
    while True:
        for batch in loader:
            yield batch
            done += 1
            if done == steps:
                return


@contextmanager
def _progress(name: str, steps: int, shown: bool):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
    )
    with Progress(*columns, disable=not shown) as progress:
        task = progress.add_task(name, total=steps, loss=math.nan)
        yield lambda loss: progress.update(task, advance=1, loss=loss)


@contextmanager
def _json_lines(path: Path | None):
    if path is None:
        yield lambda line: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        yield lambda line: print(json.dumps(line), file=file, flush=True)
