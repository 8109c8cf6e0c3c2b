import copy

import pytest
import torch
from torch.utils.data import TensorDataset

from spikeclip import SpikeCLIP
from spikeclip.models import load_teacher
from spikeclip.training import Settings, adapt_teacher, align_image, align_text, finetune
from spikeclip.training.compositions import LABELS, SEEN, TEMPLATES, caption_corpus
from spikeclip.training.data import Rendered
from spikeclip.training.losses import dual_loss
from spikeclip.training.recipe import image_features
from spikeclip.zeroshot import class_vectors

FEW = Settings(steps=12, batch_size=32, lr=2e-3)


@pytest.fixture(scope="module")
def teacher():
    return load_teacher()


@pytest.fixture
def student():
    return SpikeCLIP.from_config("spikeclip-demo")


def test_text_alignment_turns_the_text_tower_towards_the_teacher(teacher, student):
    visual = copy.deepcopy(student.visual.state_dict())
    history = align_text(student, teacher, caption_corpus()[:500], Settings(steps=80, batch_size=64, lr=2e-3))
    assert history.losses[-1] < 0.2 * history.losses[0]
    assert torch.equal(student.text.token_embedding.weight, teacher.token_embedding)
    assert torch.equal(student.logit_scale, teacher.logit_scale)
    assert all(torch.equal(a, b) for a, b in zip(visual.values(), student.visual.state_dict().values(), strict=True))
    tokens = student.tokenizer(caption_corpus()[:100])
    assert torch.equal(tokens, teacher.tokenizer(caption_corpus()[:100]))
    with torch.no_grad():
        cos = (student.encode_text(tokens, normalize=True) * teacher.encode_text(tokens, normalize=True)).sum(1)
    assert cos.mean() > 0.7


def test_image_alignment_lowers_the_loss_and_leaves_text_and_teacher_alone(teacher, student):
    before = copy.deepcopy({**teacher.state_dict(), **{f"s.{k}": v for k, v in student.text.state_dict().items()}})
    history = align_image(student, teacher, Rendered(128, seed=5), Settings(steps=30, batch_size=32, lr=3e-3))
    assert sum(history.losses[-5:]) < 0.8 * sum(history.losses[:5])
    after = {**teacher.state_dict(), **{f"s.{k}": v for k, v in student.text.state_dict().items()}}
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_teacher_adapts_to_the_task_without_changing_the_original(teacher):
    task = Rendered(256, seed=6, style="sketch", relabel=True)
    before = copy.deepcopy(teacher.state_dict())
    adapted, history = adapt_teacher(
        teacher, task, [LABELS[y] for y in SEEN], TEMPLATES, Settings(steps=40, batch_size=64, lr=1e-3)
    )
    assert sum(history.losses[-5:]) < sum(history.losses[:5])
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert not adapted.training and not any(p.requires_grad for p in adapted.parameters())
    assert torch.equal(adapted.clip.token_embedding.weight, teacher.clip.token_embedding.weight)


def logged(path):
    import json

    return [json.loads(text) for text in path.read_text().splitlines()]


@pytest.mark.parametrize("kl_weight", [0.5, 2.0])
def test_finetuning_sums_its_terms(teacher, tmp_path, kl_weight):
    student = SpikeCLIP.from_pretrained("spikeclip-demo")
    task = Rendered(64, seed=6, relabel=True)
    pictures = Rendered(64, seed=7)
    replay = TensorDataset(torch.stack([image for image, _ in pictures]), image_features(teacher, pictures))
    finetune(
        student,
        teacher,
        task,
        [LABELS[y] for y in SEEN],
        TEMPLATES[:2],
        FEW,
        kl_weight=kl_weight,
        replay=replay,
        replay_weight=3.0,
        log=tmp_path / "log.jsonl",
    )
    rows = logged(tmp_path / "log.jsonl")
    assert len(rows) == FEW.steps and rows[0]["kl"] > 0
    for row in rows:
        assert row["loss"] == pytest.approx(row["ce"] + kl_weight * row["kl"] + 3.0 * row["replay"], rel=1e-4)


def test_both_distributions_use_the_teachers_logit_scale(teacher, monkeypatch):
    from spikeclip.training import recipe

    seen = []
    monkeypatch.setattr(recipe, "dual_loss", lambda a, y, b, **k: seen.append((a.detach(), b)) or dual_loss(a, y, b, **k))
    student = SpikeCLIP.from_pretrained("spikeclip-demo")
    student.logit_scale.data.zero_()
    names = [LABELS[y] for y in SEEN]
    finetune(
        student, teacher, Rendered(32, seed=6, relabel=True), names, TEMPLATES[:1], Settings(steps=1, batch_size=32, lr=1e-6)
    )
    scale = teacher.logit_scale.exp().item()
    for logits in seen[0]:
        assert 0.5 * scale < logits.max().item() <= 1.001 * scale


def test_without_a_teacher_only_cross_entropy_is_left(student, tmp_path):
    text = copy.deepcopy(student.text.state_dict())
    names = [LABELS[y] for y in SEEN]
    finetune(student, None, Rendered(64, seed=6, relabel=True), names, TEMPLATES[:1], FEW, log=tmp_path / "log.jsonl")
    assert all(row["loss"] == pytest.approx(row["ce"]) and row["kl"] == 0 for row in logged(tmp_path / "log.jsonl"))
    assert all(torch.equal(a, b) for a, b in zip(text.values(), student.text.state_dict().values(), strict=True))


def test_features_keep_the_order_of_the_data(teacher):
    pictures = Rendered(30, seed=8)
    features = image_features(teacher, pictures, batch_size=7)
    with torch.no_grad():
        one = teacher.encode_image(pictures[17][0][None], normalize=True)
    torch.testing.assert_close(features[17:18], one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(30))


@pytest.mark.parametrize("options", [{"kl_weight": -1}, {"temperature": 0}, {"replay_weight": float("nan")}])
def test_bad_weights(teacher, student, options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name} must be finite and >=? 0; got {value}"):
        finetune(student, teacher, Rendered(8, seed=1, relabel=True), ["a"], ["{}"], FEW, **options)


def test_labels_beyond_the_classes(teacher, student):
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1, one vector each"):
        finetune(student, teacher, Rendered(64, seed=1, relabel=True), ["a", "b"], ["{}"], FEW)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1, one vector each"):
        adapt_teacher(teacher, Rendered(64, seed=1, relabel=True), ["a", "b"], ["{}"], FEW)


def test_a_replay_smaller_than_a_batch(teacher, student):
    names = [LABELS[y] for y in SEEN]
    pictures = Rendered(3, seed=6)
    replay = TensorDataset(torch.stack([image for image, _ in pictures]), image_features(teacher, pictures))
    done = finetune(student, teacher, Rendered(64, seed=6, relabel=True), names, TEMPLATES[:1], FEW, replay=replay)
    assert len(done.losses) == FEW.steps
    with pytest.raises(ValueError, match="replay must hold at least one sample"):
        finetune(
            student, teacher, Rendered(8, seed=6, relabel=True), names, TEMPLATES[:1], FEW, replay=TensorDataset(torch.zeros(0))
        )


def test_no_sentences(teacher, student):
    with pytest.raises(ValueError, match="sentences must hold at least one sentence"):
        align_text(student, teacher, [], FEW)


def test_class_vectors_do_not_train_the_text_tower(student):
    assert not class_vectors(student, ["a", "b"], ["{}"]).requires_grad
