"""What is built in learns between rounds: flips, ranks, kills. Budget: 15 s."""

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.engine.ranks import Alone
from core.scoring import snapshots
from core.scoring.counts import Counts, CountTable
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.predictions import Prediction, View
from core.scoring.score import score, score_text
from shared_tests.support import plugin_examples
from shared_tests.support.known_scores import BOS, VOCAB, FakeSplit, make_dataset
from shared_tests.support.plugin_examples import CUTS, Killed, fresh, small
from shared_tests.support.predicted import HostPredictions, HostTape

RULES = {
    "temperature": ("temperature(prior=900)",),
    "backoff": ("counts(orders=1-3)",),
    "tilt": ("counts(orders=1-3, rule=tilt)", "temperature"),
    "engram": ("counts(orders=1-3, rule=engram, alpha=0.5, above=0.5)",),
}
LENGTHS = [30, 41, 1, 17, 50, 2, 33, 90, 3, 1, 70, 31, 33, 12, 45]


class Repeats(HostPredictions):
    """An engine of numpy that knows a little of each token's follower; with carry too."""

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        table = np.random.default_rng(5).normal(0, 1.5, (VOCAB, VOCAB))
        return table[tokens]

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return self.predicted(tokens, targets, Prediction()).nll()

    def start(self, rows: int) -> None:
        return None

    def commit(self, tape: Any, n: int) -> str:
        return "a state"

    def predicted(self, tokens: np.ndarray, targets: np.ndarray, prediction: Prediction, state: Any = None) -> HostTape:
        return super().predicted(tokens, targets, prediction)  # what it knows of a text is its last token


