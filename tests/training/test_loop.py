import json

import pytest
import torch
from torch.utils.data import TensorDataset

from spikeclip.nn import LIF
from spikeclip.training import Settings
from spikeclip.training.loop import fit

DATA = TensorDataset(torch.linspace(-1, 1, 64)[:, None], 3 * torch.linspace(-1, 1, 64)[:, None] + 1)


def squared(module, batch):
    x, y = batch
    return (module(x) - y).square().mean(), {"extra": 1.5}


def line(**options):
    return Settings(**{"steps": 200, "batch_size": 16, "lr": 0.1, **options})


def test_it_learns_and_logs_every_step(tmp_path):
    module = torch.nn.Linear(1, 1)
    history = fit(module, DATA, squared, line(), name="line", log=tmp_path / "log" / "line.jsonl")
    torch.testing.assert_close(module.weight.item(), 3.0, atol=0.05, rtol=0)
    lines = [json.loads(text) for text in (tmp_path / "log" / "line.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == list(range(1, 201))
    assert [row["loss"] for row in lines] == history.losses and lines[0]["extra"] == 1.5
    assert lines[0]["lr"] == pytest.approx(0.1, rel=1e-3) and lines[-1]["lr"] == pytest.approx(0.0, abs=1e-6)
    assert not module.training


def test_the_same_seed_gives_the_same_run():
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(fit(torch.nn.Linear(1, 1), DATA, squared, line(steps=20, seed=4), name="line").losses)
    assert runs[0] == runs[1]


def test_it_ends_with_the_weights_that_validated_best_and_saved_them_each_time():
    module, scores, saved = torch.nn.Linear(1, 1), iter([0.3, 0.9, 0.5, 0.6]), []
    at_validation = []

    def validate():
        assert not module.training
        at_validation.append(module.weight.item())
        return next(scores)

    history = fit(
        module,
        DATA,
        squared,
        line(steps=8, validate_every=2),
        name="line",
        validate=validate,
        save=lambda: saved.append(module.weight.item()),
    )
    assert history.scores == [(2, 0.3), (4, 0.9), (6, 0.5), (8, 0.6)] and history.best == 0.9
    assert module.weight.item() == at_validation[1] and saved == at_validation[:2]


def test_without_validation_it_saves_once_at_the_end():
    module, saved = torch.nn.Linear(1, 1), []
    fit(module, DATA, squared, line(steps=3), name="line", save=lambda: saved.append(module.weight.item()))
    assert saved == [module.weight.item()]


def test_a_loss_that_is_not_finite_stops_with_the_log_kept(tmp_path):
    def exploding(module, batch):
        value, parts = squared(module, batch)
        exploding.step += 1
        return value * (float("nan") if exploding.step == 3 else 1.0), parts

    exploding.step = 0
    with pytest.raises(RuntimeError, match=r"line: the loss is nan at step 3; lower the learning rate \(0\.1\)"):
        fit(torch.nn.Linear(1, 1), DATA, exploding, line(), name="line", log=tmp_path / "line.jsonl")
    assert len((tmp_path / "line.jsonl").read_text().splitlines()) == 2


def test_ctrl_c_keeps_the_last_saved_weights():
    module, saved = torch.nn.Linear(1, 1), []

    def interrupted(module, batch):
        if len(saved) == 2:
            raise KeyboardInterrupt
        return squared(module, batch)

    with pytest.raises(KeyboardInterrupt):
        fit(
            module,
            DATA,
            interrupted,
            line(validate_every=1),
            name="line",
            validate=lambda: float(len(saved)),
            save=lambda: saved.append({k: v.clone() for k, v in module.state_dict().items()}),
        )
    assert len(saved) == 2


def test_layers_in_which_nothing_fires_are_named():
    module = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Unflatten(0, (1, -1)), LIF(v_threshold=1e6))
    history = fit(module, DATA, lambda m, b: (m(b[0]).sum() + m[0].weight.sum(), {}), line(steps=2), name="dead")
    assert history.silent_layers == ["2"]


def test_mixed_precision_reaches_the_module():
    seen = []
    module = torch.nn.Sequential(torch.nn.Linear(1, 1))
    module[0].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    for precision in ("bf16", "no"):
        fit(module, DATA, squared, line(steps=1, mixed_precision=precision), name="line")
        module(DATA[:2][0])
    assert seen == [torch.bfloat16, torch.float32, torch.float32, torch.float32]


def test_data_smaller_than_a_batch_is_one_batch():
    assert len(fit(torch.nn.Linear(1, 1), TensorDataset(*DATA[:5]), squared, line(steps=4), name="line").losses) == 4
    with pytest.raises(ValueError, match="data must hold at least one sample"):
        fit(torch.nn.Linear(1, 1), TensorDataset(torch.zeros(0, 1)), squared, line(), name="line")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be >= 1; got 0"),
        ({"steps": 1.5}, "steps must be a whole number; got 1.5"),
        ({"seed": 2**70}, r"seed must be < 2\*\*32; got"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite and >= 0; got nan"),
        ({"batch_size": 0}, "batch_size must be >= 1; got 0"),
        ({"validate_every": -1}, "validate_every must be >= 0; got -1"),
        ({"lr": 0.0}, "lr must be > 0 .*got lr=0.0"),
        ({"lr": float("nan")}, "lr must be > 0"),
        ({"lr_min": 1.0}, r"lr_min in \[0, lr\]; got lr=0.1, lr_min=1.0"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be no, bf16 or fp16; got 'fp8'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        line(**options)
