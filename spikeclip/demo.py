"""``spikeclip demo``: the paper's recipe on the embedded pictures and teacher, for real, in minutes on a CPU."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import Subset, TensorDataset

from . import figures
from .energy import Estimate, Profile, estimate, profile
from .energy.figures import firing_rates, save
from .energy.files import whole
from .models import SpikeCLIP, load_teacher
from .ops._density import SLOW_ON_CPU
from .training import History, Settings, adapt_teacher, align_image, align_text, finetune
from .training.compositions import LABELS, SEEN, TEMPLATES, UNSEEN, caption_corpus
from .training.data import Rendered
from .training.recipe import image_features
from .zeroshot import class_vectors, classify, evaluate


@dataclass(frozen=True)
class Plan:
    """Sizes and settings of the demo's stages; the defaults take three to eight minutes on two cores."""

    images: int = 20_000
    task_images: int = 3_000
    test_images: int = 2_000
    text: Settings = Settings(steps=150, batch_size=256, lr=2e-3)
    image: Settings = Settings(steps=1_500, batch_size=64, lr=3e-3, lr_min=1e-4, validate_every=375)
    adapt: Settings = Settings(steps=300, batch_size=64, lr=1e-3)
    finetune: Settings = Settings(steps=150, batch_size=64, lr=1e-3, lr_min=1e-5, validate_every=75)


def run(out: Path, plan: Plan | None = None, seed: int = 0, device: str | torch.device = "cpu") -> dict[str, float]:
    """Align a spiking student to the packaged teacher, fine-tune it on sketches, and ask it about unseen compositions.

    Writes the student, ``summary.json``, logs and pictures into ``out``. Accuracies are top-1 over all 80 labels, seen and
    unseen together, unless a key says otherwise; validation and test pictures are never trained on.

    Returns:
        The content of ``summary.json``.
    """
    plan = plan or Plan()
    started = time.perf_counter()
    text_settings = replace(plan.text, seed=seed)
    precision = "bf16" if torch.device(device).type == "cuda" or torch.bfloat16 not in SLOW_ON_CPU else "no"

    def fast(settings: Settings) -> Settings:
        return replace(settings, mixed_precision=precision, seed=seed)

    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    teacher = load_teacher().to(device)
    student = SpikeCLIP.from_config("spikeclip-demo").to(device)
    pictures = Rendered(plan.images, seed=1_000 + 10_000 * seed)
    held_out = Rendered(500, seed=2_000 + 10_000 * seed)
    tests = {
        "seen": Rendered(plan.test_images, seed=3_000),
        "unseen": Rendered(plan.test_images, seed=3_001, classes=UNSEEN),
        "task": Rendered(plan.test_images, seed=3_002, style="sketch"),
        "task_unseen": Rendered(plan.test_images, seed=3_003, classes=UNSEEN, style="sketch"),
    }

    def score(model, vectors) -> dict[str, float]:
        return {name: evaluate(model, data, vectors).top1 for name, data in tests.items()}

    def ask(model: SpikeCLIP, data, vectors) -> float:
        return evaluate(model.for_inference(), data, vectors).top1

    histories: dict[str, History] = {}
    histories["text alignment"] = align_text(student, teacher, caption_corpus(), text_settings, log=out / "align-text.jsonl")
    vectors = class_vectors(student, LABELS, TEMPLATES)
    histories["image alignment"] = align_image(
        student,
        teacher,
        pictures,
        fast(plan.image),
        validate=lambda: ask(student, held_out, vectors),
        log=out / "align-image.jsonl",
        save=lambda: student.save_pretrained(out / "aligned"),
    )
    aligned = score(student.for_inference(), vectors)
    among_unseen = Rendered(plan.test_images, seed=3_001, classes=UNSEEN, relabel=True)
    aligned_among_unseen = ask(student, among_unseen, vectors[list(UNSEEN)])

    names = [LABELS[y] for y in SEEN]
    task = Rendered(plan.task_images, seed=1_002 + 10_000 * seed, style="sketch", relabel=True)
    task_val = Rendered(500, seed=2_002 + 10_000 * seed, style="sketch", relabel=True)
    adapted, histories["teacher adaptation"] = adapt_teacher(teacher, task, names, TEMPLATES, fast(plan.adapt))
    kept = Subset(pictures, range(min(4_000, len(pictures))))
    replay = TensorDataset(torch.stack([image for image, _ in kept]), image_features(teacher, kept))

    tuned = {}
    for title, guide in (("CE + KL", adapted), ("CE alone", None)):
        model = copy.deepcopy(student)
        histories[title] = finetune(
            model,
            guide,
            task,
            names,
            TEMPLATES,
            fast(plan.finetune),
            replay=replay,
            replay_weight=10.0,
            validate=lambda model=model: ask(model, task_val, vectors[list(SEEN)]),
            log=out / f"finetune-{'ce-kl' if guide else 'ce'}.jsonl",
        )
        tuned[title] = (model, score(model.for_inference(), vectors))
    final, after = tuned["CE + KL"]
    after_ce = tuned["CE alone"][1]

    sample = torch.stack([tests["seen"][i][0] for i in range(min(256, plan.test_images))]).to(device)
    counted = profile(final.eval().visual, sample)
    energy = estimate(counted, "45nm-fp32")
    teacher_scores = score(teacher, class_vectors(teacher, LABELS, TEMPLATES))
    adapted_scores = score(adapted, class_vectors(adapted, LABELS, TEMPLATES))

    final.save_pretrained(out / "student")
    whole(out / "loss.png", lambda path: figures.loss_curves(histories, path))
    whole(out / "rates.png", lambda path: save(firing_rates(counted), path, "png"))
    whole(out / "answers.png", lambda path: _answer_grid(final, vectors, tests, path))
    summary = {
        "chance": 1 / len(LABELS),
        "teacher_seen": teacher_scores["seen"],
        "teacher_unseen": teacher_scores["unseen"],
        "aligned_seen": aligned["seen"],
        "aligned_unseen": aligned["unseen"],
        "aligned_unseen_among_unseen": aligned_among_unseen,
        "task_before": aligned["task"],
        "task_after": after["task"],
        "task_after_ce_only": after_ce["task"],
        "task_unseen_before": aligned["task_unseen"],
        "task_unseen_after": after["task_unseen"],
        "task_unseen_after_ce_only": after_ce["task_unseen"],
        "finetuned_seen": after["seen"],
        "finetuned_unseen": after["unseen"],
        "finetuned_unseen_ce_only": after_ce["unseen"],
        "firing_rate": sum(neurons.rate for neurons in counted.neurons) / len(counted.neurons),
        "energy_snn_millijoules": energy.snn.millijoules,
        **{
            f"energy_{name.lower().replace(' ', '_')}_millijoules": baseline.energy.millijoules
            for name, baseline in energy.baselines.items()
        },
        "seconds": time.perf_counter() - started,
    }
    whole(out / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=1) + "\n"))
    table = {
        "chance": dict.fromkeys(tests, 1 / len(LABELS)),
        "teacher": teacher_scores,
        "teacher, adapted to the task": adapted_scores,
        "student, aligned": aligned,
        "student, fine-tuned with CE + KL": after,
        "student, fine-tuned with CE alone": after_ce,
    }
    silent = [name for history in histories.values() for name in history.silent_layers]
    _print(table, counted, energy, silent, summary["seconds"], out)
    return summary


