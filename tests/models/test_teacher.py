import json
import shutil

import open_clip
import pytest
import torch

from spikeclip import SpikeCLIP
from spikeclip.models import load_teacher
from spikeclip.training.compositions import LABELS, TEMPLATES, UNSEEN
from spikeclip.training.data import Rendered
from spikeclip.zeroshot import class_vectors, evaluate


def test_packaged_teacher_knows_pairs_it_never_saw():
    teacher = load_teacher()
    vectors = class_vectors(teacher, LABELS, TEMPLATES)
    unseen = Rendered(500, seed=77, classes=UNSEEN)
    assert evaluate(teacher, unseen, vectors).top1 >= 0.93


def test_teacher_is_frozen_and_stays_in_eval():
    teacher = load_teacher()
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train().training and not any(m.training for m in teacher.modules())
    twin = teacher.image_tower_unfrozen()
    assert all(p.requires_grad for p in twin.clip.visual.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_images_of_other_sizes_are_resized():
    teacher = load_teacher()
    assert teacher.encode_image(torch.rand(2, 3, 80, 80)).shape == (2, teacher.embed_dim)


def test_any_open_clip_model_from_a_local_file(tmp_path):
    clip = open_clip.create_model("RN50")
    path = tmp_path / "weights.pt"
    torch.save(clip.state_dict(), path)
    teacher = load_teacher("RN50", str(path))
    assert teacher.embed_dim == 1024 and teacher.image_size == (224, 224)
    assert teacher.token_embedding.shape == (49408, 512) and teacher.positional_embedding.shape == (77, 512)
    images = torch.rand(1, 3, 224, 224)
    preprocess = clip.visual.preprocess_cfg
    mean, std = (torch.tensor(preprocess[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(teacher.encode_image(images), clip.eval().encode_image((images - mean) / std))


def test_the_papers_text_tower_takes_the_embeddings_of_a_vit_teacher():
    teacher = load_teacher_untrained("ViT-B-16")
    model = SpikeCLIP.from_config("spikeclip-4-384")
    model.text.load_embedding(teacher)
    assert torch.equal(model.text.token_embedding.weight, teacher.token_embedding)
    assert torch.equal(model.text.positional_embedding, teacher.positional_embedding[:20])


def load_teacher_untrained(name):
    from spikeclip.models import Teacher

    clip = open_clip.create_model(name)
    return Teacher(clip, open_clip.get_tokenizer(name), (0.0,) * 3, (1.0,) * 3)


def test_a_student_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"the teacher's token.* must be \[.*; got \["):
        SpikeCLIP.from_config("spikeclip-4-384").text.load_embedding(load_teacher())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "name must be 'spikeclip-demo-teacher', a folder .*got 'nothing'"),
        (("ViT-B-16",), "pretrained must be a weights file or one of openai, .*got None"),
        (("ViT-B-16", "nope"), "pretrained must be a weights file or one of .*got 'nope'"),
        (("spikeclip-demo-teacher", "nope"), "pretrained must be left out for spikeclip-demo-teacher.*got 'nope'"),
    ],
)
def test_bad_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(*arguments)


def test_a_folder_or_file_without_weights_is_no_random_teacher(tmp_path):
    from spikeclip.models.teacher import PRETRAINED

    shutil.copytree(PRETRAINED / "spikeclip-demo-teacher", tmp_path / "teacher")
    for weights in (tmp_path / "teacher").glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match="could not be loaded"):
        load_teacher(str(tmp_path / "teacher"))
    torch.save({}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="it holds no weights"):
        load_teacher("RN50", str(tmp_path / "empty.pt"))


@pytest.mark.parametrize("images", [torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)], ids=["one", "uint8"])
def test_images_of_another_shape_or_dtype(images):
    with pytest.raises(ValueError, match=r"images must be floating, \[B, 3, H, W\] in \[0, 1\]; got"):
        load_teacher().encode_image(images)


def test_unreadable_weights_and_folders(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_teacher("RN50", str(tmp_path / "weights.pt"))
    with pytest.raises(ValueError, match=r"needs a readable open_clip_config\.json"):
        load_teacher(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    with pytest.raises(ValueError, match=r"needs a readable open_clip_config\.json"):
        load_teacher(str(tmp_path))