def text(lengths: list[int] | None = None, flip: int | None = None) -> Any:
    """Return a text in which n-grams repeat; `flip`: a place with another token."""
    dataset, dice = make_dataset(lengths or LENGTHS), np.random.default_rng(3)
    phrases = [dice.integers(4, VOCAB, 7) for _ in range(4)]
    starts = dataset.val.tokens == BOS
    tokens = np.concatenate([phrases[i] for i in dice.integers(0, 4, len(starts) // 7 + 1)])[: len(starts)]
    tokens = np.where(starts, BOS, tokens)
    if flip is not None:
        assert not starts[flip]
        tokens[flip] = 4 + (tokens[flip] - 3) % (VOCAB - 4)
    dataset.val = FakeSplit(tokens, dataset.val.document_bytes, 0, dataset.tokenizer)
    return dataset


def settings(windows: str, rule: str, rounds: int = 2) -> Any:
    rounds = 1 if windows == "stateful" else rounds  # a turn is four documents there, all their windows
    return plugin_examples.config(**{**CUTS[windows][0], "plugins": RULES[rule], "round": rounds})


def scored(dataset: Any, config: Any, engine: Any = None, ledger: Ledger | None = None, **more: Any) -> np.ndarray:
    """Return the entries of a ledger."""
    ledger = Ledger(len(dataset.val)) if ledger is None else ledger
    score(engine or Repeats(), Evaluation(dataset.val, config, plugins=True), ledger, **more)
    return ledger.entries


def rounds_of(dataset: Any, config: Any) -> np.ndarray:
    """Return the number of the round of each target, (targets,)."""
    evaluation, numbers = Evaluation(dataset.val, config, plugins=True), np.zeros(len(dataset.val) - 1, int)
    for i, turn in enumerate(evaluation.turns(evaluation.rows(), config.batch, None)):
        for start, length, first in zip(*turn, strict=True):
            numbers[start + first : start + length] = i // config.round
    return numbers


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("windows", CUTS)
def test_a_flip_changes_later_rounds_only(windows: str, rule: str) -> None:
    """Of its own round, what has the token in its context may change, and what is told nothing by it may not."""
    config, dataset = settings(windows, rule), text()
    rounds, before = rounds_of(dataset, config), scored(dataset, config)
    plain = scored(dataset, dataclasses.replace(config, plugins=("counts(orders=8-8)",)))
    assert np.abs(before["nats"] - plain["nats"])[rounds == 0].max() == 0, "the first round knows nothing"
    assert np.abs(before["nats"] - plain["nats"])[rounds > 0].max() > 1e-3 and rounds.max() >= 2
    noticed = 0
    ends = np.append(dataset.val.document_starts[1:], len(dataset.val))
    for place in (3, 60, 130, 133, 200):
        after = scored(text(flip=place), config)
        same = before["nats"] == after["nats"]
        here, document = rounds[place - 1], np.searchsorted(dataset.val.document_starts, place, "right") - 1
        targets = np.arange(1, len(dataset.val))
        reads = (targets > place) & (targets <= ends[document]) if windows in ("documents", "stateful") else (
            (targets > place) & (targets <= place + config.seq)
        )  # fmt: skip
        assert same[(rounds < here) | ((rounds == here) & ~reads & (targets != place))].all()
        noticed += int((~same[(rounds > here) & ~reads]).sum())
    assert noticed > 0, "later rounds learn from it"


class Peeks(Counts):
    """Counts a round's targets before they are written."""

    def prediction(self, view: View, prediction: Prediction) -> Prediction:
        self.table.count([(row, 1) for row in view.tokens])
        return super().prediction(view, prediction)


def test_the_flip_test_sees_a_table_that_learns_too_soon() -> None:
    """The planted fault: what the test above asserts is false then."""
    config = settings("plain", "backoff")
    before, after = (
        scored(dataset, config, plugins=[Peeks(Counts.Settings("1-3"))]) for dataset in (text(), text(flip=60))
    )
    rounds = rounds_of(text(), config)
    targets = np.arange(1, len(rounds) + 1)
    assert (before["nats"] != after["nats"])[(rounds == rounds[59]) & (targets < 60)].any()


def test_the_table_does_not_know_how_the_text_was_cut() -> None:
    """Neither windows nor rounds fabricate or lose an n-gram: what is learned is that of the text in one piece."""
    dataset, states = text(), []
    whole = CountTable((1, 2, 3), VOCAB, BOS)
    whole.count([(dataset.val.tokens, 1)])
    for windows in CUTS:
        for changes in ({}, {"seq": 9, "stride": 4 if windows == "sliding" else None}):
            plugin = Counts(Counts.Settings("1-3"))
            scored(dataset, dataclasses.replace(settings(windows, "backoff"), **changes), plugins=[plugin])
            states.append(plugin.state())
    for state in states:
        assert all(np.array_equal(state[name], values) for name, values in whole.state().items())


def test_with_carry_a_context_goes_on_over_windows() -> None:
    """A row of short windows predicts as one that reads each document at once."""
    config, dataset = settings("stateful", "backoff"), text()
    nats = [scored(dataset, dataclasses.replace(config, seq=seq))["nats"] for seq in (128, 1, 4)]
    assert (nats[0] == nats[1]).all() and (nats[0] == nats[2]).all()


class Together:
    """Ranks that are threads."""

    def __init__(self, world: int) -> None:
        self.world, self.values, self.barrier = world, [None] * world, threading.Barrier(world)

    def rank(self, rank: int) -> Any:
        ranks, together = Alone(), self
        ranks.rank, ranks.world = rank, self.world

        def gather(value: Any) -> list[Any]:
            together.barrier.wait(30)
            together.values[rank] = value
            together.barrier.wait(30)
            return list(together.values)

        ranks.gather = gather  # type: ignore[method-assign]
        ranks.broadcast = lambda value: gather(value)[0]  # type: ignore[method-assign]
        return ranks

    def run(self, work: Any) -> list[Any]:
        """Return what each rank's `work(ranks)` returned; the first error is raised."""
        results: list[Any] = [None] * self.world

        def act(rank: int) -> None:
            try:
                results[rank] = work(self.rank(rank))
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=act, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
                raise result
        return results


@pytest.mark.parametrize("rule", ["temperature", "backoff"])
@pytest.mark.parametrize("windows", CUTS)
def test_any_number_of_ranks_gives_the_same_ledger(windows: str, rule: str) -> None:
    dataset, config = text(), settings(windows, rule, 3)
    alone = scored(dataset, config)
    assert alone["order"].all()
    for world in (2, 3, 4):
        for entries in Together(world).run(lambda ranks: scored(dataset, config, ranks=ranks)):
            assert entries.tobytes() == alone.tobytes(), "orders of writes too"


def kills(path: Path, config: Any, calls: int, world: int = 1) -> None:
    """Score into the ledger at `path` and get killed after so many turns of rank 0."""
    left = [calls]

    def progress(done: int, total: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    with pytest.raises(Killed):
        Together(world).run(lambda ranks: goes_on(path, config, ranks, progress if ranks.rank == 0 else None))


def goes_on(path: Path, config: Any, ranks: Any = None, progress: Any = None, engine: Any = None) -> np.ndarray:
    """Score into the ledger at `path`, which rank 0 has."""
    dataset = text()
    first = ranks is None or ranks.rank == 0
    ledger = Ledger.open(path, len(dataset.val), "key") if first else Ledger(len(dataset.val))
    try:
        return scored(dataset, config, engine, ledger, ranks=ranks, progress=progress)
    finally:
        ledger.close()


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["copies", "no-copies"])
@pytest.mark.parametrize("windows", CUTS)
def test_a_killed_evaluation_goes_on_with_another_number_of_ranks(
    windows: str, every: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "SNAPSHOT_EVERY", every)
    config = dataclasses.replace(settings(windows, "backoff"), plugins=("temperature(prior=900)", "counts(orders=1-3)"))
    whole = scored(text(), config)
    for calls, before, after in ((1, 1, 1), (3, 1, 2), (3, 2, 1), (2, 3, 2), (7, 1, 3)):
        path = tmp_path / f"{calls}-{before}-{after}"
        kills(path, config, calls, before)
        written, passes = Ledger.read(path).writes, []
        engine = Repeats()
        counted = engine.predicted
        engine.predicted = lambda *given: passes.append(1) or counted(*given)  # type: ignore[method-assign]  # noqa: B023
        entries = Together(after).run(lambda ranks: goes_on(path, config, ranks, engine=engine))  # noqa: B023
        assert entries[0].tobytes() == whole.tobytes() and not Path(f"{path}.plugins").exists()
        repeated = len(passes) + written - int(whole["order"].max())
        assert 0 <= repeated <= written and (every == 0 or repeated == written), "what is in a copy is not repeated"
        if every == 0 and windows != "stateful":
            assert repeated == written % config.round, "and nothing else"


def test_an_evaluation_that_is_another_cannot_go_on(tmp_path: Path) -> None:
    """What is repeated must be what was written, on every rank."""
    config = settings("plain", "backoff")
    kills(tmp_path / "book", config, 5)
    other = dataclasses.replace(config, plugins=("counts(orders=1-3, k=1)",))
    for world in (1, 2):
        with pytest.raises(LedgerError, match="repeating write"):
            Together(world).run(lambda ranks: goes_on(tmp_path / "book", other, ranks))


@pytest.mark.pair
@pytest.mark.parametrize("windows", ["sliding", "stateful"])
def test_backends_agree_in_rounds(windows: str) -> None:
    dataset = text(LENGTHS[:8])
    config = dataclasses.replace(settings(windows, "backoff"), plugins=("temperature(prior=900)", "counts(orders=1-3)"))
    model = small("hybrid" if windows == "stateful" else "debug")
    ours, theirs = (scored(dataset, config, fresh(backend, model, "float64"))["nats"] for backend in ("cuda", "mlx"))
    plain = Ledger(len(dataset.val))
    score_text(fresh("cuda", model, "float64"), Evaluation(dataset.val, config), plain)
    assert np.abs(ours - theirs).max() < 1e-10 and np.abs(ours - plain.entries["nats"]).max() > 0.01
