"""The command line: ``spikeclip demo | align-text | align-image | finetune | eval | zeroshot | energy | info``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

Out = Annotated[Path, tyro.conf.arg(help="folder to write into")]
Precision = Literal["no", "bf16", "fp16"]
Weights = Literal["fp32", "int16", "int8"]
Checkpointing = Annotated[bool, tyro.conf.arg(help="make currents again in the backward pass: less memory, a little more time")]
Device = Annotated[Literal["auto", "cpu", "cuda"], tyro.conf.arg(help="where to run; auto: cuda if there is one")]
_TEACHER = "open_clip architecture, a folder with open_clip_config.json, or the packaged spikeclip-demo-teacher"


def demo(out: Out = Path("spikeclip-demo"), seed: int = 0, device: Device = "auto") -> None:
    """Train a small SpikeCLIP by the paper's recipe on embedded pictures and ask it zero-shot questions (3 to 8 minutes)."""
    from .demo import run

    run(out, seed=seed, device=_device(device))


def align_text(
    out: Out,
    model: str = "spikeclip-demo",
    teacher: Annotated[str, tyro.conf.arg(help=_TEACHER)] = "spikeclip-demo-teacher",
    pretrained: str | None = None,
    sentences: Path | None = None,
    steps: int = 150,
    batch_size: int = 256,
    lr: float = 2e-3,
    lr_min: float = 0.0,
    mixed_precision: Precision = "no",
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Stage 1a: align the text tower of a config or saved model to the teacher, on one sentence a line of --sentences.

    Without --sentences, the captions of the embedded compositions. The paper: batch 1024, lr 5e-3 to 5e-4.
    """
    from .models import load_teacher
    from .training import Settings
    from .training import align_text as stage
    from .training.compositions import caption_corpus

    settings = Settings(steps, batch_size, lr, lr_min, seed=seed, mixed_precision=mixed_precision)
    student, guide = _student(model, seed, device), load_teacher(teacher, pretrained).to(_device(device))
    lines = caption_corpus() if sentences is None else [s for s in _text(sentences).splitlines() if s.strip()]
    history = stage(student, guide, lines, settings, log=out / "align-text.jsonl", save=lambda: student.save_pretrained(out))
    _report(history, out)


def align_image(
    model: str,
    out: Out,
    teacher: Annotated[str, tyro.conf.arg(help=_TEACHER)] = "spikeclip-demo-teacher",
    pretrained: str | None = None,
    data: str = "compositions",
    root: Path | None = None,
    steps: int = 1500,
    batch_size: int = 64,
    lr: float = 3e-3,
    lr_min: float = 1e-4,
    validate_every: int = 500,
    mixed_precision: Precision = "no",
    grad_checkpointing: Checkpointing = False,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Stage 1b: align the image tower of a saved model to the teacher. The paper: batch 196, lr 5e-3 to 5e-4."""
    from .models import load_teacher
    from .training import Settings
    from .training import align_image as stage

    settings = Settings(steps, batch_size, lr, lr_min, True, 0.0, validate_every, seed, mixed_precision)
    student, guide = _student(model, seed, device), load_teacher(teacher, pretrained).to(_device(device))
    student.set_grad_checkpointing(grad_checkpointing)
    train, validate = _splits(student, data, root, seed)
    history = stage(
        student,
        guide,
        train,
        settings,
        validate=validate,
        log=out / "align-image.jsonl",
        save=lambda: student.save_pretrained(out),
    )
    _report(history, out)


def finetune(
    model: str,
    out: Out,
    teacher: Annotated[str, tyro.conf.arg(help=_TEACHER)] = "spikeclip-demo-teacher",
    pretrained: str | None = None,
    data: str = "compositions-sketch",
    root: Path | None = None,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    adapt_steps: int = 300,
    steps: int = 150,
    batch_size: int = 64,
    lr: float = 1e-3,
    lr_min: float = 1e-5,
    validate_every: int = 50,
    mixed_precision: Precision = "no",
    grad_checkpointing: Checkpointing = False,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Stage 2: fine-tune a saved model on a task with CE + kl_weight * KL to the teacher.

    The teacher is adapted to the task first (--adapt-steps 0: not); --kl-weight 0 trains with cross-entropy alone.
    """
    from .models import load_teacher
    from .training import Settings, adapt_teacher
    from .training import finetune as stage
    from .training.recipe import check_weights

    check_weights(kl_weight, temperature)
    settings = Settings(steps, batch_size, lr, lr_min, True, 0.0, validate_every, seed, mixed_precision)
    student, guide = _student(model, seed, device), load_teacher(teacher, pretrained).to(_device(device))
    student.set_grad_checkpointing(grad_checkpointing)
    train, validate = _splits(student, data, root, seed)
    if kl_weight == 0:
        guide = None
    elif adapt_steps:
        adaptation = Settings(adapt_steps, batch_size, 1e-3, seed=seed, mixed_precision=mixed_precision)
        guide, _ = adapt_teacher(guide, train, train.classes, train.templates, adaptation)
    history = stage(
        student,
        guide,
        train,
        train.classes,
        train.templates,
        settings,
        kl_weight=kl_weight,
        temperature=temperature,
        validate=validate,
        log=out / "finetune.jsonl",
        save=lambda: student.save_pretrained(out),
    )
    _report(history, out)


def eval_(
    model: str = "spikeclip-demo",
    data: str = "compositions-unseen",
    root: Path | None = None,
    split: Literal["val", "test"] = "test",
    per_class: bool = False,
    weights: Weights | None = None,
    device: Device = "auto",
) -> None:
    """Zero-shot accuracy of a saved model: top-1, top-5 and, with --per-class, every class.

    The test pictures of the compositions are judged among all 80 labels; their val pictures, as in training, among the seen 60.
    --weights holds the image tower in fp32 (the default), int16 or int8.
    """
    from .training.data import load
    from .zeroshot import class_vectors, evaluate

    student = _asked(model, weights, device)
    images = load(data, root, split=split, image_size=student.visual.image_size)
    result = evaluate(student, images, class_vectors(student, images.classes, images.templates))
    scores = f"top-1 {result.top1:.2%}, top-5 {result.top5:.2%}"
    print(f"{data} {split}: {scores} of {result.images} images, {len(images.classes)} labels")
    if per_class:
        for name, accuracy in zip(images.classes, result.per_class, strict=True):
            print(f"  {name}: " + ("no images" if accuracy != accuracy else f"{accuracy:.1%}"))


def zeroshot(
    image: Annotated[list[Path], tyro.conf.arg(help="image files")],
    labels: Annotated[str, tyro.conf.arg(help='candidates, separated by commas: "a, b, c"')],
    model: str = "spikeclip-demo",
    template: str = "a photo of a {}.",
    device: Device = "auto",
) -> None:
    """Answer which of the labels each image shows, with probabilities."""
    import torch

    from .training.data import open_image
    from .zeroshot import ZeroShotClassifier

    candidates = [label.strip() for label in labels.split(",")]
    if len(set(candidates)) < max(2, len(candidates)) or "" in candidates:
        raise ValueError(f'labels must name at least two candidates, all different, as in "a, b"; got {labels!r}')
    if not image:
        raise ValueError("image must name at least one picture; got none")
    student = _asked(model, None, device)
    for label in candidates:
        if unknown := student.tokenizer.unknown_words(label):
            print(f"note: {model} does not know the words {', '.join(unknown)} of {label!r}", file=sys.stderr)
    images = torch.stack([open_image(path, student.visual.image_size) for path in image])
    chances = ZeroShotClassifier(student, candidates, [template])(images)
    for path, row in zip(image, chances, strict=True):
        ranked = sorted(zip(row.tolist(), candidates, strict=True), reverse=True)
        print(f"{path}: " + ", ".join(f"{label} {chance:.1%}" for chance, label in ranked))


def energy(
    model: str = "spikeclip-demo",
    data: str = "compositions",
    root: Path | None = None,
    split: Literal["val", "test"] = "test",
    n: Annotated[int, tyro.conf.arg(help="how many images")] = 256,
    cost: Annotated[list[str], tyro.conf.arg(help="cost models by name, or TOML files; all that there are")] = [],  # noqa: B006
    report: Annotated[Path | None, tyro.conf.arg(help="write one self-contained HTML file")] = None,
    figures: Annotated[Path | None, tyro.conf.arg(help="folder for the figures as PNG")] = None,
    json: Annotated[Path | None, tyro.conf.arg(help="write counts, estimates and measurements as JSON")] = None,
    csv: Annotated[Path | None, tyro.conf.arg(help="write the counts as CSV, a row a layer and time-step")] = None,
    latex: Annotated[bool, tyro.conf.arg(help="print a row for a LaTeX table per cost model")] = False,
    measure: Annotated[
        bool, tyro.conf.arg(help="measure latency, and joules where there is a counter, of it and its ANN twin")
    ] = False,
    device: Device = "auto",
) -> None:
    """What an answer costs: operations counted on real images, energy estimated under every cost model, and measured."""
    from rich.console import Console

    from .energy import (
        available,
        cost_model,
        estimate,
        latex_row,
        print_table,
        profile,
        save_html,
        save_json,
        save_pngs,
    )
    from .energy.table import LATEX_HEADER
    from .training.data import load

    models = [cost_model(name) for name in cost or available()]
    student = _learning(model, device)
    images = load(data, root, split=split, image_size=student.visual.image_size, n=n)
    counted = profile(student, images, classes=images.classes, templates=images.templates)
    estimates = [estimate(counted, prices) for prices in models]
    measured = _measured(student, images, device) if measure else None
    print_table(counted, estimates, Console())
    for name, found in (measured or {}).items():
        print(f"measured, {name}: {found.line()}")
    if latex:
        print(LATEX_HEADER)
        for estimated in estimates:
            print(latex_row(counted, estimated, f"{model} ({estimated.model})"))
    if report is not None:
        save_html(counted, estimates, report, measured)
    if figures is not None:
        save_pngs(counted, estimates, figures)
    if json is not None:
        save_json(counted, estimates, json, measured)
    if csv is not None:
        counted.save_csv(csv)


def _measured(student, images, device: str) -> dict:
    """Latency and joules of the image tower made for inference and of its ANN twin, on the first 32 images."""
    import torch

    from .energy import ann_twin, measure

    where = _device(device)
    batch = torch.stack([images[i][0] for i in range(min(32, len(images)))]).to(where)
    runs = {
        "SNN, fp32 weights": student.visual.for_inference("fp32"),
        "SNN, int8 weights": student.visual.for_inference("int8"),
        "ANN twin, fp32, eager": ann_twin(student.visual, batch),
    }
    found = {}
    for name, tower in runs.items():
        with torch.no_grad():
            found[name] = measure(lambda tower=tower: tower(batch), len(batch), device=where)
    return found


def info() -> None:
    """Versions, what is built, which backend each op takes on each device, and why not the others."""
    import platform

    import torch

    from . import __version__
    from .ops import _backends

    print(f"spikeclip {__version__}, python {platform.python_version()}, torch {torch.__version__}")
    for line in _backends.built():
        print(line)
    for row in _backends.describe():
        print(f"{row.op} on {row.device}: {'auto takes ' + row.auto if row.auto else 'no such device here'}")
        for name, reason in row.reasons.items():
            print(f"  {name}: {reason or 'available'}")


def _device(name: str):
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be auto or cpu where there is no CUDA device; got 'cuda'")
    return torch.device("cuda" if torch.cuda.is_available() and name != "cpu" else "cpu")


def _saved(model: str, device: str):
    from .models import SpikeCLIP

    return SpikeCLIP.from_pretrained(model).to(_device(device))


def _learning(model: str, device: str):
    """A saved model that learns. Raises ValueError for one made for inference."""
    student = _saved(model, device)
    if student.config.weights is not None:
        raise ValueError(f"model must be one that learns; {model} was saved for inference, in {student.config.weights}")
    return student


def _asked(model: str, weights: str | None, device: str):
    """A saved model for questions alone; one that was saved so keeps its own weights."""
    student = _saved(model, device)
    own = student.config.weights
    if own is not None and weights not in (None, own):
        raise ValueError(f"weights must be {own}, as {model} was saved; got {weights}")
    return student.for_inference(weights or "fp32") if own is None else student


def _student(model: str, seed: int, device: str):
    """An untrained model, drawn by ``seed``, when ``model`` names a config; a saved one when it is a folder."""
    import torch

    from .models import SpikeCLIP
    from .models.config import available

    if model not in available() and not model.endswith(".json"):
        return _learning(model, device)
    torch.manual_seed(seed)
    return SpikeCLIP.from_config(model).to(_device(device))


def _splits(student, data: str, root: Path | None, seed: int):
    from .training.data import load
    from .zeroshot import class_vectors, evaluate

    size = student.visual.image_size
    train, val = (load(data, root, split=split, image_size=size, seed=seed) for split in ("train", "val"))
    vectors = class_vectors(student.eval(), val.classes, val.templates)
    return train, lambda: evaluate(student.for_inference(), val, vectors).top1


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"sentences must be a readable text file; {path}: {error}") from error


def _report(history, out: Path) -> None:
    best = "" if history.best is None else f", best validation top-1 {history.best:.2%}"
    print(f"{len(history.losses)} steps in {history.seconds:.0f} s, loss {history.losses[-1]:.4f}{best}; saved in {out}")
    if history.silent_layers:
        print(f"warning: not one neuron fired at the start in {', '.join(history.silent_layers)}", file=sys.stderr)


VERBS = {
    "demo": demo,
    "align-text": align_text,
    "align-image": align_image,
    "finetune": finetune,
    "eval": eval_,
    "zeroshot": zeroshot,
    "energy": energy,
    "info": info,
}


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; bad input or a full disk ends with one line and exit code 2, Ctrl-C with 130."""
    from .memory import keep_memory

    keep_memory()
    try:
        tyro.extras.subcommand_cli_from_dict(VERBS, prog="spikeclip", args=arguments)
    except (ValueError, RuntimeError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"spikeclip: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("spikeclip: interrupted; what had been saved is whole", file=sys.stderr)
        sys.exit(130)
    finally:
        _leave_process_group()


def _leave_process_group() -> None:
    """Under torchrun: the threads of a process group may abort a process that exits before it is destroyed."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
