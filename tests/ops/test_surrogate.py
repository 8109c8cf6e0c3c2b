import math

import oracle
import pytest
import torch

from spikeclip.ops.surrogate import SURROGATES

# The functions whose derivatives SpikingJelly's surrogates are, from 0 at -inf to 1 at +inf.
PRIMITIVES = {
    "sigmoid": lambda u, a: torch.sigmoid(a * u),
    "atan": lambda u, a: torch.atan(math.pi / 2 * a * u) / math.pi + 0.5,
    "piecewise_quadratic": lambda u, a: torch.where(
        u.abs() <= 1 / a, -(a**2) / 2 * u.abs() * u + a * u + 0.5, (u > 0).to(u.dtype)
    ),
    "piecewise_exp": lambda u, a: torch.where(u < 0, 0.5 * torch.exp(a * u), 1 - 0.5 * torch.exp(-a * u)),
    "soft_sign": lambda u, a: 0.5 * (a * u / (1 + (a * u).abs()) + 1),
    "erf": lambda u, a: 0.5 * torch.erfc(-a * u),
}


@pytest.mark.parametrize("name", PRIMITIVES)
@pytest.mark.parametrize("alpha", [0.7, 3.0])
def test_surrogates_are_derivatives_of_their_functions(name, alpha):
    u = torch.linspace(-3, 3, 601, dtype=torch.float64).add(1e-3).requires_grad_()
    (want,) = torch.autograd.grad(PRIMITIVES[name](u, alpha).sum(), u)
    u = u.detach()
    torch.testing.assert_close(SURROGATES[name].grad(u, alpha), want)
    torch.testing.assert_close(oracle.surrogate_gradient(name, alpha)(u), want)


def test_the_two_without_such_a_function():
    u = torch.tensor([-1.0, 0.0, 0.25, 3.0], dtype=torch.float64)
    torch.testing.assert_close(SURROGATES["super_spike"].grad(u, 2.0), torch.tensor([0.5, 2.0, 1.28, 0.125]).double())
    torch.testing.assert_close(SURROGATES["triangle"].grad(u, 2.0), torch.tensor([0.0, 1.0, 0.5, 0.0]).double())


def test_defaults_are_the_fields():
    alphas = {name: row.alpha for name, row in SURROGATES.items()}
    assert alphas == {
        "sigmoid": 4.0, "atan": 2.0, "piecewise_quadratic": 1.0, "piecewise_exp": 1.0, "soft_sign": 2.0, "super_spike": 1.0,
        "erf": 2.0, "triangle": 1.0,
    }  # fmt: skip
