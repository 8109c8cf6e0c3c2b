"""What tests of the counts count themselves."""

import torch
from torch import nn


class Run(nn.Module):
    """A function of the input and of weights."""

    def __init__(self, function, *weights):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(weights)

    def forward(self, x):
        return self.function(x, *self.weights)


def spikes(*shape, rate=0.3):
    return (torch.rand(shape) < rate).float()


def met(product, x, w, *args, **kwargs):
    """Operations on two factors that are not 0: the product of their zeros and ones, added up."""
    return product((x != 0).double(), (w != 0).double(), *args, **kwargs).sum().item()
