"""The spiking text tower: an MLP of spiking neurons over CLIP's token embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import LIF, DirectEncoding, SpikeLinear
from .config import LIFConfig, TextConfig
from .readout import StepReadout
from .teacher import Teacher


class SpikingTextEncoder(nn.Module):
    """Token ids ``[B, L]`` to features ``[B, embed_dim]``: LIF, Linear, LIF, Linear, readout (paper, text tower).

    The token and position embeddings are the teacher's (:meth:`load_embedding`) and frozen. Raises ValueError for ids of
    the wrong shape or outside the vocabulary.
    """

    def __init__(self, config: TextConfig, embed_dim: int, T: int, lif: LIFConfig, vocab_size: int):
        super().__init__()
        flat = config.context_length * config.embedding_width
        self.context_length = config.context_length
        self.token_embedding = nn.Embedding(vocab_size, config.embedding_width).requires_grad_(False)
        self.positional_embedding = nn.Parameter(
            torch.zeros(config.context_length, config.embedding_width), requires_grad=False
        )
        self.norm1 = nn.BatchNorm1d(flat) if config.norm else nn.Identity()
        self.encode = DirectEncoding(T)
        self.lif1 = LIF(**lif.neuron())
        self.fc1 = SpikeLinear(flat, config.hidden)
        self.norm2 = nn.BatchNorm1d(config.hidden) if config.norm else nn.Identity()
        self.lif2 = LIF(**lif.neuron())
        self.fc2 = SpikeLinear(config.hidden, embed_dim)
        self.readout = StepReadout(T)

    def load_embedding(self, teacher: Teacher) -> None:
        """Copy the teacher's token table and its first positions. Raises ValueError when their sizes do not fit."""
        table, positions = teacher.token_embedding, teacher.positional_embedding[: self.context_length]
        for name, mine, theirs in (
            ("token table", self.token_embedding.weight, table),
            ("positions", self.positional_embedding, positions),
        ):
            if mine.shape != theirs.shape:
                raise ValueError(f"the teacher's {name} must be {list(mine.shape)}; got {list(theirs.shape)}")
        with torch.no_grad():
            self.token_embedding.weight.copy_(table)
            self.positional_embedding.copy_(positions)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.shape[1] != self.context_length:
            raise ValueError(f"tokens must have shape [B, {self.context_length}]; got {list(tokens.shape)}")
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens must be integers; got {tokens.dtype}")
        vocabulary = self.token_embedding.num_embeddings
        if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary):
            raise ValueError(
                f"tokens must lie in 0..{vocabulary - 1}, this model's vocabulary; got {int(tokens.min())}..{int(tokens.max())}"
            )
        x = (self.token_embedding(tokens) + self.positional_embedding).flatten(1)
        s = self.lif1(self.encode(self.norm1(x)))
        h = self.fc1(s)
        h = self.norm2(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        return self.readout(self.fc2(self.lif2(h)))
