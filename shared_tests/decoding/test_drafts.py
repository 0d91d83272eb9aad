"""A drafted text is the undrafted one, token by token, on both backends and whoever drafts. Budget: 60 s."""

import dataclasses
import importlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core import rng
from core.decoding import samplers
from core.decoding.drafters import DRAFTERS, Drafter
from core.decoding.generate import Text, write
from core.decoding.samplers import say
from core.decoding.settings import Decoding
from core.decoding.statistics import DraftStatistics
from core.engine.protocol import Engine, step
from shared_tests.support.decoding import Numbers, Oracle
from shared_tests.support.harness import (
    BACKENDS,
    EVERYTHING,
    HYBRID,
    OPPOSITE,
    mini,
    minis,
    reader,
    to_numpy,
    tokens,
)

pytestmark = pytest.mark.pair
PROMPTS = ("", "5 6 7 5 6 7", " ".join(map(str, range(5, 25))))
"""Of 0 tokens, fewer than the short convolution reaches, of 6, and of 20, more than a block."""
TOKENS = 16
GREEDY, COUPLED, GUMBEL = Decoding(TOKENS, 0.0), Decoding(TOKENS, 1.5, None, seed=3), Decoding(TOKENS, 1.0, 20, 0.9)
GUMBEL = dataclasses.replace(GUMBEL, sampler="gumbel", seed=4)
Make = Callable[[Text], Drafter]


def limit_of(name: str) -> int | None:
    """Return how far a mini may look back: attention so little that blocks meet the limit."""
    return 14 if mini(name).model.mixes("attention") else None


def texts(prompts: tuple[str, ...] = PROMPTS) -> list[Text]:
    numbers: Any = Numbers()
    return [Text(numbers, prompt, number) for number, prompt in enumerate(prompts)]


def written(
    model: Engine, how: Decoding, limit: int | None, make: Make | None = None, prompts: tuple[str, ...] = PROMPTS
) -> tuple[list[Text], DraftStatistics]:
    """Return the texts that a model writes side by side, and what their drafts came to."""
    out, statistics = texts(prompts), DraftStatistics()
    grown = list(write(model, out, how, limit, make, statistics))
    assert all(text.done for text in out) and len(grown) == statistics.count
    return out, statistics


def oracle(known: list[Text], vocab: int, wrong: float, seed: int = 0) -> Make:
    """Return what makes oracles of texts that are known."""
    return lambda text: Oracle(known[text.number], vocab, wrong, seed)


