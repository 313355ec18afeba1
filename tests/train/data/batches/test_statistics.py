import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.batches import statistics


def slow_entropy(documents, mask, vocab_size):
    train = Counter(token for document, held in zip(documents, mask, strict=True) if not held for token in document[1:])
    held = [token for document, held in zip(documents, mask, strict=True) if held for token in document[1:]]
    total = sum(train.values()) + vocab_size
    return -sum(math.log((train[token] + 1) / total) for token in held) / len(held)


@given(st.data(), st.integers(1, 7))
def test_equals_the_slow_count_for_any_cutting(data, chunk):
    documents = data.draw(st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=9))
    mask = data.draw(st.lists(st.booleans(), min_size=len(documents), max_size=len(documents)))
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    offsets = np.cumsum([0, *map(len, documents)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_CHUNK", chunk)
        if not any(held and len(document) > 1 for document, held in zip(documents, mask, strict=True)):
            with pytest.raises(ValueError, match="no token"):
                statistics.unigram_entropy(tokens, offsets, np.array(mask), 6)
            return
        fast = statistics.unigram_entropy(tokens, offsets, np.array(mask), 6)
    assert fast == pytest.approx(slow_entropy(documents, mask, 6))


def test_large_corpora_are_sampled():
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 50, 40_000).astype(np.uint16)
    offsets = np.arange(0, 40_001, 100)
    mask = np.arange(400) % 10 == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "_CHUNK", 1000)
        whole, part = (
            statistics.unigram_entropy(tokens, offsets, mask, 50, max_train_tokens=n) for n in (40_000, 8_000)
        )
    assert whole != part
    assert whole == pytest.approx(part, rel=0.01)
