"""open_clip's BPE tokenizer, optionally cut to the few ids that a small model knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor


@cache
def _bpe():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


class Tokenizer:
    """Text to token ids, ``str | list[str] -> int64 [B, context_length]``, as open_clip's tokenizers.

    With a ``vocabulary`` of CLIP ids the table is cut: 0 pads, 1 stands for every unknown token, and the known ids follow in
    their order, so that the end token keeps the largest id (CLIP's text tower finds it so). Longer texts are truncated.

    Args:
        context_length: tokens a text, start and end included, >= 3 (the paper uses 20).
        vocabulary: CLIP token ids that are known besides start and end; None keeps all 49,408.

    Raises:
        ValueError: an argument outside the above.
    """

    def __init__(self, context_length: int = 20, vocabulary: Sequence[int] | None = None):
        if context_length < 3:
            raise ValueError(f"context_length must be >= 3; got {context_length}")
        self.context_length = context_length
        self.vocabulary = None if vocabulary is None else tuple(sorted(set(vocabulary)))
        full = _bpe().vocab_size
        if self.vocabulary is not None and not all(0 < i < full for i in self.vocabulary):
            raise ValueError(f"vocabulary must hold CLIP token ids in 1..{full - 1}")
        if self.vocabulary is not None:
            bpe = _bpe()
            kept = sorted({*self.vocabulary, bpe.sot_token_id, bpe.eot_token_id})
            self._table = torch.ones(full, dtype=torch.int64)
            self._table[0] = 0
            self._table[kept] = torch.arange(2, len(kept) + 2)
            self.vocab_size = len(kept) + 2
        else:
            self._table = None
            self.vocab_size = full

    @classmethod
    def for_corpus(cls, texts: Iterable[str], context_length: int = 20) -> Tokenizer:
        """A tokenizer cut to the tokens of ``texts``."""
        return cls(context_length, sorted({token for text in texts for token in _bpe().encode(text)}))

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        tokens = _bpe()(texts, context_length or self.context_length)
        return tokens if self._table is None else self._table[tokens]

    def unknown_words(self, text: str) -> list[str]:
        """The words of ``text`` that hold a token outside the vocabulary, in order."""
        if self.vocabulary is None:
            return []
        known = set(self.vocabulary)
        return [word for word in text.split() if not known.issuperset(_bpe().encode(word))]