def by_hand(model: Engine, prompt: str, number: int, how: Decoding, limit: int | None) -> list[int]:
    """Return the ids of a text that is written with a state of its own, one token in every pass."""
    text = texts(PROMPTS)[PROMPTS.index(prompt)]
    state, unread = model.start(1), text.ids[-limit:] if limit else text.ids
    while not text.done:
        logits = np.zeros(0)
        for token in unread:
            logits, state = step(model, state, np.array([token]))
        text.take(say(logits[0], None, text.said, number, how), how.tokens)
        unread = text.ids[-1:]
        if limit and state.position[0] == limit:
            state, unread = model.start(1), text.ids[-(limit // 2) :]
    return text.ids


SHORT = ("tiny", HYBRID, "delta_ablate", "pr1855", EVERYTHING, OPPOSITE)
"""Attention, recurrent layers, both, loops and lanes, every option, few options; the others wait for the long run."""
NAMES = [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in minis()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_drafted_text_is_the_undrafted_one(name: str, backend: str) -> None:
    config, limit = mini(name), limit_of(name)
    model = reader(backend, config, 1.0, dtype="float64")
    vocab, kept = config.model.vocab, Counter()
    for how, draft, block in ((GREEDY, "ngram", 5), (COUPLED, "none", 6), (GUMBEL, "jacobi", 4)):
        plain, _ = written(model, how, limit)
        make = oracle(plain, vocab, 0.2) if draft == "none" else None
        drafted, statistics = written(model, dataclasses.replace(how, block=block, draft=draft), limit, make)
        assert [text.ids for text in drafted] == [text.ids for text in plain], how
        assert statistics.tokens == sum(text.said + (text.said < TOKENS) for text in plain)
        kept += statistics.cycles
    assert plain[1].ids == by_hand(model, PROMPTS[1], 1, how, limit)
    assert len(kept) >= 4, "drafts of every length must be kept"


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds(backend: str) -> None:
    """An oracle that is right gives K tokens a pass, one that is wrong exactly one."""
    config = mini(HYBRID)
    model, vocab = reader(backend, config, 1.0, dtype="float64"), config.model.vocab
    every = (written(model, dataclasses.replace(COUPLED, seed=seed), None, None, PROMPTS[:1]) for seed in range(20))
    seed, (plain, alone) = next((seed, out) for seed, out in enumerate(every) if out[0][0].said == TOKENS)
    assert alone.cycles == {0: alone.tokens} and alone.drafted == 0
    for block in (2, 4, 16):
        how = dataclasses.replace(COUPLED, seed=seed, block=block)
        drafted, right = written(model, how, None, oracle(plain, vocab, 0.0), PROMPTS[:1])
        assert drafted[0].ids == plain[0].ids and right.accepted == right.drafted
        assert right.count == TOKENS // block and right.tokens == TOKENS
        drafted, wrong = written(model, how, None, oracle(plain, vocab, 1.0), PROMPTS[:1])
        assert drafted[0].ids == plain[0].ids
        assert wrong.tokens_per_pass == 1 and wrong.drafted > 0 == wrong.accepted


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_that_ends_in_a_block_ends(backend: str) -> None:
    """Texts at a high temperature end early; the oracle drafts their end, and more behind it."""
    config = mini(OPPOSITE)
    model, how = reader(backend, config, 1.0, dtype="float64"), Decoding(90, 3.0, None, seed=5, block=16)
    plain, _ = written(model, how, None, None, PROMPTS * 3)
    ended = [text for text in plain if text.said < 90]
    assert len(ended) > 2, "texts must end before their time"
    drafted, statistics = written(model, how, None, oracle(plain, config.model.vocab, 0.0), PROMPTS * 3)
    assert [text.ids for text in drafted] == [text.ids for text in plain]
    assert statistics.tokens_per_pass > 12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_ends_where_the_context_does(backend: str) -> None:
    """No pass keeps more than the limit, and every new context begins where the undrafted one does."""
    config = mini("tiny")
    model = reader(backend, config, 1.0, dtype="float64")
    for limit in (3, 7, 12):
        plain, _ = written(model, COUPLED, limit)
        drafted, statistics = written(
            model, dataclasses.replace(COUPLED, block=16), limit, oracle(plain, config.model.vocab, 0.0)
        )
        assert [text.ids for text in drafted] == [text.ids for text in plain]
        assert 0 < max(statistics.cycles) < limit


@pytest.mark.parametrize("name", ["tiny", HYBRID, pytest.param(EVERYTHING, marks=pytest.mark.long)])
def test_both_backends_draft_the_same_text_in_float32(name: str) -> None:
    config, limit = mini(name), limit_of(name)
    for how in (GREEDY, COUPLED, GUMBEL):
        how = dataclasses.replace(how, draft="ngram")
        ids = [[t.ids for t in written(reader(b, config, 1.0, dtype="float32"), how, limit)[0]] for b in BACKENDS]
        assert ids[0] == ids[1]


class Endless(Text):
    """A text that goes on where another document begins."""

    def take(self, token: int, tokens: int) -> None:
        self.ids.append(token)
        self.done = self.said == tokens


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_288_texts(dtype: str, backend: str) -> None:
    """Half of them, 24 of 120 tokens by each of six models; every number of drafts is kept.

    In float32 a text may part from the undrafted one where two tokens are as likely.
    """
    kept, ties, numbers, count = Counter(), 0, Numbers(), 0
    for name in ("tiny", "skc_ablate", HYBRID, "skc_mac", EVERYTHING, OPPOSITE):
        model, vocab = reader(backend, mini(name), 1.0, dtype=dtype), mini(name).model.vocab

        def one(how: Decoding, make: Make | None, model: Engine = model) -> Text:
            text, statistics = Endless(numbers, ""), DraftStatistics()  # type: ignore[arg-type]
            assert sum(text.done for text in write(model, [text], how, None, make, statistics)) == 1
            assert statistics.tokens == text.said == 120
            kept.update(statistics.cycles)
            return text

        for how in (Decoding(120, 0.0), Decoding(120, 1.0, None, sampler="gumbel", seed=6)):
            plain = one(how, None)
            for block in (2, 5, 8, 16):
                for make in (
                    lambda text: DRAFTERS["ngram"](),
                    *(oracle([plain], vocab, p, count + block) for p in (0.3, 0.1)),
                ):
                    drafted, count = one(dataclasses.replace(how, block=block), make), count + 1
                    if drafted.ids != plain.ids:
                        assert dtype == "float32" and gap(model, plain, drafted, how) < 1e-4
                        ties += 1
    print(f"{backend}, {dtype}: {count} texts, {ties} ties, drafts kept {sorted(kept.items())}")
    assert count == 144 and set(kept) == set(range(16)) and ties <= 2


def gap(model: Engine, one: Text, other: Text, how: Decoding) -> float:
    """Return how far apart the two tokens are at which texts part: in logits, with the noise that drew them."""
    place = next(i for i, (a, b) in enumerate(zip(one.ids, other.ids, strict=False)) if a != b)
    logits = model.logits(np.array([one.ids[:place]], np.int32))[0, -1].astype(np.float64)
    if how.temperature > 0:
        logits = logits / how.temperature + samplers.gumbel(len(logits), place - one.begin, one.number, how)
    return abs(logits[one.ids[place]] - logits[other.ids[place]])


def flat(state: Any) -> list[np.ndarray]:
    """Return every array of a state as numpy."""
    value = getattr(state, "model", state)
    if isinstance(value, tuple):
        return [array for part in value for array in flat(part)]
    return [] if value is None else [to_numpy(value)]


def state_gap(model: Engine, rows: np.ndarray) -> float:
    """Return the largest relative gap between a state after n tokens of a block and after n single tokens, any n,
    three blocks in a row."""
    worst, state, stepped = 0.0, model.start(len(rows)), model.start(len(rows))
    for begin, last in ((0, 9), (9, 4), (13, 2)):
        tape, one = model.chunk(state, rows[:, begin : begin + 9]), stepped
        for n in range(10):
            found, wanted = flat(model.commit(tape, n)), flat(one)
            assert [a.shape for a in found] == [a.shape for a in wanted]
            gaps = [
                np.abs(a - b).max(initial=0.0) / (1 + np.abs(b).max(initial=0.0))
                for a, b in zip(found, wanted, strict=True)
            ]
            worst = max([worst, *map(float, gaps)])
            if n == last:
                state, stepped = model.commit(tape, n), one
            one = step(model, one, rows[:, begin + n])[1] if n < 9 else one
    return worst


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_commit_makes_the_state_of_single_tokens(name: str, backend: str) -> None:
    config = mini(name)
    rows = tokens("commit", 2, 24, config.model.vocab, config.model.bos)
    assert state_gap(reader(backend, config, 1.0, dtype="float64"), rows) <= 1e-12


class Faulty:
    """An engine that keeps one token more of every block than it is told to."""

    def __init__(self, model: Engine) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def commit(self, tape: Any, n: Any) -> Any:
        return self._model.commit(tape, np.minimum(n + 1, tape.tokens.shape[1]))


def parted(model: Any, how: Decoding, make: Make | None = None) -> bool:
    """Return whether some text differs from the undrafted one."""
    plain, _ = written(model, dataclasses.replace(how, draft="none"), None)
    make = None if make is None else oracle(plain, 97, 0.3)
    return [text.ids for text in written(model, how, None, make)[0]] != [text.ids for text in plain]


@pytest.mark.parametrize("backend", BACKENDS)
def test_planted_faults_are_found(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = mini(HYBRID)
    model, how = reader(backend, config, 1.0, dtype="float64"), dataclasses.replace(COUPLED, draft="jacobi")
    right: Any = oracle
    assert not parted(model, how) and not parted(model, how, right)
    assert parted(Faulty(model), how, right), "a commit of one token too many"
    with monkeypatch.context() as patch:
        calls = iter(range(10**6))
        patch.setattr(samplers, "_draw", lambda *key: rng.uniform(0, str(next(calls)), 1)[0])
        assert parted(model, how), "noise that does not belong to a place"
    layer = importlib.import_module(f"backends.{backend}.parts.koopman").Koopman
    commit = layer.commit

    def cropped(self: Any, tape: Any, context: Any, n: Any) -> Any:
        return commit(self, tape, context, n)._replace(last=tape.states[:, -1])

    rows = tokens("commit", 2, 24, config.model.vocab, config.model.bos)
    monkeypatch.setattr(layer, "commit", cropped)
    assert state_gap(model, rows) > 1e-3, "keys are cropped, and recurrences not rolled back"
