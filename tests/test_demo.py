import json

import pytest
import torch

from spikeclip import SpikeCLIP
from spikeclip.demo import Plan, run
from spikeclip.training import Settings

KEYS = {
    "chance", "teacher_seen", "teacher_unseen", "aligned_seen", "aligned_unseen", "aligned_unseen_among_unseen", "task_before",
    "task_after", "task_after_ce_only", "finetuned_unseen", "finetuned_unseen_ce_only", "firing_rate", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    def few(steps):
        return Settings(steps=steps, batch_size=32, lr=2e-3)

    out = tmp_path_factory.mktemp("demo") / "out"
    plan = Plan(images=256, task_images=128, test_images=64, text=few(30), image=few(12), adapt=few(4), finetune=few(3))
    return out, run(out, plan)


def test_summary_is_written_with_every_key(done):
    out, summary = done
    assert json.loads((out / "summary.json").read_text()) == summary
    assert set(summary) >= KEYS and all(isinstance(value, float) for value in summary.values())
    assert summary["chance"] == 1 / 80 and summary["teacher_unseen"] > 0.9
    assert all(0 <= value <= 1 for key, value in summary.items() if not key.startswith(("seconds", "energy")))


def test_the_student_loads_and_pictures_are_pictures(done):
    out, _ = done
    student = SpikeCLIP.from_pretrained(out / "student")
    assert torch.isfinite(student.encode_image(torch.rand(2, 3, 32, 32))).all()
    for name in ("loss.png", "answers.png", "rates.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_every_step_is_logged(done):
    out, _ = done
    for name, steps in (("align-text", 30), ("align-image", 12), ("finetune-ce-kl", 3), ("finetune-ce", 3)):
        assert len((out / f"{name}.jsonl").read_text().splitlines()) == steps
