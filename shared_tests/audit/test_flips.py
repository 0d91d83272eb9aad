"""The flip test and the changed text: honest engines pass, leaks and cheating plug-ins are told apart. Budget: 20 s."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core import rng
from core.audit.fingerprints import ROUNDING, Predictions, effect_of
from core.audit.flips import flip_test
from core.audit.predictions import check_predictions
from core.audit.turns import Turns
from core.audit.watch.answer import DIED
from core.audit.watch.isolation import Isolated
from core.config import RunConfig
from core.data.dataset import Split
from shared_tests.support.harness import BACKENDS, engine, mini, working_weights


def text(vocab: int) -> Split:
    """Return 3,000 random tokens in documents of 30 to 150."""
    tokens = rng.integers16(0, "flips", 3000) % (vocab - 4) + 4
    tokens[np.cumsum(rng.integers16(0, "documents", 30) % 120 + 30) % 3000] = tokens[0] = 1
    return Split([tokens.astype("<u2")], SimpleNamespace(vocab=vocab, bos=1))  # type: ignore[arg-type]


def settings(windows: str, documents: str = "isolated", plugins: tuple[str, ...] = (), **changes: Any) -> RunConfig:
    config = mini("debug")
    evaluation = dataclasses.replace(config.eval, windows=windows, seq=32, batch=4, plugins=plugins, **changes)
    model = dataclasses.replace(config.model, documents=documents)
    return dataclasses.replace(config, model=model, eval=evaluation)


WINDOWS = {
    "plain": settings("plain"),
    "sliding": settings("sliding", stride=8),
    "documents": settings("documents", stride=16),
    "stateful": settings("stateful"),
    "packed": settings("plain", "packed"),
}


class Leaky:
    """An engine whose logits go through a function of (logits, tokens)."""

    def __init__(self, inner: Any, change: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        self._inner, self._change = inner, change

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self._change(np.array(self._inner.logits(tokens)), tokens)

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return _cost(self.logits(tokens), targets)

    def start(self, rows: int) -> Any:
        return self._inner.start(rows)

    def chunk(self, state: Any, tokens: np.ndarray) -> Any:
        tape = self._inner.chunk(state, tokens)
        logits = self._change(np.array(tape.logits()), tokens)
        return SimpleNamespace(inner=tape, logits=lambda: logits, nll=lambda targets: _cost(logits, targets))

    def commit(self, tape: Any, n: int) -> Any:
        return self._inner.commit(tape.inner, n)


def _cost(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(-1))
    return total - np.take_along_axis(shifted, targets[..., None].astype(np.int64), -1)[..., 0]


def next_token(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Each position sees the next input a little."""
    logits[:, :-1, 7] += 1e-3 * tokens[:, 1:]
    return logits


