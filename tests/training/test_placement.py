"""Data meet a model on the model's device. PyTorch's meta device plays the accelerator, so no GPU is needed."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from spikeclip import SpikeCLIP
from spikeclip.models import load_teacher
from spikeclip.training import Settings, adapt_teacher, align_image, align_text, finetune, recipe
from spikeclip.training.data import Rendered
from spikeclip.zeroshot import class_vectors, classify, evaluate

MOVES = ("to", "copy_", "__deepcopy__")
READS = {"cpu": lambda t: t, "tolist": torch.Tensor.tolist, "item": torch.Tensor.item, "__int__": int, "__bool__": bool}
NAMES, TEMPLATES = ["red star", "blue ring"], ["a photo of a {}.", "a {}."]
FEW = Settings(steps=1, batch_size=8, lr=1e-3)


class Accelerator(TorchFunctionMode):
    """Makes meta tensors behave as a GPU's: they do not mix with CPU tensors, and can be read back (as zeros)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if name in READS and tensors[0].is_meta:
            return READS[name](torch.zeros(tensors[0].shape, dtype=tensors[0].dtype))
        devices = {t.device.type for t in tensors if t.dim()}
        if len(devices) > 1 and name not in MOVES:
            raise RuntimeError(f"{name} got tensors on {devices}")
        return function(*args, **kwargs)


@pytest.fixture
def models():
    student, teacher = SpikeCLIP.from_config("spikeclip-demo").to("meta").eval(), load_teacher().to("meta")
    with Accelerator():
        yield student, teacher


@pytest.fixture
def losses(monkeypatch):
    """Replaces the loop by one call of the stage's loss on a batch that stands on the accelerator, as accelerate puts it."""
    devices = []

    def once(module, data, loss, settings, **options):
        batch = next(iter(DataLoader(data, settings.batch_size)))
        moved = torch.utils._pytree.tree_map(lambda t: t.to("meta"), batch)
        devices.append(loss(module, moved)[0].device.type)

    monkeypatch.setattr(recipe, "fit", once)
    return devices


def test_the_stand_in_refuses_to_mix_devices():
    with Accelerator(), pytest.raises(RuntimeError, match="matmul got tensors on"):
        torch.ones(2, 2) @ torch.ones(2, 2, device="meta")


def test_classify_and_evaluate_move_images_and_vectors_to_the_model(models):
    for model in models:
        vectors = class_vectors(model, NAMES, TEMPLATES)
        assert vectors.device.type == "meta"
        for given in (vectors, torch.zeros(vectors.shape)):
            assert classify(model, torch.rand(3, 3, 32, 32), given).device.type == "meta"
            result = evaluate(model, TensorDataset(torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 1])), given)
            assert result.images == 3


def test_stages_move_data_to_the_models(models, losses):
    student, teacher = models
    task = TensorDataset(torch.rand(8, 3, 32, 32), torch.arange(8) % 2)
    pictures = Rendered(8, seed=1)
    replay = TensorDataset(torch.stack([image for image, _ in pictures]), recipe.image_features(teacher, pictures))
    assert replay.tensors[1].device.type == "cpu"
    align_text(student, teacher, ["a red star.", "a blue ring."], FEW)
    align_image(student, teacher, pictures, FEW)
    adapt_teacher(teacher, task, NAMES, TEMPLATES, FEW)
    finetune(student, teacher, task, NAMES, TEMPLATES, FEW, replay=replay)
    finetune(student, None, task, NAMES, TEMPLATES, FEW)
    assert losses == ["meta"] * 5
