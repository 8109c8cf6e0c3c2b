import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from spikeclip import SpikeCLIP, cli
from spikeclip.training.compositions import render


@pytest.fixture
def said(capsys):
    """Run a verb in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        code = 0
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "star.png"
    drawn = render(80, seed=9)
    row = next(i for i, text in enumerate(drawn.captions) if "large solid" in text)
    Image.fromarray((drawn.images[row] * 255).byte().permute(1, 2, 0).numpy()).save(path)
    return path, drawn.captions[row].split(" on a ")[0].removeprefix("a photo of a large solid ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 pictures of two classes, as files."""
    root = tmp_path_factory.mktemp("folder")
    drawn = render(60, seed=1)
    for i, (image, label) in enumerate(zip(drawn.images, drawn.labels.tolist(), strict=True)):
        (root / ("odd" if label % 2 else "even")).mkdir(exist_ok=True)
        path = root / ("odd" if label % 2 else "even") / f"{i}.png"
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(path)
    return root


def test_all_stages_by_verbs(said, tmp_path, folder, monkeypatch):
    asked = []
    monkeypatch.setattr(SpikeCLIP, "set_grad_checkpointing", lambda model, enable: asked.append(enable))
    few = ("--steps", 3, "--batch-size", 32)
    data = ("--data", "folder", "--root", folder)
    code, out, err = said("align-text", "--out", tmp_path / "a", *few)
    assert code == 0 and "3 steps" in out and SpikeCLIP.from_pretrained(tmp_path / "a"), err
    code, out, err = said(
        "align-image", "--model", tmp_path / "a", "--out", tmp_path / "b", "--grad-checkpointing", *data, *few
    )
    assert code == 0 and "best validation top-1" in out, err
    code, out, err = said("finetune", "--model", tmp_path / "b", "--out", tmp_path / "c", "--adapt-steps", 2, *data, *few)
    assert code == 0 and "saved in" in out, err
    assert (tmp_path / "c" / "finetune.jsonl").is_file() and asked == [True, False]
    code, out, err = said("eval", "--model", tmp_path / "c", "--data", "compositions-unseen", "--split", "val")
    assert code == 0 and "top-1" in out and "top-5" in out and "of 1000 images, 80 labels" in out, err


def test_zeroshot_answers_for_ones_own_image(said, picture):
    path, label = picture
    other = "blue ring"
    code, out, _ = said("zeroshot", "--image", path, "--labels", f"{other}, {label}, pink moon")
    assert code == 0 and out.startswith(f"{path}: {label} ")
    shares = [float(part.rsplit(" ", 1)[1].rstrip("%\n")) for part in out.split(": ")[1].split(", ")]
    assert abs(sum(shares) - 100) < 0.3 and shares == sorted(shares, reverse=True)


def test_zeroshot_says_which_words_it_does_not_know(said, picture):
    code, out, err = said("zeroshot", "--image", picture[0], "--labels", "red star, tabby cat")
    assert code == 0 and "does not know the words tabby, cat" in err


def test_eval_per_class(said):
    code, out, _ = said("eval", "--data", "compositions", "--per-class")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 81 and any(line.endswith("no images") for line in lines) and "red circle" in lines[1]
    code, out, _ = said("eval", "--data", "compositions", "--split", "val", "--per-class")
    assert code == 0 and len(out.splitlines()) == 61 and "no images" not in out


def test_info_names_backends_and_reasons(said):
    code, out, _ = said("info")
    assert code == 0 and "lif on cpu: auto takes cpu" in out and "instruction set" in out and "CUDA extension:" in out
    assert "triton: " in out and "torch: available" in out


def test_energy_prints_and_writes_what_an_answer_costs(said, tmp_path):
    files = {name: tmp_path / "deep" / f"e.{name}" for name in ("json", "csv")}
    given = [part for name, path in files.items() for part in (f"--{name}", path)]
    given += ["--report", tmp_path / "e.html", "--figures", tmp_path / "figures", "--latex", "--measure"]
    code, out, err = said("energy", "--n", 4, *given)
    assert code == 0, err
    assert "4 samples, T = 4" in out and "lemaire-2022" in out and "ANN W8A3" in out
    assert "measured, SNN, int8 weights" in out and r"spikeclip-demo (45nm-fp32) & 4 &" in out
    content = json.loads(files["json"].read_text())
    assert content["profile"]["samples"] == 4 and content["profile"]["prompts"] > 0 and len(content["estimates"]) == 5
    assert content["measured"]["ANN twin, fp32, eager"]["latency"] > 0
    assert files["csv"].read_text().startswith("kind,name,op") and "<svg" in (tmp_path / "e.html").read_text()
    assert (tmp_path / "figures" / "comparison.png").is_file()


