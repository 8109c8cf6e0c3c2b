import pytest
import torch

from spikeclip.training.compositions import COLOURS, LABELS, SEEN, SHAPES, TEMPLATES, UNSEEN, caption_corpus, render


def test_held_out_pairs_cover_every_colour_and_shape_and_leave_both_in_training():
    assert len(UNSEEN) == 20 and len(SEEN) == 60 and not set(SEEN) & set(UNSEEN) and len(set(SEEN) | set(UNSEEN)) == 80
    for words in (COLOURS, SHAPES):
        for word in words:
            assert any(word in LABELS[y].split() for y in SEEN)
    for shape in SHAPES:
        assert sum(LABELS[y].endswith(f" {shape}") for y in UNSEEN) == 2


def test_no_caption_of_training_names_a_held_out_pair():
    text = "\n".join([*caption_corpus(), *render(600, seed=0).captions, *render(600, seed=0, style="sketch").captions])
    assert not [LABELS[y] for y in UNSEEN if LABELS[y] in text]
    assert all(LABELS[y] in text for y in SEEN)
    assert all(LABELS[y] in "\n".join(t.format(LABELS[y]) for t in TEMPLATES) for y in SEEN)


@pytest.mark.parametrize("name", ["compositions", "compositions-sketch"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_training_sees_and_names_seen_pairs_alone(name, split):
    from spikeclip.training.data import load

    data = load(name, split=split, n=2000)
    assert data.classes == tuple(LABELS[y] for y in SEEN) and set(data.images.labels.tolist()) == set(range(60))


def test_pictures_repeat_from_their_seed_and_are_balanced():
    a, b, c = render(120, seed=3), render(120, seed=3), render(120, seed=4)
    assert torch.equal(a.images, b.images) and a.captions == b.captions and not torch.equal(a.images, c.images)
    assert a.images.shape == (120, 3, 32, 32) and a.images.min() >= 0 and a.images.max() <= 1
    assert torch.equal(torch.bincount(a.labels, minlength=80)[list(SEEN)], torch.full((60,), 2))


def test_pictures_show_the_colour_of_their_caption():
    drawn = render(400, seed=1, classes=tuple(range(80)))
    red = torch.tensor([c.split(" on a ")[0].split()[-2] == "red" for c in drawn.captions])
    blue = torch.tensor([c.split(" on a ")[0].split()[-2] == "blue" for c in drawn.captions])
    excess = (drawn.images[:, 0] - drawn.images[:, 2]).mean((1, 2))
    assert excess[red].mean() > 0.05 and excess[blue].mean() < -0.05
    assert (excess[red] > 0).float().mean() > 0.9 and (excess[blue] < 0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be >= 1; got 0"),
        ({"n": 1, "style": "oil"}, "style must be one of photo, sketch; got 'oil'"),
        ({"n": 1, "classes": (80,)}, r"classes must be label ids in 0\.\.79"),
        ({"n": 1, "classes": ()}, "classes must be label ids"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        render(**options, seed=0)
