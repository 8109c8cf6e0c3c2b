import json
import shutil
import signal

import pytest
import torch

from spikeclip import SpikeCLIP
from spikeclip.models import load_config


@pytest.fixture
def saved(tmp_path):
    model = SpikeCLIP.from_config("spikeclip-demo").eval()
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_saved_and_loaded_model_is_the_same(saved):
    model, folder = saved
    again = SpikeCLIP.from_pretrained(folder)
    assert again.config == model.config and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.encode_image(images), model.encode_image(images))


def test_saving_over_a_model_leaves_no_other_files(saved):
    model, folder = saved
    model.save_pretrained(folder)
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}


def test_a_save_that_fails_leaves_the_earlier_model_whole(saved, monkeypatch):
    model, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(self, directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SpikeCLIP, "_save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_packaged_student_loads_and_knows_unseen_pairs():
    from spikeclip.training.data import load
    from spikeclip.zeroshot import class_vectors, evaluate

    model = SpikeCLIP.from_pretrained("spikeclip-demo")
    data = load("compositions-unseen", split="test", n=500)
    assert evaluate(model, data, class_vectors(model, data.classes, data.templates)).top1 >= 0.78


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def foreign_weights(folder):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, folder / "model.safetensors")


def another_config(folder):
    values = json.loads((folder / "config.json").read_text())
    values["vision"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(values))


def bad_key(folder):
    (folder / "config.json").write_text(json.dumps({"hello": 1}))


def further_key(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "hello": 1}))


def wrong_type(folder):
    values = json.loads((folder / "config.json").read_text())
    values["vision"]["depth"] = "two"
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "could not be loaded"),
        (foreign_weights, "could not be loaded.*Missing key"),
        (another_config, "could not be loaded.*Missing key"),
        (bad_key, "could not be loaded"),
        (further_key, "could not be loaded.*unknown settings hello"),
        (wrong_type, "could not be loaded.*vision.depth must be of type int; got 'two'"),
        (lambda f: (f / "config.json").write_text("[1]"), "could not be loaded"),
        (lambda f: (f / "config.json").write_text("{"), "could not be loaded"),
        (lambda f: (f / "config.json").unlink(), r"not a saved SpikeCLIP: it has no config\.json"),
        (lambda f: (f / "model.safetensors").unlink(), r"not a saved SpikeCLIP: it has no model\.safetensors"),
    ],
)
def test_bad_checkpoints_are_one_clear_line(saved, harm, message):
    _, folder = saved
    harm(folder)
    with pytest.raises(ValueError, match=message) as caught:
        SpikeCLIP.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_full_disk_is_an_oserror_and_leaves_the_earlier_model(saved):
    resource = pytest.importorskip("resource")
    model, folder = saved
    before = (folder / "model.safetensors").read_bytes()
    old, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
        with pytest.raises(OSError, match="model.safetensors could not be written|File too large"):
            model.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (folder / "model.safetensors").read_bytes() == before and not list(folder.glob(".saving-*"))
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


def test_a_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="model must be spikeclip-demo, the folder of a saved model, or a Hub"):
        SpikeCLIP.from_pretrained(tmp_path / "nothing")


def test_config_from_a_json_file(tmp_path):
    from spikeclip.models.config import CONFIGS

    path = shutil.copy(CONFIGS / "spikeclip-demo.json", tmp_path / "mine.json")
    assert load_config(str(path)) == load_config("spikeclip-demo")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_config(str(tmp_path / "bad.json"))
