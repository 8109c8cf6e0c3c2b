"""Which dtypes torch's products are made in."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "addmm", "bmm", "linear", "convolution", "convolution_backward", "mkldnn_convolution"}


class Multiplied(TorchDispatchMode):
    """The dtypes that torch's products were given."""

    def __init__(self):
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._schema.name.rpartition("::")[2] in PRODUCTS:
            self.dtypes |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return op(*args, **(kwargs or {}))
