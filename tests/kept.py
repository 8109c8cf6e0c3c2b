"""What autograd keeps for a backward pass, counted."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def counted(known: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of every piece of memory that is saved inside, once each by its address, that of ``known`` left out."""
    addresses = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in addresses:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor  # held by the graph, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