def row_above(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Each row of a batch sees the one before it."""
    logits[1:, :, 7] += 1e-3 * tokens[:-1]
    return logits


def row_below(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Each row of a batch sees the one after it."""
    logits[:-1, :, 7] += 1e-3 * tokens[1:].sum(1, keepdims=True)
    return logits


def nothing(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """No position sees anything."""
    return np.zeros_like(logits)


def flipped(
    config: RunConfig, change: Any = None, backend: str = "cuda", bound: float = ROUNDING["float32"]
) -> dict[str, Any]:
    inner: Any = engine(backend, config, working_weights(config.model, 3.0))
    tested: Any = inner if change is None else Leaky(inner, change)
    return flip_test(tested, text(config.model.vocab), config, 8, 0, bound, lambda done, total: None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("windows", WINDOWS)
def test_an_honest_engine_passes_the_flip_test(windows: str, backend: str) -> None:
    found = flipped(WINDOWS[windows], backend=backend)
    assert found["wrong"] == [] and found["wrong_count"] == 0 and found["broken"] is None and found["repeatable"]
    assert found["flips"] == 8 and found["ends"] >= 1 and found["noticed"] > 20 and found["compared"] > 700


@pytest.mark.parametrize(
    ("windows", "change"),
    [(name, next_token) for name in WINDOWS]
    + [(name, row_below) for name in ("plain", "sliding", "documents", "stateful")]
    + [(name, row_above) for name in ("plain", "stateful")],  # elsewhere the row above is mostly in the context
)
def test_a_leak_is_caught_and_is_the_models(windows: str, change: Any) -> None:
    found = flipped(WINDOWS[windows], change)
    assert found["wrong"] and found["wrong_count"] >= len(found["wrong"]) and not found["by_plugins"]
    assert verdicts(found)["D7"] == "FAIL" and verdicts(found)["D9"] == "NOT CHECKED"


@pytest.mark.parametrize("windows", ["plain", "stateful"])
def test_a_leak_is_told_from_a_plug_in(windows: str) -> None:
    for plugin, change, by_plugins in (("CountsFirst", None, True), ("HonestCache", next_token, False)):
        found = flipped(settings(windows, plugins=(f"shared_tests.support.zoo:{plugin}",)), change)
        assert found["wrong"] and found["by_plugins"] is by_plugins
        assert verdicts(found)["D9"] == ("FAIL" if by_plugins else "NOT CHECKED")


def test_a_test_that_sees_no_effect_proves_nothing() -> None:
    found = flipped(WINDOWS["plain"], nothing)
    assert found["noticed"] == 0 and found["wrong"] == [] and verdicts(found)["D7"] == "NOT CHECKED"
    assert verdicts(flipped(WINDOWS["plain"]))["D7"] == "PASS"


def noisy(size: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a change of logits by other numbers of this size in each forward pass."""
    dice = np.random.default_rng(0)
    return lambda logits, tokens: logits + np.float32(size) * dice.standard_normal(logits.shape, np.float32)


@pytest.mark.parametrize("windows", WINDOWS)
def test_what_a_repeat_changes_too_is_rounding_up_to_the_bound_and_no_further(windows: str) -> None:
    found = flipped(WINDOWS[windows], noisy(1e-6))
    assert not found["repeatable"] and 0 < found["repeat_gap"] < 1e-4 and not found["wrong"] and found["noticed"]
    assert verdicts(found)["D7"] == "PASS"
    found = flipped(WINDOWS[windows], noisy(1e-2))
    assert found["repeat_gap"] > 1e-3 and verdicts(found)["D7"] == "FAIL"


@pytest.mark.parametrize("windows", WINDOWS)
def test_noise_does_not_hide_a_leak(windows: str) -> None:
    noise = noisy(1e-6)
    found = flipped(WINDOWS[windows], lambda logits, tokens: noise(next_token(logits, tokens), tokens))
    assert not found["repeatable"] and found["repeat_gap"] < 1e-4 < found["largest_wrong"]
    assert found["wrong"] and verdicts(found)["D7"] == "FAIL"


def test_rounding_that_shows_late_is_rounding() -> None:
    """The control repeats its bits, and what comes later does not: small differences are tried once more."""
    count, noise = iter(range(10_000)), noisy(1e-6)
    honest = flipped(WINDOWS["plain"], lambda x, tokens: noise(x, tokens) if next(count) > 6 else x)
    assert not honest["repeatable"] and honest["compared"] and not honest["wrong"]

    def tiny(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        logits[:, :-1, 7] += 1e-6 * tokens[:, 1:]
        return logits

    found = flipped(WINDOWS["plain"], tiny)
    assert found["repeatable"] and found["differ"] and 0 < found["explained"] < 1e-4 and not found["wrong"]
    strict = flipped(WINDOWS["plain"], tiny, bound=1e-9)  # of float64
    assert strict["wrong"] and verdicts(strict)["D7"] == "FAIL"


def test_a_wide_bound_is_for_what_does_not_repeat() -> None:
    """The bound of bfloat16 is more than nothing: what repeats its bits has no rounding to excuse it."""

    def small(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        logits[:, :-1, 7] += 2e-4 * tokens[:, 1:]
        return logits

    found = flipped(WINDOWS["plain"], small, bound=5e-2)
    assert found["repeatable"] and found["wrong"] and found["largest_wrong"] < 5e-2
    noise = noisy(1e-3)
    found = flipped(WINDOWS["plain"], lambda logits, tokens: noise(logits, tokens), bound=5e-2)
    assert not found["repeatable"] and not found["wrong"] and 1e-3 < found["explained"] < 5e-2


AGAIN = {"error": False, "wrong": None, "guesses": None, "changed": [5], "stops": [3], "tokens": 99, "compared": 50,
         "noticed": 9, "differ": 0, "explained": 0.0, "largest_gap": 0.0, "rounding": 1e-4,
         "rows": {"count": 2, "sum": 0.0, "cost": 0.0, "limit": 1e-3, "genuine": True}}  # fmt: skip


def verdicts(flips: dict[str, Any], again: dict[str, Any] | None = None) -> dict[str, str]:
    """Return the verdicts on predictions of an evaluation that is fine but for what `flips` says."""
    value = {
        "broken": None, "score": {"bpb": 1.0}, "plugins": {}, "flips": flips, "again": again or AGAIN,
        "ledger": {"writes": 9, "versions": 1, "versions_rise": True, "left_to_right": True, "backwards": None,
                   "rows": 0, "documents_in_order": True},
        "dtype": "float32", "device": "CPU",
        "distributions": {"passes": 1, "positions": 9, "vocabulary": 97, "largest_log_sum": 0.0, "limit": 1e-4,
                          "largest_cost_gap": 0.0, "normal": True, "agrees": True},
    }  # fmt: skip
    seen = Isolated(value, None, 1.0, [], [], [], {}, [], [], 0)
    return {finding.rule: finding.verdict for finding in check_predictions(seen)}


def test_a_changed_text_in_a_fresh_process_is_judged() -> None:
    honest = flipped(WINDOWS["plain"])
    assert verdicts(honest)["D7"] == "PASS"
    for changes, verdict in (
        ({"wrong": {"by": "bits", "count": 1, "target": 7}}, "FAIL"),
        ({"wrong": {"by": "size", "count": 1, "target": 7}, "largest_gap": 0.2}, "FAIL"),
        ({"differ": 40, "explained": 1e-6}, "PASS"),
        ({"guesses": {"tokens": 90, "log_money": -3.0, "sure": 13.8}}, "PASS"),
        ({"guesses": {"tokens": 90, "log_money": 14.0, "sure": 13.8}}, "FAIL"),
        ({"guesses": {"tokens": 90, "log_money": float("nan"), "sure": 13.8}}, "FAIL"),
        ({"compared": 0}, "NOT CHECKED"),
        ({"noticed": 0}, "NOT CHECKED"),
        ({"error": True, "why": {"kind": "core.data.shards.DataError", "message": "cut off"}}, "FAIL"),
        ({"error": True, "why": {"kind": DIED, "message": "killed"}}, "FAIL"),
    ):
        assert verdicts(honest, {**AGAIN, **changes})["D7"] == verdict, changes
    for rows in ({"sum": 0.01}, {"cost": 0.01}, {"cost": float("nan")}, {"genuine": False}):
        found = verdicts(honest, {**AGAIN, "rows": {**AGAIN["rows"], **rows}})
        assert found["D8"] == "FAIL" and found["D7"] == "PASS", rows


def test_what_a_change_did_is_counted_by_what_could_be_seen() -> None:
    """Six targets in three passes, of windows that begin at tokens 0 and 3; token 2 is changed."""
    order, first = np.array([0, 1, 1, 2, 2, 3, 3]), np.array([-1, 0, 0, 0, 3, 3, 3])
    none, never = np.zeros(7, np.int64), np.zeros(7, bool)
    one = Turns(none, order, none, never)
    base = Predictions(np.arange(7, dtype=np.uint64), order, first, np.zeros(7), turns=one)

    def change(*targets: int, **sides: Any) -> Predictions:
        predicted = base.predicted.copy()
        predicted[list(targets)] += np.uint64(100)
        return base._replace(predicted=predicted, **sides)

    def found(changed: Predictions, learns: bool = False) -> tuple[int, int, list[int]]:
        effect = effect_of(base, changed, [2], learns)
        return effect.compared, effect.noticed, effect.wrong.tolist()

    def found_in(turns: Turns) -> list[int]:
        return np.flatnonzero(base._replace(turns=turns).may_notice([2], True)).tolist()

    assert found(change()) == (5, 0, [])  # all but target 3, which sees token 2
    assert found(change(3)) == (5, 1, [])
    assert found(change(2, 3, 5)) == (5, 1, [2, 5])  # not the target itself, and not from another window
    assert found(change(2, 3, 5), learns=True) == (2, 2, [2])  # what is scored later may have learned of it
    rows = one._replace(learner=np.array([0, 1, 1, 1, 2, 2, 2]))  # two documents, each with its own adapters
    assert found_in(one) == [3, 4, 5, 6] and found_in(rows) == [3]
    warm = rows._replace(round=np.array([0, 0, 0, 0, 1, 1, 1]), shared=np.array([False] * 5 + [True] * 2))
    assert found_in(warm) == [3, 5, 6]  # a first chunk, target 4, has no part of what all share
    late = change(order=np.array([0, 1, 1, 2, 2, 3, 4]))
    assert found(late) == (5, 0, [6])  # scored at another time
    assert effect_of(base, late, [2], False).gaps.tolist() == [np.inf]
