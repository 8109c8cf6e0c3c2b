import open_clip
import pytest
import torch

from spikeclip.models import Tokenizer


def test_whole_vocabulary_is_open_clips_tokenizer():
    texts = ["a photo of a red star.", "Ünïcode & <html>", "", "word " * 50]
    assert torch.equal(Tokenizer(20)(texts), open_clip.tokenizer.SimpleTokenizer()(texts, 20))


def test_cut_vocabulary_keeps_order_and_the_largest_end():
    tokenizer = Tokenizer.for_corpus(["a red star", "a blue ring."])
    tokens = tokenizer(["a red star", "a blue ring.", "a plaid star"])
    end = tokenizer.vocab_size - 1
    assert (tokens.argmax(1) == torch.tensor([4, 5, 4])).all() and tokens.max() == end
    assert (tokens[0, 5:] == 0).all()
    assert tokens[0, 3] == tokens[2, 3] and tokens[2, 2] == 1
    assert tokenizer.unknown_words("a plaid star") == ["plaid"]
    assert Tokenizer(20).unknown_words("a plaid star") == []


def test_longer_text_is_cut_with_its_end_kept():
    tokenizer = Tokenizer.for_corpus(["a"], context_length=6)
    assert (tokenizer("a " * 30)[0, -1] == tokenizer.vocab_size - 1) and tokenizer("a " * 30).shape == (1, 6)


def test_bad_arguments():
    with pytest.raises(ValueError, match="context_length must be >= 3; got 2"):
        Tokenizer(2)
    with pytest.raises(ValueError, match=r"vocabulary must hold CLIP token ids in 1\.\.49407"):
        Tokenizer(20, [60_000])
