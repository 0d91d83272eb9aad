"""A drafter of all rows changes no token, and its passes are counted. The drafters here are planted. Budget: 10 s."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from core import rng
from core.checks import ConfigError
from core.decoding.generate import Text, write
from core.decoding.settings import Decoding
from core.decoding.statistics import DraftStatistics
from core.engine.protocol import Engine, State
from shared_tests.support.decoding import Numbers
from shared_tests.support.harness import BACKENDS, HYBRID, mini, reader

pytestmark = pytest.mark.pair
PROMPTS = ("", "5 6 7", " ".join(map(str, range(5, 25))))
HOWS = {
    "greedy": Decoding(17, 0.0, block=5),
    "coupled": Decoding(17, 1.2, None, seed=3, block=4),
    "gumbel": Decoding(17, 1.0, 20, 0.9, seed=4, sampler="gumbel", block=6),
}


class Drafted:
    """Logits that stand for a pass of a twin."""

    def __init__(self, logits: np.ndarray) -> None:
        self._logits = logits

    def logits(self) -> np.ndarray:
        return self._logits

    def best(self) -> np.ndarray:
        return self._logits.argmax(-1)


class Planted:
    """Drafts at random; with `exact` the first place is the model's own, as of a twin with an exact anchor."""

    def __init__(self, model: Engine, vocab: int, exact: bool, never: int | None = None) -> None:
        self._model, self._vocab, self._exact, self._never, self.calls = model, vocab, exact, never, 0

    def draft(self, state: State, anchor: np.ndarray, block: int) -> Drafted:
        self.calls += 1
        shape = (len(anchor), block, self._vocab)
        logits = 3 * rng.uniform(self.calls, "planted", int(np.prod(shape))).reshape(shape)
        if self._exact:
            logits[:, 0] = self._model.chunk(state, anchor[:, None]).logits()[:, 0]
        if self._never is not None:
            logits[..., self._never] = 1e4
        return Drafted(logits)


def written(model: Engine, how: Decoding, limit: int | None, twin: Any = None) -> tuple[list[Text], DraftStatistics]:
    numbers: Any = Numbers()
    texts = [Text(numbers, prompt, number) for number, prompt in enumerate(PROMPTS)]
    statistics = DraftStatistics()
    for _ in write(model, texts, how, limit, statistics=statistics, twin=twin):
        pass
    return texts, statistics


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_a_text_drafted_by_rows_is_the_undrafted_one(how: Decoding, backend: str) -> None:
    """T5, T9: several texts of unequal length, up to a limit; an exact anchor keeps a draft wherever there is room."""
    config = mini(HYBRID)
    model = reader(backend, config, 1.0, dtype="float64")
    for limit in (None, 14):
        plain, alone = written(model, how, limit)
        assert alone.turns == alone.count == alone.tokens
        for exact in (False, True) if limit is None else (True,):
            twin = Planted(model, config.model.vocab, exact)
            drafted, statistics = written(model, how, limit, twin)
            assert [text.ids for text in drafted] == [text.ids for text in plain]
            assert statistics.draft_passes == twin.calls > 0
            assert statistics.tokens == alone.tokens
        # Without room are: a text's last token, the place before the limit, and the pass that ends a prompt.
        least, ended = statistics.count - statistics.cycles[0], sum(text.said < how.tokens for text in drafted)
        drafts = statistics.turns - statistics.count
        assert least <= drafts <= least + ended, "every cycle that drafted kept at least one, or its text ended"


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_always_wrong_gives_half_a_token_a_pass(backend: str) -> None:
    config = mini(HYBRID)
    model, how = reader(backend, config, 1.0, dtype="float64"), dataclasses.replace(HOWS["greedy"], tokens=40)
    plain, _ = written(model, how, None)
    never = next(i for i in range(2, config.model.vocab) if all(i not in text.ids[text.begin :] for text in plain))
    twin = Planted(model, config.model.vocab, exact=False, never=never)
    drafted, statistics = written(model, how, None, twin)
    assert [text.ids for text in drafted] == [text.ids for text in plain] and statistics.accepted == 0
    drafts = statistics.turns - statistics.count
    assert statistics.count - drafts <= 2 * len(PROMPTS), "but for the ends every cycle drafts"
    assert statistics.tokens_per_cycle == 1 and statistics.tokens_per_pass == statistics.tokens / statistics.turns < 0.6


def test_speculative_keeps_its_law_with_drafts_by_rows() -> None:
    """The first token of many texts has the model's distribution, whatever is drafted with whichever noise."""
    config = mini(HYBRID)
    model = reader("cuda", config, 1.0, dtype="float64")
    how = Decoding(3, 1.0, None, seed=7, sampler="speculative", block=3)
    numbers: Any = Numbers()
    texts = [Text(numbers, "", number) for number in range(600)]
    for _ in write(model, texts, how, None, twin=Planted(model, config.model.vocab, exact=True)):
        pass
    state = model.start(1)
    logits = model.chunk(state, np.array([[1]])).logits()[0, 0]
    law = np.exp(logits - logits.max())
    law /= law.sum()
    first = [text.ids[1] if text.said else 1 for text in texts]
    counts = np.bincount(first, minlength=len(law))
    top = np.argsort(-law)[:5]
    error = np.sqrt(law[top] * (1 - law[top]) / len(texts))
    assert (np.abs(counts[top] / len(texts) - law[top]) < 4 * error).all()


def test_twin_drafts_need_a_twin() -> None:
    config = mini(HYBRID)
    model = reader("cuda", config, 1.0, dtype="float64")
    numbers: Any = Numbers()
    with pytest.raises(ConfigError, match="draft=twin"):
        list(write(model, [Text(numbers, "")], Decoding(2, draft="twin"), None))