def test_energy_under_one_cost_model_or_ones_own(said, tmp_path):
    code, out, _ = said("energy", "--n", 2, "--cost", "45nm-int8")
    assert code == 0 and "45nm-int8" in out and "lemaire" not in out
    code, _, err = said("energy", "--n", 2, "--cost", "7nm")
    assert code == 2 and "cost model must be one of 45nm-fp32" in err
    SpikeCLIP.from_pretrained("spikeclip-demo").for_inference("int8").save_pretrained(tmp_path / "ready")
    code, _, err = said("energy", "--model", tmp_path / "ready")
    assert code == 2 and "model must be one that learns" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zeroshot", "--image", "no.png", "--labels", "a, b"), "image must be a readable picture; no.png"),
        (("zeroshot", "--image", "no.png", "--labels", "a"), "labels must name at least two candidates"),
        (
            ("zeroshot", "--image", "no.png", "--labels", "a, b", "--model", "/no/model"),
            "model must be spikeclip-demo, the folder of",
        ),
        (("eval", "--data", "mnist"), "data must be one of"),
        (("eval", "--data", "cifar10"), "root must be a folder"),
        (("align-text", "--out", "/proc/nothing/here"), "No such file or directory"),
        (("align-text", "--out", "x", "--steps", "0"), "steps must be >= 1; got 0"),
        (("align-text", "--out", "x", "--sentences", "/no/file"), "sentences must be a readable text file"),
        (("align-text", "--out", "x", "--teacher", "nobody"), "name must be 'spikeclip-demo-teacher'"),
        (("align-text", "--out", "x", "--model", "spikeclip-4-384"), "the teacher's token"),
        (
            ("finetune", "--model", "spikeclip-demo", "--out", "x", "--kl-weight", "-1"),
            "kl_weight must be finite and >= 0; got -1.0",
        ),
        (("align-image", "--model", "spikeclip-demo", "--out", "x", "--lr", "0"), "lr must be > 0"),
        (("align-text", "--out", "x", "--seed", str(2**70)), "seed must be < 2**32"),
        (("align-text", "--out", "x", "--pretrained", "nope"), "pretrained must be left out for spikeclip-demo-teacher"),
        (("zeroshot", "--image", "no.png", "--labels", "a, a"), "labels must name at least two candidates, all different"),
        (("eval", "--data", "compositions", "--model", "spikeclip-dmo"), "model must be spikeclip-demo, the folder of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(said, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = said(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("spikeclip: ")]
    assert code == 2 and len(lines) == 1 and message in lines[0] and "Traceback" not in err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_device_that_is_not_there(said):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    code, _, err = said("eval", "--data", "compositions", "--device", "cuda")
    assert code == 2 and "device must be auto or cpu where there is no CUDA device; got 'cuda'" in err


def test_the_seed_sets_the_weights_a_new_model_starts_from(said, tmp_path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert said("align-text", "--out", tmp_path / name, "--steps", 1, "--batch-size", 16, "--seed", seed)[0] == 0
        weights.append(SpikeCLIP.from_pretrained(tmp_path / name).visual.state_dict())
    same, other = ([torch.equal(a, b) for a, b in zip(weights[0].values(), w.values(), strict=True)] for w in weights[1:])
    assert all(same) and not all(other)


def test_unknown_verbs_and_options_exit_with_2(said):
    assert said("paint")[0] == 2 and said("demo", "--colour", "red")[0] == 2


def test_a_disk_that_fills_up_keeps_the_earlier_checkpoint(said, tmp_path, monkeypatch):
    assert said("align-text", "--out", tmp_path, "--steps", 2, "--batch-size", 16)[0] == 0
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(self, directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SpikeCLIP, "_save_pretrained", full)
    code, _, err = said("align-text", "--out", tmp_path, "--steps", 3, "--batch-size", 16)
    assert code == 2 and "No space left on device" in err and "Traceback" not in err
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".saving-*"))


def test_ctrl_c_ends_with_130_and_a_whole_checkpoint(tmp_path, folder):
    command = [sys.executable, "-m", "spikeclip", "align-image", "--model", "spikeclip-demo", "--out", str(tmp_path)]
    command += ["--data", "folder", "--root", str(folder)]
    command += ["--steps", "100000", "--batch-size", "16", "--validate-every", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 120
    while not (tmp_path / "model.safetensors").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err, err
    assert SpikeCLIP.from_pretrained(tmp_path)
