import math

import pytest
import torch

from spikeclip.training.losses import alignment_loss, dual_loss


def test_alignment_is_the_mean_of_one_minus_cosine():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    b = torch.tensor([[3.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
    torch.testing.assert_close(alignment_loss(a, b), torch.tensor((0 + 2 + 1 - math.sqrt(0.5)) / 3))


def test_dual_loss_by_hand():
    """One sample of two classes: teacher (0.8, 0.2), student (0.5, 0.5)."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.8, 0.2]]).log()
    total, ce, kl = dual_loss(student, torch.tensor([0]), teacher, kl_weight=3.0)
    want = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.2 / 0.5)
    torch.testing.assert_close(ce, torch.tensor(math.log(2)))
    torch.testing.assert_close(kl, torch.tensor(want))
    torch.testing.assert_close(total, ce + 3 * kl)


def test_both_terms_are_means_over_the_batch():
    logits, labels, teacher = torch.randn(7, 5), torch.randint(0, 5, (7,)), torch.randn(7, 5)
    once = dual_loss(logits, labels, teacher, temperature=2.0)
    twice = dual_loss(logits.repeat(2, 1), labels.repeat(2), teacher.repeat(2, 1), temperature=2.0)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b)


def test_temperature_softens_both_and_keeps_the_scale():
    logits, teacher = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    p, q = (t.div(2.0).softmax(1) for t in (teacher, logits))
    torch.testing.assert_close(dual_loss(logits, torch.tensor([0]), teacher, temperature=2.0)[2], 4 * (p * (p / q).log()).sum())


def test_without_a_teacher_cross_entropy_stands_alone():
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    total, ce, kl = dual_loss(logits, labels, None, kl_weight=9.0)
    assert torch.equal(total, torch.nn.functional.cross_entropy(logits, labels)) and torch.equal(total, ce) and kl == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: alignment_loss(torch.zeros(3, 4), torch.zeros(1, 4)),
            r"teacher must have student's shape, \[3, 4\]; got \[1, 4\]",
        ),
        (
            lambda: dual_loss(torch.zeros(3, 4), torch.zeros(2).long(), None),
            r"must be \[B, K\] and \[B\]; got \[3, 4\] and \[2\]",
        ),
        (
            lambda: dual_loss(torch.zeros(3, 4), torch.zeros(3).long(), torch.zeros(1, 4)),
            "teacher_logits must have logits' shape",
        ),
    ],
)
def test_shapes_that_do_not_match(call, message):
    with pytest.raises(ValueError, match=message):
        call()
