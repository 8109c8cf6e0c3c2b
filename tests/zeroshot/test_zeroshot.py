import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from spikeclip.zeroshot import class_vectors, classify, evaluate


class Words(nn.Module):
    """A model whose text features are given by hand."""

    def __init__(self, features):
        super().__init__()
        self.features = features
        self.logit_scale = nn.Parameter(torch.tensor(2.0).log())
        self.tokenizer = lambda texts: torch.tensor([list(features).index(t) for t in texts])

    def encode_text(self, tokens, normalize=False):
        x = torch.stack([torch.tensor(list(self.features.values())[i]) for i in tokens])
        return nn.functional.normalize(x, dim=-1) if normalize else x

    def encode_image(self, images, normalize=False):
        return nn.functional.normalize(images, dim=-1) if normalize else images


MODEL = Words({"a cat": [3.0, 0.0], "the cat": [0.0, 1.0], "a dog": [-1.0, 0.0], "the dog": [-5.0, 0.0]})


def test_class_vectors_average_unit_features_and_are_unit_again():
    vectors = class_vectors(MODEL, ["cat", "dog"], ["a {}", "the {}"])
    torch.testing.assert_close(vectors, torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [-1.0, 0.0]]))


def test_probabilities_use_the_logit_scale():
    vectors = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    chances = classify(MODEL, torch.tensor([[5.0, 0.0]]), vectors)
    torch.testing.assert_close(chances[0, 0], torch.tensor(1 / (1 + math.exp(-4))))


def test_accuracy_counts_top1_top5_and_each_class():
    angles = torch.arange(8) * math.pi / 4
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    turned = angles[:1] + math.pi / 18  # nearest to 0, then 1, 7, 2, 6, 3, 5, 4
    turned = torch.stack([turned.cos(), turned.sin()], 1)
    images = torch.cat([vectors[[0, 1, 2]], turned.expand(3, 2)])
    labels = torch.tensor([0, 1, 2, 2, 6, 3])
    result = evaluate(MODEL, TensorDataset(images, labels), vectors, batch_size=2)
    assert result.top1 == pytest.approx(3 / 6) and result.top5 == pytest.approx(5 / 6) and result.images == 6
    assert result.per_class[:3] == (1.0, 1.0, 0.5) and result.per_class[3] == 0.0 and math.isnan(result.per_class[7])


def test_fewer_than_five_classes():
    vectors = torch.eye(2)
    assert evaluate(MODEL, TensorDataset(vectors, torch.tensor([1, 0])), vectors).top5 == 1.0


def test_the_model_keeps_its_mode():
    MODEL.train()
    evaluate(MODEL, TensorDataset(torch.eye(2), torch.tensor([0, 1])), torch.eye(2))
    assert MODEL.training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: class_vectors(MODEL, [], ["{}"]), "classes must name at least one class"),
        (lambda: class_vectors(MODEL, ["cat"], ["no place"]), r"templates must each hold a \{\}.*no place"),
        (lambda: class_vectors(MODEL, ["cat"], []), "templates must each hold"),
        (lambda: class_vectors(MODEL, "cat"), "classes must be a list of strings, not a string; got 'cat'"),
        (lambda: class_vectors(MODEL, ["cat"], "a {}"), "templates must be a list of strings"),
        (lambda: class_vectors(MODEL, ["cat", "cat"], ["{}"]), "classes must be distinct names, none empty"),
        (lambda: class_vectors(MODEL, ["cat", " "], ["{}"]), "classes must be distinct names, none empty"),
        (lambda: evaluate(MODEL, TensorDataset(torch.zeros(0, 2)), torch.eye(2)), "data must hold at least one image"),
        (
            lambda: evaluate(MODEL, TensorDataset(torch.eye(2), torch.tensor([0, 7])), torch.eye(2)),
            r"labels must lie in 0\.\.1, one vector each; got 0\.\.7",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
