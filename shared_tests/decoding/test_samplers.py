"""What is drawn where something was drafted has the model's own distribution, counted out in full. Budget: 10 s."""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core import rng
from core.config import ConfigError
from core.decoding import generate, samplers
from core.decoding.drafters import Jacobi, NGrams, Nothing
from core.decoding.generate import Text, write
from core.decoding.settings import Decoding
from core.decoding.statistics import DraftStatistics
from shared_tests.support.decoding import Numbers

VOCAB, TOKENS = 4, 4
SETTINGS = {"all": (None, 1.0), "three": (3, 1.0), "share": (None, 0.7)}
Law = dict[int, float]


def weights_of(prefix: tuple[int, ...]) -> list[int]:
    """Return how likely each token is after a prefix, in whole numbers."""
    return [1 + int(w) % 4 for w in rng.integers16(0, f"toy/{prefix}", VOCAB)]


def wanted_law(prefix: tuple[int, ...], top_k: int | None, top_p: float) -> Law:
    """Return the law of the next token, with fewer candidates if that is asked for."""
    weights = weights_of(prefix)
    order = sorted(range(VOCAB), key=lambda token: (-weights[token], token))[:top_k]
    total, kept, mass = sum(weights[token] for token in order), [], 0
    for token in order:
        if mass < top_p * total:
            kept.append(token)
            mass += weights[token]
    return {token: weights[token] / mass for token in kept}


class Toy:
    """An engine of the law above."""

    def start(self, rows: int) -> Any:
        return SimpleNamespace(read=(), position=np.zeros(1, int))

    def chunk(self, state: Any, tokens: np.ndarray) -> Any:
        (row,) = tokens.tolist()
        prefixes = [(*state.read, *row[: i + 1]) for i in range(len(row))]
        logits = np.log(np.array([[weights_of(prefix) for prefix in prefixes]], float))
        return SimpleNamespace(logits=lambda: logits, best=lambda: logits.argmax(-1), state=state, row=row)

    def commit(self, tape: Any, n: np.ndarray) -> Any:
        return SimpleNamespace(read=(*tape.state.read, *tape.row[: n[0]]), position=tape.state.position + n)


class Guess(Nothing):
    """Drafts something that follows from the text."""

    def draft(self, ids: Any, count: int) -> list[int]:
        return [int(v) % VOCAB for v in rng.integers16(1, f"guess/{tuple(ids)}", count)]


class Ask(Exception):
    """The next token of a path is not known."""


def law_of(say: Callable, logits: np.ndarray, draft: int | None, how: Decoding) -> Law:
    """Return the law of `say`, by one draw from the middle of each of as many equal parts as its fractions need."""
    ids, weights = samplers.candidates(logits, how.temperature, how.top_k, how.top_p)
    smallest = weights.min()
    whole = {int(i): round(w / smallest * 12) for i, w in zip(ids, weights, strict=True)}
    whole = {token: w // math.gcd(*whole.values()) for token, w in whole.items()}
    total = sum(whole.values())
    parts = {"accept": total, "sample": math.lcm(total, max(1, total - whole.get(-1 if draft is None else draft, 0)))}
    law: Law = {}
    for accept in range(parts["accept"] if how.sampler == "speculative" and draft is not None else 1):
        for sample in range(parts["sample"]):
            places = {"accept": (accept, parts["accept"]), "sample": (sample, parts["sample"])}

            def draw(seed: int, kind: str, place: int, number: int, at: dict = places) -> float:
                return (2 * at[kind][0] + 1) / at[kind][1] - 1

            samplers._draw, kept = draw, samplers._draw
            try:
                token = say(logits, draft, 0, 0, how)
            finally:
                samplers._draw = kept
            law[token] = law.get(token, 0) + 1
    count = sum(law.values())
    return {token: number / count for token, number in law.items()}


class Path:
    """Stands in for `say`: the tokens of a path one after the other, and how likely they are."""

    def __init__(self, tokens: tuple[int, ...], say: Callable, laws: dict[Any, Law]) -> None:
        self.tokens, self.chance, self._say, self._laws = tokens, 1.0, say, laws

    def __call__(self, logits: np.ndarray, draft: int | None, place: int, number: int, how: Decoding) -> int:
        key = (logits.tobytes(), draft)
        law = self._laws[key] = self._laws.get(key) or law_of(self._say, logits, draft, how)
        if place == len(self.tokens):
            raise Ask(law)
        self.chance *= law.get(self.tokens[place], 0.0)
        return self.tokens[place]


def outcomes(
    how: Decoding, say: Callable, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[tuple[int, ...], float, DraftStatistics]]:
    """Yield every text that `write` can write, and how likely it is."""
    waiting: list[tuple[int, ...]] = [()]
    laws: dict[Any, Law] = {}
    numbers: Any = Numbers()
    toy: Any = Toy()
    while waiting:
        path = Path(waiting.pop(), say, laws)
        monkeypatch.setattr(generate, "say", path)
        text, statistics = Text(numbers, ""), DraftStatistics()
        try:
            list(write(toy, [text], how, None, lambda text: Guess(), statistics))
        except Ask as ask:
            waiting += [(*path.tokens, token) for token in ask.args[0]]
        else:
            yield path.tokens, path.chance, statistics


def largest_gap(how: Decoding, say: Callable, monkeypatch: pytest.MonkeyPatch) -> float:
    """Return how far the probability of a text, drafted, is from the model's own."""
    worst, total, kept = 0.0, 0.0, 0
    for path, chance, statistics in outcomes(how, say, monkeypatch):
        wanted, prefix = 1.0, (Numbers.bos,)
        for token in path:
            wanted *= wanted_law(prefix, how.top_k, how.top_p).get(token, 0.0)
            prefix = (*prefix, token)
        worst, total, kept = max(worst, abs(chance - wanted)), total + chance, kept + statistics.accepted
    assert abs(total - 1) < 1e-9 and kept > 0
    return worst


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("sampler", ["coupled", "speculative"])
def test_drafted_texts_have_the_models_distribution(
    sampler: Any, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    top_k, top_p = SETTINGS[settings]
    how = Decoding(TOKENS, 1.0, top_k, top_p, sampler=sampler, block=3)
    assert largest_gap(how, samplers.say, monkeypatch) <= 1e-12


def test_a_rejection_without_the_residual_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(logits: np.ndarray, draft: int | None, place: int, number: int, how: Decoding) -> int:
        ids, weights = samplers.candidates(logits, how.temperature, how.top_k, how.top_p)
        if (
            draft is not None
            and (samplers._draw(0, "accept", 0, 0) + 1) / 2 < weights[ids == draft].sum() / weights.sum()
        ):
            return draft
        return samplers.drawn(ids, weights, samplers._draw(0, "sample", 0, 0))

    how = Decoding(TOKENS, 1.0, None, sampler="speculative", block=3)
    assert largest_gap(how, without, monkeypatch) > 1e-3


def test_gumbel_noise_follows_the_distribution_and_belongs_to_its_place() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.05, 0.25]))
    how = Decoding(temperature=1.0, top_k=None, sampler="gumbel")
    drawn = [samplers.say(logits, None, place, number, how) for place in range(1000) for number in range(4)]
    assert np.abs(np.bincount(drawn, minlength=4) / 4000 - [0.1, 0.6, 0.05, 0.25]).max() < 0.03
    assert [samplers.say(logits, 1, place, 2, how) for place in range(50)] == drawn[2:200:4]
    few = Decoding(temperature=1.0, top_k=2, sampler="gumbel")
    assert {samplers.say(logits, None, place, 0, few) for place in range(100)} == {1, 3}


