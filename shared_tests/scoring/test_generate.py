"""Sampling: draws follow the distribution, text ends with its document, the state is carried. Budget: 5 s."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core import rng
from core.config import ConfigError
from core.data.bundled import open_data
from core.data.dataset import Dataset
from core.training.generate import choose, sample


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """The bundled text."""
    return open_data("sample")


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.05, 0.25]))
    draws = rng.uniform(0, "draws", 4000)
    counts = np.bincount([choose(logits, 1.0, None, d) for d in draws], minlength=4) / 4000
    assert np.abs(counts - [0.1, 0.6, 0.05, 0.25]).max() < 0.03
    assert {choose(logits, 1.0, 2, d) for d in draws[:200]} == {1, 3}
    assert {choose(logits, 0.0, None, d) for d in draws[:50]} == {1}
    sharp = np.bincount([choose(logits, 0.5, None, d) for d in draws], minlength=4) / 4000
    assert abs(sharp[1] - 0.36 / (0.01 + 0.36 + 0.0025 + 0.0625)) < 0.03
    assert choose(np.zeros(3), 1.0, None, 1 - 2.0**-32) == 2 and choose(np.zeros(3), 1.0, None, -1 + 2.0**-32) == 0


class Scripted:
    """An engine that wants to say the given tokens, one after the other, and notes what it was shown."""

    def __init__(self, ids: list[int], vocab: int) -> None:
        self.ids, self.vocab, self.shown = ids, vocab, []

    def start(self, rows: int) -> tuple[int, ...]:
        return ()

    def chunk(self, state: tuple[int, ...], tokens: np.ndarray) -> Any:
        (row,) = tokens.tolist()
        self.shown.append((*state, *row))
        out = np.zeros((1, len(row), self.vocab), np.float32)
        out[0, -1, self.ids[len(self.shown) - 1]] = 50.0
        return SimpleNamespace(logits=lambda: out, state=(*state, *row))

    def commit(self, tape: Any, n: int) -> tuple[int, ...]:
        return tape.state


def test_text_ends_at_the_next_document_and_no_token_is_read_twice(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    ids = tokenizer.encode("She was glad of it").tolist()
    engine: Any = Scripted([*ids, tokenizer.bos, ids[0]], tokenizer.vocab)
    assert sample(engine, tokenizer, "", 50, 1.0, None, 0, None) == "She was glad of it"
    assert engine.shown == [(tokenizer.bos, *ids[:n]) for n in range(len(ids) + 1)]
    with pytest.raises(ConfigError, match="tokens=0"):
        sample(engine, tokenizer, "", 0, 1.0, None, 0, 4)


def test_attention_looks_back_no_further_than_its_limit(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    ids = tokenizer.encode("She was glad of it, and so was he").tolist()
    engine: Any = Scripted([*ids, tokenizer.bos], tokenizer.vocab)
    assert sample(engine, tokenizer, "", 50, 1.0, None, 0, 4) == "She was glad of it, and so was he"
    text = [tokenizer.bos, *ids]
    assert max(map(len, engine.shown)) == 4
    assert [len(shown) for shown in engine.shown[:8]] == [1, 2, 3, 4, 2, 3, 4, 2]
    for n, shown in enumerate(engine.shown, 1):
        assert list(shown) == text[n - len(shown) : n]
