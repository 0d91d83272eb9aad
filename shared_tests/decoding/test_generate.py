"""Sampling: draws follow the distribution, text ends with its document, each row has its state. Budget: 20 s."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core import rng
from core.config import ConfigError
from core.data.bundled import open_data
from core.data.dataset import Dataset
from core.decoding import generate
from core.decoding.generate import Text, sample, write
from core.decoding.samplers import choose
from core.decoding.settings import Decoding
from shared_tests.support.decoding import Numbers
from shared_tests.support.harness import BACKENDS, HYBRID, OPPOSITE, engine, mini, working_weights


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

    def start(self, rows: int) -> Any:
        return self.state(())

    def state(self, read: tuple[int, ...]) -> Any:
        return SimpleNamespace(read=read, position=np.array([len(read)]))

    def chunk(self, state: Any, tokens: np.ndarray) -> Any:
        (row,) = tokens.tolist()
        self.shown.append((*state.read, *row))
        out = np.zeros((1, len(row), self.vocab), np.float32)
        out[0, -1, self.ids[len(self.shown) - 1]] = 50.0
        return SimpleNamespace(logits=lambda: out, read=self.shown[-1])

    def commit(self, tape: Any, n: np.ndarray) -> Any:
        return self.state(tape.read)

    def forget(self, state: Any, rows: np.ndarray) -> Any:
        assert rows.all()
        return self.state(())


def test_text_ends_at_the_next_document_and_no_token_is_read_twice(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    ids = tokenizer.encode("She was glad of it").tolist()
    model: Any = Scripted([*ids, tokenizer.bos, ids[0]], tokenizer.vocab)
    assert sample(model, tokenizer, "", Decoding(50, 1.0, None), None) == "She was glad of it"
    assert model.shown == [(tokenizer.bos, *ids[:n]) for n in range(len(ids) + 1)]
    with pytest.raises(ConfigError, match="tokens=0"):
        sample(model, tokenizer, "", Decoding(0, 1.0, None), 4)


def test_attention_looks_back_no_further_than_its_limit(dataset: Dataset) -> None:
    tokenizer = dataset.tokenizer
    ids = tokenizer.encode("She was glad of it, and so was he").tolist()
    model: Any = Scripted([*ids, tokenizer.bos], tokenizer.vocab)
    assert sample(model, tokenizer, "", Decoding(50, 1.0, None), 4) == "She was glad of it, and so was he"
    text = [tokenizer.bos, *ids]
    assert max(map(len, model.shown)) == 4
    assert [len(shown) for shown in model.shown[:8]] == [1, 2, 3, 4, 2, 3, 4, 2]
    for n, shown in enumerate(model.shown, 1):
        assert list(shown) == text[n - len(shown) : n]


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "limit"), [("tiny", 12), (HYBRID, 12), (OPPOSITE, None)])
def test_texts_side_by_side_are_those_of_each_alone(
    name: str, limit: int | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of 0 to 20 tokens in three rows: texts that end early make room, windows of attention begin anew."""
    monkeypatch.setattr(generate, "ROWS", 3)
    monkeypatch.setattr(generate, "CHUNK", 21)  # 7 tokens of each row
    config = mini(name)
    model = engine(backend, config, working_weights(config.model, 1.0), dtype="float64")
    prompts = ["", "5 6 7", " ".join(map(str, range(5, 25)))]
    numbers: Any = Numbers()
    choices = Decoding(14, 1.5, None, seed=11), limit
    texts = [Text(numbers, prompt, number) for prompt in prompts for number in range(2)]
    order = list(write(model, texts, *choices))
    assert sum(text is order[0] for text in order) > 1 and all(text.done for text in texts)
    for text in texts:
        alone = Text(numbers, text.prompt, text.number)
        assert all(grown is alone for grown in write(model, [alone], *choices))
        assert alone.ids == text.ids and str(alone) == str(text)
    lengths = [len(text.ids) - text.begin for text in texts]
    assert max(lengths) == 14 > min(lengths), "a text must end before its time"
    assert all(one.ids != other.ids for one, other in zip(texts[::2], texts[1::2], strict=True))
    assert sample(model, numbers, prompts[1], *choices) == str(texts[2])