def test_candidates_are_those_of_a_full_sort() -> None:
    logits = np.round(rng.normal(0, "candidates", 300) * 2)  # many are equal
    for top_k in (1, 7, 40, 299, 300, 400, None):
        ids, weights = samplers.candidates(logits, 0.7, top_k)
        assert ids.tolist() == np.argsort(-logits, kind="stable")[:top_k].tolist()
        assert np.allclose(weights, np.exp((logits[ids] - logits.max()) / 0.7))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sampler", ["coupled", "gumbel", "speculative"])
def test_a_low_temperature_takes_the_likeliest_without_a_warning(sampler: Any) -> None:
    """Its weights would be 0, which has no logarithm, and quotients beyond all numbers."""
    logits = np.array([0.0, 9.0, -9.0, 8.0])
    for temperature in (1e-3, 5e-324):
        how = Decoding(temperature=temperature, top_k=None, sampler=sampler)
        assert [samplers.say(logits, draft, 3, 0, how) for draft in (None, 0, 1)] == [1, 1, 1]


def test_drafters() -> None:
    ngrams = NGrams()
    assert ngrams.draft([1, 5, 6, 7, 8], 3) == []
    assert ngrams.draft([1, 5, 6, 7, 8, 5, 6], 3) == [7, 8, 5]
    assert ngrams.draft([1, 5, 6, 7, 8, 5, 6, 9, 5, 6], 2) == [9, 5], "the last time counts"
    assert ngrams.draft([1, 5, 6, 7, 8, 5, 6, 9, 5, 6, 7], 2) == [8, 5], "the longest ending counts"
    assert NGrams().draft([1, 2, 2, 2], 4) == [2, 2, 2, 2]
    jacobi = Jacobi()
    assert jacobi.draft([1, 5], 3) == [5, 5, 5]
    jacobi.see([7, 8])
    assert jacobi.draft([1, 5, 6], 3) == [7, 8, 8] and jacobi.draft([1], 1) == [7]


class Places(Toy):
    """An engine whose tokens follow from the place alone, whatever was read."""

    def chunk(self, state: Any, tokens: np.ndarray) -> Any:
        places = len(state.read) + np.arange(tokens.shape[1])
        best = np.array([[2 + place * place % 5 for place in places]])
        return SimpleNamespace(best=lambda: best, state=state, row=tokens[0].tolist())


def test_guesses_stand_where_the_model_made_them() -> None:
    """Where tokens follow from the place alone, what a pass says behind a wrong draft is right: the next keeps all."""
    numbers: Any = Numbers()
    places: Any = Places()
    text, statistics = Text(numbers, ""), DraftStatistics()
    list(write(places, [text], Decoding(40, 0.0, draft="jacobi", block=6), None, statistics=statistics))
    assert text.ids[1:] == [2 + place * place % 5 for place in range(40)]
    assert statistics.cycles[4] + statistics.cycles[5] >= 5 and statistics.tokens_per_pass > 2


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (Decoding(block=1), "block=1: expected 2 to 64"),
        (Decoding(top_p=0.0), "top_p=0.0: expected more than 0, at most 1"),
        (Decoding(draft="x"), "draft='x': expected one of none, ngram, jacobi"),  # type: ignore[arg-type]
        (Decoding(sampler="x"), "sampler='x': expected one of coupled, gumbel, speculative"),  # type: ignore[arg-type]
    ],
)
def test_what_no_model_can_do_is_refused(how: Decoding, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        how.check()
