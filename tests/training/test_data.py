import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from spikeclip.training.data import DATASETS, load, open_image


@pytest.fixture
def cifar(tmp_path):
    """A CIFAR-10 of 10 pictures a batch, in torchvision's files; integrity checks are by name of the folder's files."""
    import torchvision

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
        with (folder / name).open("wb") as file:
            pickle.dump({"data": data, "labels": list(range(10))}, file)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    with (folder / "batches.meta").open("wb") as file:
        pickle.dump({"label_names": names}, file)
    return tmp_path, torchvision


def test_cifar_from_torchvisions_files(cifar, monkeypatch):
    root, torchvision = cifar
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    train, val, test = (load("cifar10", root, split=split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (45, 5, 10)
    assert train.classes[:2] == ("airplane", "automobile")
    image, label = test[3]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1 and label == 3


def test_stl10_from_torchvisions_files(tmp_path, monkeypatch):
    import torchvision

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for part, n in (("train", 20), ("test", 6)):
        np.zeros((n, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{part}_X.bin")
        (np.arange(n, dtype=np.uint8) % 10 + 1).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"thing_{i}" for i in range(10)))
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    train, test = load("stl10", tmp_path, split="train"), load("stl10", tmp_path, split="test")
    assert len(train) == 18 and len(test) == 6 and test[0][0].shape == (3, 32, 32) and test.classes[1] == "thing 1"


def pictures(root, classes=("cat", "wild_dog"), n=20):
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (40 + i, 50), (index * 200, i, 0)).save(root / name / f"{i}.png")


def test_a_folder_of_ones_own_is_cut_three_ways_without_overlap(tmp_path):
    pictures(tmp_path)
    parts = [load("folder", tmp_path, split=split, seed=3) for split in ("train", "val", "test")]
    indices = [set(part.images.indices) for part in parts]
    assert [len(i) for i in indices] == [32, 4, 4] and set.union(*indices) == set(range(40))
    assert parts[0].classes == ("cat", "wild dog") and parts[0][0][0].shape == (3, 32, 32)
    assert set(load("folder", tmp_path, split="val", seed=3).images.indices) == indices[1]


def test_splits_of_compositions_are_different_pictures():
    train, val, test = (load("compositions", split=split, n=50).images.pixels for split in ("train", "val", "test"))
    assert not torch.equal(train, val) and not torch.equal(val, test) and not torch.equal(train, test)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_images_of_any_mode_and_shape_become_rgb_squares(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (71, 45), (255, 0, 0)).convert(mode).save(path)
    image = open_image(path, 32)
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1


@pytest.mark.parametrize("content", [b"", b"not a picture", "truncated"])
def test_unreadable_images(tmp_path, content):
    path = tmp_path / "a.png"
    if content == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"image must be a readable picture; .*a\.png"):
        open_image(path, 32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {}, "data must be one of compositions, .*got 'mnist'"),
        ("compositions", {"split": "all"}, "split must be one of train, val, test; got 'all'"),
        ("compositions", {"n": 0}, "n must be >= 1; got 0"),
        ("compositions", {"image_size": 64}, "image_size of compositions is 32; got 64"),
        ("compositions-unseen", {"split": "train"}, "pairs that no training may see"),
        ("cifar10", {}, "root must be a folder with the files of cifar10; got None"),
        ("folder", {"root": "/nonexistent"}, "root must be a folder"),
    ],
)
def test_bad_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, **options)


def test_a_broken_training_picture_is_named(tmp_path):
    for i in range(12):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / f"{i}.png").write_bytes(b"not a picture")
    train = load("folder", tmp_path, split="train")
    with pytest.raises(ValueError, match=r"image must be a readable picture; .*cat/\d+\.png"):
        train.images[0]


def test_too_few_images_for_a_split(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "0.png")
    with pytest.raises(ValueError, match="root must hold enough images for a train split of folder"):
        load("folder", tmp_path, split="train")


def test_a_folder_without_the_files_says_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match=r"does not hold torchvision's CIFAR10; fetch it with torchvision\.datasets\.CIFAR10"):
        load("cifar10", tmp_path)
    with pytest.raises(ValueError, match="one subfolder of images per class"):
        load("folder", tmp_path)
    assert len(DATASETS) == 11