@torch.no_grad()
def _answer_grid(model: SpikeCLIP, vectors: torch.Tensor, tests: dict[str, Rendered], path: Path) -> None:
    pairs = [tests[name][i] for name in ("unseen", "task") for i in range(16)]
    images = torch.stack([image for image, _ in pairs])
    certainty, top = classify(model, images, vectors).max(-1)
    figures.answers(images, [LABELS[y] for _, y in pairs], [LABELS[y] for y in top.tolist()], certainty.tolist(), path)


def _line(counted: Profile, energy: Estimate) -> str:
    """One sentence with the estimate and what it leaves out."""
    others = ", ".join(f"{baseline.energy.millijoules:.4f} ({name})" for name, baseline in energy.baselines.items())
    operations = f"{counted.synops / 1e6:.2f} M SynOps, {counted.analog_macs / 1e6:.2f} M MACs"
    return (
        f"{energy.snn.millijoules:.4f} mJ an image ({operations}) "
        f"against {others} for the same topology, {counted.ann_macs / 1e6:.2f} M MACs. {energy.title}: it leaves out "
        f"{', '.join(energy.leaves_out)}. The other cost models: spikeclip energy --model"
    )


def _print(table: dict, counted: Profile, energy: Estimate, silent: list[str], seconds: float, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    grid = Table(title="Top-1 over all 80 labels; unseen pairs appear in no training stage, the teacher's included")
    for heading in ("", "photos, seen", "photos, unseen", "sketches (task), seen", "sketches, unseen"):
        grid.add_column(heading, justify="right" if heading else "left")
    for name, scores in table.items():
        grid.add_row(name, *(f"{scores[key]:.1%}" for key in ("seen", "unseen", "task", "task_unseen")))
    console.print(grid)
    gain = table["student, fine-tuned with CE + KL"]["task"] - table["student, fine-tuned with CE alone"]["task"]
    verdict = "does better than" if gain > 0.02 else "does no better than" if gain > -0.02 else "does worse than"
    console.print(f"On the task the dual loss {verdict} cross-entropy alone ({100 * gain:+.1f} points, one seed).")
    console.print("Firing rates: " + ", ".join(f"{neurons.name} {neurons.rate:.1%}" for neurons in counted.neurons))
    if silent:
        console.print(f"[red]Not one neuron fired at the start of training in: {', '.join(silent)}[/red]")
    console.print(f"Energy estimate: {_line(counted, energy)} {out / 'student'}.")
    console.print(f"{seconds:.0f} s. Student, pictures and summary.json are in {out}/")
