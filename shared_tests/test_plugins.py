"""Plug-ins: what they gain, what they may not do, and that a killed evaluation ends as if nobody had killed it.

Budget: 60 s.
"""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core import presets, rng, schedule
from core.bundled import open_data
from core.cli import main
from core.config import ConfigError, EvalConfig
from core.engine import Batch, Engine, EngineOptions, load_engine, micro_batches
from core.export.artifact import write_artifact
from core.scoring import Score, score, score_text, session
from core.scoring.ledger import Ledger, LedgerError, Scored
from core.scoring.plugins import Learner, Plugin, ScoredText, Temperature, View, load_plugins, log_softmax
from core.scoring.windows import Windows, sliding
from shared_tests import tolerances
from shared_tests.harness import BACKENDS
from shared_tests.plugin_examples import (
    LENGTHS,
    TRAIN,
    Adaptation,
    BigramCache,
    Costs,
    Counted,
    Dies,
    Killed,
    Markov,
    Ordered,
    Predicts,
    Resets,
    fresh,
    small,
)
from shared_tests.test_cli import Capture, call
from shared_tests.test_scoring import VOCAB, make_dataset

ROOT = Path(__file__).resolve().parent.parent
SHORT = [5, 40, 1, 17, 16, 2, 33, 20]
ADAPTED_FLOAT64 = 1e-8
"""Nats of targets after adaptation, backend against backend (measured: 2e-15)."""


def config(**changes: Any) -> EvalConfig:
    return EvalConfig(**{"seq": 16, "batch": 4, "plugins": ("x",), **changes})


def run(engine: Any, dataset: Any, plugins: list[Plugin], **changes: Any) -> tuple[Score, np.ndarray]:
    """Return the score and the entries of its ledger."""
    book = Ledger(len(dataset.val))
    found = score(engine, dataset, config(**changes), documents=None, seed=0, ledger=book, plugins=plugins)
    return found, book.entries


# 1. Temperature.


@pytest.mark.parametrize("k", [1.5, 0.7, 1.0])
def test_temperature_finds_the_one_that_is_missing(k: float) -> None:
    engine = Markov(k)
    dataset, changes = engine.text(20_000), {"seq": 64, "batch": 4}
    temperature = Temperature()
    helped, _ = run(engine, dataset, [temperature], **changes)
    without, _ = run(engine, dataset, [], **changes)
    true, _ = run(Markov(), dataset, [], **changes)
    assert temperature.inverse == pytest.approx(1 / k, rel=0.02)
    if k == 1.0:
        assert abs(helped.nats / true.nats - 1) < 1e-3
    else:
        gain, left = without.nats - helped.nats, helped.nats - true.nats
        assert gain > 0.02 * true.nats and left < 0.03 * gain, (gain, left)


@pytest.mark.parametrize("b", [1.0, 1.3, 0.6])
def test_slope_and_curvature_are_those_of_the_cost(b: float) -> None:
    rows, seq = 3, 20
    logprobs = log_softmax(2 * rng.normal(0, "plugins/slope", rows * seq * VOCAB).reshape(rows, seq, VOCAB))
    targets = rng.integers16(1, "plugins/slope", rows * seq).reshape(rows, seq) % VOCAB
    targets = targets.astype(np.int32)
    kept = np.ones((rows, seq), bool)
    kept[1, 7:] = False
    row, column = np.nonzero(kept)

    def cost(b: float) -> float:
        scored = log_softmax(b * logprobs)
        return -float(scored[row, column, targets[row, column]].sum())

    temperature = Temperature()
    temperature.load({"sums": np.array([b * 1000, 1000.0])})
    view = View(np.zeros((rows, seq), np.int32), np.zeros((rows, seq), np.int64), kept)
    temperature.predict(logprobs, view)
    temperature.learn(ScoredText((), view, row, column, targets[row, column], np.zeros(len(row))))
    pull, total = temperature.state()["sums"]
    curvature = total - 1000
    slope = curvature * b - (pull - b * 1000)
    h = 1e-4
    assert slope == pytest.approx((cost(b + h) - cost(b - h)) / (2 * h), rel=1e-6)
    assert curvature == pytest.approx((cost(b + h) - 2 * cost(b) + cost(b - h)) / h**2, rel=1e-4)


# 2. A killed evaluation goes on.


CUTS = {
    "plain": ({"batch": 2}, 32),
    "sliding": ({"windows": "sliding", "stride": 8, "batch": 3}, 24),
    "documents": ({"windows": "documents", "batch": 2}, 17),
    "stateful": ({"windows": "stateful", "batch": 4}, 0),
}
"""Options of each kind of windows, and the length of the ranges that are trained on."""


class Lives:
    """One evaluation that is killed and goes on: every life has an engine and plug-ins of its own."""

    def __init__(self, path: Path, windows: str) -> None:
        changes, length = CUTS[windows]
        self.path, self.settings, self._length = path, config(**changes), length
        self.run = small("hybrid" if windows == "stateful" else "debug", length or TRAIN.seq)
        self.dataset = make_dataset(SHORT)
        self.passes = self.updates = 0
        """What the last life computed, and how many updates all lives together made."""

    def live(self, progress: Callable[[int, int], None] | None = None, learn: int = 0) -> np.ndarray:
        """Go on; return the entries, with which of them were there before."""
        with_weights = self._length > 0
        cache, adaptation = Counted(), Adaptation(self._length)
        plugins = [Dies(learn), Temperature(), cache, *([adaptation] if with_weights else [])]
        book = Ledger.open(self.path, len(self.dataset.val), "key")
        try:
            score_text(
                fresh("cuda", self.run), self.dataset.val, self.settings, book, None, True, plugins, VOCAB, None,
                progress,
            )  # fmt: skip
        finally:
            book.close()
            self.passes, self.updates = cache.passes, adaptation.steps
        return book.entries


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["copies", "no-copies"])
@pytest.mark.parametrize("windows", CUTS)
def test_killed_after_any_pass_it_ends_the_same(
    windows: str, every: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SNAPSHOT_EVERY", every)
    whole = Lives(tmp_path / "whole", windows)
    expected = whole.live()
    total = int(expected["order"].max())
    assert total == whole.passes >= 4 and (whole.updates >= 3 or windows == "stateful")
    assert expected["version"].max() >= whole.updates - 1
    for where in ("progress", "learn")[: 1 if every else 2]:
        for kill in range(1, total + 1):
            lives = Lives(tmp_path / f"{where}-{kill}", windows)
            calls = [0]

            def progress(done: int, of: int, calls: list[int] = calls, kill: int = kill) -> None:
                calls[0] += 1
                if calls[0] == kill:
                    raise Killed

            with pytest.raises(Killed):
                lives.live(progress if where == "progress" else None, kill if where == "learn" else 0)
            assert Ledger.read(lives.path).writes == kill == lives.passes
            # A copy is deleted where the ledger is complete: all passes are repeated then.
            copied = 0 if every or kill == total else kill - (where == "learn")
            left = Path(f"{lives.path}.plugins")
            assert left.exists() == (copied > 0)
            again = lives.live()
            assert again.tobytes() == expected.tobytes(), (where, kill)
            assert lives.passes == total - copied and lives.updates == whole.updates
            assert not left.exists()


def test_killed_again_while_it_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Lives(tmp_path / "whole", "plain").live()
    for again in (1, 2, 3):
        lives = Lives(tmp_path / f"{again}", "plain")
        for kill, every, passes in ((4, 1e9, 4), (again, 0.0, again)):  # its copies are behind the ledger
            monkeypatch.setattr(session, "SNAPSHOT_EVERY", every)
            calls = iter(range(1, 9))

            def progress(done: int, total: int, calls: Any = calls, kill: int = kill) -> None:
                if next(calls) == kill:
                    raise Killed

            with pytest.raises(Killed):
                lives.live(progress)
            assert lives.passes == passes and Ledger.read(lives.path).writes == 4
        assert lives.live().tobytes() == expected.tobytes() and lives.passes == 5 - again


def test_a_copy_is_never_ahead_of_the_ledger_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no kill can show, for the kernel keeps what was written: the ledger reaches the disk before a copy does."""
    monkeypatch.setattr(session, "SNAPSHOT_EVERY", 0.0)
    done: list[str] = []
    sync, write = Ledger.sync, session.replace_file

    def synced(self: Ledger) -> None:
        done.append(f"ledger {self.writes}")
        sync(self)

    def written(path: Path, *parts: Any) -> None:
        done.append(f"copy {json.loads(safe_metadata(parts[0])['skc'])['number']}")
        write(path, *parts)

    monkeypatch.setattr(Ledger, "sync", synced)
    monkeypatch.setattr(session, "replace_file", written)
    Lives(tmp_path / "ledger", "plain").live()
    assert done == [f"{what} {number}" for number in range(1, 6) for what in ("ledger", "copy")]


def safe_metadata(data: bytes) -> dict[str, str]:
    """Return what a safetensors file says of itself."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_the_stored_form_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adaptation that trains with the stored form goes on with it, whatever the engine was loaded with."""
    monkeypatch.setattr(session, "SNAPSHOT_EVERY", 0.0)
    base = small("ablate", 32)
    base = dataclasses.replace(base, train=dataclasses.replace(base.train, quantise="never"))
    dataset, settings, entries = make_dataset(SHORT), config(batch=2), []
    for kill in (None, 3):
        for life in range(1 if kill is None else 2):
            book = Ledger.open(tmp_path / f"{kill}", len(dataset.val), "key")
            plugins: list[Plugin] = [Dies(3 if kill and life == 0 else 0), Adaptation(32, quantise=True)]
            model = fresh("cuda", base)
            assert not model.quantise
            try:
                score_text(model, dataset.val, settings, book, None, True, plugins, VOCAB)
            except Killed:
                assert (kill, life) == (3, 0)
            assert not model.quantise, "the engine is as it was"
            book.close()
        entries.append(book.entries.tobytes())
    assert entries[0] == entries[1]


def test_a_process_is_killed_three_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 between a write and what is learned from it, before a copy gets its name, and after a pass."""
    path, program = (
        tmp_path / "ledger",
        "import sys; from shared_tests.plugin_examples import child; child(*sys.argv[1:])",
    )
    writes = []
    for place, count in (("learn", 2), ("rename", 2), ("progress", 4)):
        arguments = [sys.executable, "-W", "error", "-c", program, str(path), place, str(count)]
        done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        writes.append(Ledger.read(path).writes)
        assert Path(f"{path}.plugins").exists()
    assert writes == [2, 3, 4]
    monkeypatch.setattr(session, "SNAPSHOT_EVERY", 0.0)
    dataset, entries, passes = make_dataset(LENGTHS), [], []
    for place in (path, tmp_path / "whole"):
        with_cache = Counted()
        book = Ledger.open(place, len(dataset.val), "key")
        plugins: list[Plugin] = [Plugin(), with_cache, Adaptation()]
        score_text(fresh("mlx", small("debug")), dataset.val, config(), book, None, True, plugins, VOCAB)
        book.close()
        entries.append(book.entries.tobytes())
        passes.append(with_cache.passes)
    assert entries[0] == entries[1] and passes == [2, 6], passes
    assert not [left for left in tmp_path.iterdir() if ".plugins" in left.name]


def test_a_copy_of_other_plugins_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learned before a kill does not fit a plug-in that was changed since; the weights stay as they were."""
    monkeypatch.setattr(session, "SNAPSHOT_EVERY", 0.0)
    dataset, path = make_dataset(SHORT), tmp_path / "ledger"

    def go_on(*plugins: Plugin) -> None:
        book = Ledger.open(path, len(dataset.val), "key")
        try:
            score_text(model, dataset.val, config(batch=2), book, None, True, list(plugins), VOCAB)
        finally:
            book.close()

    model = fresh("cuda", small("debug", 32))
    before = held(model)
    with pytest.raises(Killed):
        go_on(Dies(3), Adaptation(32), BigramCache())
    for others in ([Plugin(), Adaptation(32), Temperature()], [Plugin(), BigramCache(), Adaptation(32)]):
        with pytest.raises(
            LedgerError, match=r"ledger.plugins: is not of these plug-ins .*; delete it and .*ledger to"
        ):
            go_on(*others)
        assert held(model) == before
    copied = Path(f"{path}.plugins").read_bytes()
    Path(f"{path}.plugins").write_bytes(copied[:-100])
    with pytest.raises(LedgerError, match=r"ledger.plugins: damaged"):
        go_on(Plugin(), Adaptation(32), BigramCache())
    path.unlink()
    go_on(Plugin(), BigramCache())  # a copy without its ledger is of no evaluation


def test_a_repeated_pass_tells_what_was_written(tmp_path: Path) -> None:
    """Another machine rounds otherwise; what the first one wrote stands, and weights that are others are refused."""
    dataset, path = make_dataset(SHORT), tmp_path / "ledger"
    told = []
    for k, start in ((1.0, [Dies(3)]), (1.00001, [Plugin()])):
        book, costs = Ledger.open(path, len(dataset.val), "key"), Costs()
        try:
            score_text(Markov(k), dataset.val, config(batch=2), book, None, True, [costs, *start], VOCAB)
        except Killed:
            assert k == 1.0
        book.close()
        told.append(np.concatenate(costs.told))
    assert len(told[0]) == 96 and (told[1] == book.entries["nats"]).all() and (told[1][:96] == told[0]).all()
    book = Ledger.open(path, len(dataset.val), "key")
    with pytest.raises(LedgerError, match="target .*: repeating write 1 gives .*: this evaluation cannot go on"):
        score_text(Markov(1.1), dataset.val, config(batch=2), book, None, True, [Plugin()], VOCAB)
    book.close()


# 3. Both backends give the same.

HELP: dict[str, Callable[[], list[Plugin]]] = {
    "nothing": list,
    "temperature": lambda: [Temperature()],
    "cache": lambda: [BigramCache()],
    "both": lambda: [Temperature(), BigramCache()],
}


@pytest.mark.pair
@pytest.mark.parametrize(
    "windows, helper", [("plain", h) for h in HELP] + [(w, h) for w in list(CUTS)[1:] for h in ("nothing", "both")]
)
def test_backends_agree(windows: str, helper: str) -> None:
    dataset, changes = make_dataset(SHORT), CUTS[windows][0]
    run_config = small("hybrid" if windows == "stateful" else "debug")
    for dtype in ("float64", "float32"):
        (ours, mine), (theirs, other) = (
            run(fresh(backend, run_config, dtype), dataset, HELP[helper](), **changes) for backend in BACKENDS
        )
        assert (mine["order"] == other["order"]).all()
        if dtype == "float64":
            assert np.abs(mine["nats"] - other["nats"]).max() <= 1e-10
            gap = abs(run(fresh("cuda", run_config, dtype), dataset, [], **changes)[0].nats - ours.nats)
            assert (gap > 1e-4) == (helper != "nothing"), "what is compared must matter"
        assert abs(ours.bpb - theirs.bpb) <= tolerances.P5_BPB


@pytest.mark.pair
@pytest.mark.parametrize("name", ["debug", "skc_mac"])
def test_backends_adapt_alike(name: str) -> None:
    dataset, found = make_dataset(LENGTHS), []
    for backend in BACKENDS:
        adaptation = Adaptation(quantise=name == "skc_mac")
        found.append(run(fresh(backend, small(name), "float64"), dataset, [adaptation])[1])
        assert adaptation.steps == 5
    assert (found[0]["version"] == found[1]["version"]).all()
    without = run(fresh("cuda", small(name), "float64"), dataset, [])[1]
    assert np.abs(found[0]["nats"] - without["nats"]).max() > 1e-2
    assert np.abs(found[0]["nats"] - found[1]["nats"]).max() <= ADAPTED_FLOAT64


# 4. What an adaptation may do, and what it leaves.


def held(model: Engine) -> dict[str, bytes]:
    """Return everything that an engine holds, and what it predicts."""
    text = make_dataset(SHORT).val.tokens[None, :17]
    sides = {"params": model.params(), "optimizer": model.optimizer(), "weights": model.weights()}
    arrays = {f"{side}/{name}": value.tobytes() for side, part in sides.items() for name, value in part.items()}
    scores = {"nll": model.nll(text[:, :-1], text[:, 1:]).tobytes(), "logits": model.logits(text).tobytes()}
    return {**arrays, **scores, "quantise": bytes([model.quantise])}


def trained(backend: str, name: str, **changes: Any) -> Engine:
    """Return an engine with an optimizer that has been at work, and averages that are not the weights."""
    base = small(name)
    model = fresh(backend, dataclasses.replace(base, train=dataclasses.replace(base.train, **changes)))
    row = make_dataset(LENGTHS).val.read(0, 65)[None]
    for step in range(2):
        plan = dataclasses.replace(schedule.plan(step, 0.5, TRAIN), average=0.9 * step, quantise=model.quantise)
        assert model.train_step(Batch(row[:, :-1], row[:, 1:]), plan).result().finite
    return model


@pytest.mark.pair
@pytest.mark.parametrize("end", ["ends", "raises"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_engine_gets_its_weights_back(backend: str, end: str) -> None:
    dataset = make_dataset(LENGTHS)
    for model in (trained(backend, "skc_mac"), trained(backend, "debug", average_from=0.1)):
        before, during = held(model), []

        def progress(done: int, total: int, model: Engine = model, during: list = during) -> None:
            if done > total / 2:
                during.append(model.params())
                if end == "raises":
                    raise Killed

        plugins: list[Plugin] = [Adaptation(quantise=not model.quantise)]
        try:
            score(model, dataset, config(), documents=None, seed=0, progress=progress, plugins=plugins)
            assert end == "ends"
        except Killed:
            assert end == "raises"
        assert any(before[f"params/{name}"] != value.tobytes() for name, value in during[0].items())
        assert held(model) == before


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_rows_than_a_micro_batch_are_learned(backend: str) -> None:
    """8 rows of 64 fit a micro-batch: one row of 32 is less, and one of 128 more tokens than any row of training."""
    dataset = make_dataset(LENGTHS)
    for length, batch in ((32, 2), (128, 8)):
        plugin = Adaptation(length)
        _, entries = run(fresh(backend, small("debug")), dataset, [plugin], batch=batch)
        assert plugin.steps > 0 and entries["version"].max() == plugin.steps
    three = Batch(np.zeros((3, 4), np.int32), np.zeros((3, 4), np.int32))
    assert micro_batches(three, 2, 1) == ([slice(0, 2), slice(2, 3)], [1.0, 0.5], 1.5)
    assert micro_batches(three._replace(total=8), 8, 3) == ([slice(0, 3)], [1.0], 8 / 3)


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adaptation_is_scored_first_and_trained_then(backend: str) -> None:
    """The ledger holds, to the bit, what this loop gives; each version of the weights is that of its updates."""
    dataset = make_dataset(LENGTHS)
    _, entries = run(fresh(backend, small("debug")), dataset, [Adaptation()])
    model, text = fresh(backend, small("debug")), dataset.val.tokens
    updates = 0
    for order, at in enumerate(range(0, len(text) - 1, 64), 1):
        inputs, targets = np.zeros((4, 16), np.int32), np.zeros((4, 16), np.int32)
        count = min(64, len(text) - 1 - at)
        inputs.flat[:count], targets.flat[:count] = text[at : at + count], text[at + 1 : at + count + 1]
        nats = -np.take_along_axis(log_softmax(model.logits(inputs)), targets[..., None], -1).astype(np.float64)
        found = entries[at : at + count]
        assert (found["nats"] == nats.flat[:count]).all(), order
        assert (found["order"] == order).all() and (found["version"] == updates).all()
        if count == 64:
            row = text[None, at : at + 65]
            model.train_step(Batch(row[:, :-1], row[:, 1:]), schedule.plan(updates, 0.5, TRAIN)).result()
            updates += 1
    assert updates == 5


def test_an_adaptation_begins_with_an_optimizer_that_knows_nothing() -> None:
    """Momentum of the training run is in no artifact: a score may not come from it."""
    dataset, model = make_dataset(LENGTHS), trained("cuda", "debug")
    decoded = fresh("cuda", small("debug")).params()
    model.load_params(decoded)
    assert any(value.any() for value in model.optimizer().values())
    _, found = run(model, dataset, [Adaptation()])
    _, expected = run(fresh("cuda", small("debug")), dataset, [Adaptation()])
    assert found.tobytes() == expected.tobytes()


def test_reset_is_a_new_version_of_the_weights_of_the_start() -> None:
    dataset = make_dataset(LENGTHS)
    plugin = Resets()
    _, entries = run(fresh("cuda", small("debug")), dataset, [plugin])
    by_order = [int(entries["version"][entries["order"] == i][0]) for i in range(1, 7)]
    assert by_order == [0, 1, 3, 5, 7, 9] and plugin.steps == 5
    model = fresh("cuda", small("debug"))
    row, last = dataset.val.read(256, 321)[None], dataset.val.read(320, len(dataset.val))
    model.train_step(Batch(row[:, :-1], row[:, 1:]), schedule.plan(4, 0.5, TRAIN)).result()
    inputs = np.zeros((4, 16), np.int32)
    inputs.flat[: len(last) - 1] = last[:-1]
    scored = log_softmax(model.logits(inputs)).reshape(64, VOCAB)[np.arange(len(last) - 1), last[1:]]
    assert (entries["nats"][320:] == -scored.astype(np.float64)).all()


# 5. What is refused.


def learner_of(lengths: list[int]) -> tuple[Learner, list[Scored], Ledger, Engine]:
    """Return a learner, the ranges of one scored text of 64 and one of 32 targets, their ledger and the engine."""
    split, model = make_dataset(lengths).val, fresh("cuda", small("debug"))
    book = Ledger(len(split))
    ranges = [*book.write(np.arange(1, 65), np.ones(64), 0), *book.write(np.arange(65, 97), np.ones(32), 0)]
    return Learner(model, split, book), ranges, book, model


def test_training_takes_scored_ranges_of_one_length_only() -> None:
    learner, (long, short), book, model = learner_of(LENGTHS)
    plan, before = schedule.plan(0, 0.5, TRAIN), held(model)
    forged = copy.copy(long)
    object.__setattr__(forged, "start", 97)
    object.__setattr__(forged, "stop", 161)
    early = copy.copy(long)
    object.__setattr__(early, "stop", 66)
    (foreign,) = Ledger(len(book.entries) + 1).write(np.arange(101, 165), np.ones(64), 0)
    for fake in (forged, early, foreign):
        for ranges in ([fake], [long, fake]):
            with pytest.raises(LedgerError, match="were not scored") as refused:
                learner.train(ranges, plan)
            assert refused.value.rule == "D9"
    with pytest.raises(LedgerError, match="by hand") as refused:
        Scored(97, 161, 0, 1)
    assert refused.value.rule == "D9"
    for ranges in ([long, short], []):
        with pytest.raises(LedgerError, match="one length"):
            learner.train(ranges, plan)
    assert learner.version == 0 and held(model) == before
    assert learner.train([long], plan).finite and learner.version == 1 and held(model) != before


def moved(windows: Windows, which: int, start: int = 0, length: int = 0, first: int = 0) -> Windows:
    """Return `windows` with numbers added to those of window `which`."""
    one = np.arange(len(windows.start)) == which % len(windows.start)
    return Windows(windows.start + one * start, windows.length + one * length, windows.first + one * first)


def merged(windows: Windows) -> Windows:
    """Return the first two windows as one."""
    return Windows(windows.start[[0]], windows.length[[0]] * 2, windows.first[[0]])


ORDERS: dict[str, tuple[Callable[[Windows], Windows], str | None, str]] = {
    "repeats": (lambda w: w.take(np.append(0, np.arange(len(w.start)))), "D10", "scored twice"),
    "repeats, shorter": (
        lambda w: Windows(*(np.append(side, extra) for side, extra in zip(w, (0, 8, 0), strict=True))), "D10", "twice",
    ),
    "drops the first": (lambda w: w.take(slice(1, None)), "D5", "target 1 is to be scored 0 times"),
    "drops the last": (lambda w: w.take(slice(0, -1)), "D5", r"target 129 is to be scored 0 times"),
    "drops the very first": (lambda w: moved(w, 0, first=1), "D5", "target 1 is to be scored 0 times"),
    "drops the very last": (lambda w: moved(w, -1, length=-1), "D5", "target 133 is to be scored 0 times"),
    "drops one target": (lambda w: moved(w, 2, first=1), "D5", "target 33 is to be scored 0 times"),
    "overlaps": (lambda w: moved(w, 2, first=-1), "D5", "target 32 is to be scored 2 times"),
    "before the text": (lambda w: w._replace(first=w.first - 1), "D5", "outside"),
    "after the text": (lambda w: w._replace(start=w.start + 1), "D5", "outside"),
    "empty": (lambda w: moved(w, 2, first=99), "D5", "outside 1 to 133, or none"),
    "too long": (lambda w: Windows(*(np.append(a, b) for a, b in zip(merged(w), w.take(slice(2, None)), strict=True))),
                 None, "window of 32 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_must_score_every_target_once(name: str) -> None:
    change, rule, message = ORDERS[name]
    dataset, engine = make_dataset(SHORT), Markov()
    with pytest.raises(LedgerError, match=message) as refused:
        run(engine, dataset, [Plugin(), Ordered(change), Plugin()])
    assert refused.value.rule == rule


def test_another_order_is_scored_in_that_order() -> None:
    dataset = make_dataset(SHORT)
    _, straight = run(Markov(), dataset, [Plugin()], windows="sliding", stride=4)
    for plugins in ([Ordered(lambda w: w.take(slice(None, None, -1)))], [Ordered(lambda w: w.take(slice(None)))]):
        _, entries = run(Markov(), dataset, [*plugins, Plugin()], windows="sliding", stride=4)
        assert (entries["nats"] == straight["nats"]).all()
    _, back = run(Markov(), dataset, [Ordered(lambda w: w.take(slice(None, None, -1)))], windows="sliding", stride=4)
    assert (np.diff(back["order"]) <= 0).all() and back["order"][-1] == 1
    cuts = sliding(len(dataset.val), 16, 4)
    assert back["order"][0] == -(-len(cuts.start) // 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p[..., :-1], r"plug-in Predicts: predictions of shape \(4, 16, 49\), expected \(4, 16, 50\)"),
        (lambda p: p[:, :-1], "shape"),
        (lambda p: p.max(-1), "shape"),
        (lambda p: np.where(np.arange(VOCAB) == 9, np.nan, p), "nan nats"),
        (lambda p: np.full_like(p, np.inf), "-inf nats"),
        (lambda p: np.full_like(p, -np.inf), "inf nats"),
        (lambda p: p + 40, "expected a finite number from 0 up"),
    ],
)
def test_predictions_must_be_a_distribution_of_finite_costs(change: Any, message: str) -> None:
    dataset = make_dataset(SHORT)
    book = Ledger(len(dataset.val))
    with pytest.raises(LedgerError, match=message) as refused:
        score_text(Markov(), dataset.val, config(), book, None, True, [Plugin(), Predicts(change)], VOCAB)
    assert refused.value.rule == "D8" and book.writes == 0


def test_plugins_change_predictions_one_after_the_other() -> None:
    """In the order of eval.plugins, in the engine's own precision, and where none changes anything nothing changes."""
    dataset, model = make_dataset(SHORT), fresh("cuda", small("debug"), "float64")
    _, plain = run(model, dataset, [])
    _, same = run(model, dataset, [Plugin(), Plugin()])
    assert np.abs(plain["nats"]).max() > 0 and np.abs(plain["nats"] - same["nats"]).max() < 1e-12
    sharper, flatter = Predicts(lambda p: log_softmax(2 * p)), Predicts(lambda p: np.log(0.5 * np.exp(p) + 0.5 / VOCAB))
    _, found = run(model, dataset, [sharper, flatter])
    _, other = run(model, dataset, [flatter, sharper])
    text = dataset.val.tokens
    p = np.exp(log_softmax(2 * log_softmax(model.logits(text[None, :16]))))[0, np.arange(16), text[1:17]]
    assert np.abs(found["nats"][:16] + np.log(0.5 * p + 0.5 / VOCAB)).max() < 1e-12
    assert np.abs(found["nats"] - other["nats"]).max() > 1e-3


@pytest.mark.parametrize("plugin", [Adaptation(), Ordered(lambda w: w)])
def test_carry_takes_no_plugin_that_it_cannot_honour(plugin: Plugin) -> None:
    with pytest.raises(ConfigError, match=r"eval.windows=stateful with plug-in \w+: .*--eval.windows sliding"):
        run(fresh("cuda", small()), make_dataset(SHORT), [plugin], windows="stateful")


@pytest.mark.parametrize(
    "name, message",
    [
        ("temprature", "eval.plugins: 'temprature' is not a plug-in; did you mean temperature"),
        ("xyz", r"known: temperature \(your own: package.module:Class\)"),
        ("nowhere.at_all:Cache", "No module named 'nowhere'; it is looked for on PYTHONPATH"),
        ("shared_tests.plugin_examples:Missing", "not a class that extends core.scoring.plugins.Plugin"),
        ("shared_tests.plugin_examples:small", "not a class that extends"),
        ("shared_tests.plugin_examples:EvalConfig", "not a class that extends"),
        (":Cache", "is not a plug-in"),
        (".plugin_examples:BigramCache", "is not a plug-in"),
        ("shared_tests.plugin_examples:", "is not a plug-in"),
    ],
)
def test_plugins_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_plugins(["temperature", name])


def test_plugins_by_name() -> None:
    found = load_plugins(["temperature", "shared_tests.plugin_examples:BigramCache"])
    assert [type(plugin) for plugin in found] == [Temperature, BigramCache]


# 6. `skc eval --ledger` and the end of a run.


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has learned nothing, over the bundled text."""
    config, path = presets.mini(presets.get("debug").config), tmp_path_factory.mktemp("artifact") / "debug.skc"
    model = dataclasses.replace(config.model, vocab=presets.get("debug").config.model.vocab)
    config = dataclasses.replace(config, model=model)
    sha256 = open_data(config.data.path, train=False).tokenizer.sha256
    weights = load_engine("mlx", config, options=EngineOptions(dtype="float32", compile=False)).quantised()
    write_artifact(path, model, weights, tokenizer_sha256=sha256, provenance={"preset": "debug", "train_seq": 64})
    return str(path)


def refused_with(capsys: Capture, *argv: str) -> str:
    """Return the last line, on stderr, of a verb that refuses its input."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    return capsys.readouterr().err.strip().split("\n")[-1]


def test_eval_keeps_a_ledger_and_refuses_another(artifact: str, tmp_path: Path, capsys: Capture) -> None:
    book = str(tmp_path / "book")
    helped = ("--plugins", "temperature", "shared_tests.plugin_examples:BigramCache")
    argv = ("eval", artifact, "--documents", "2", "--batch", "16", "--backend", "mlx", "--ledger", book)
    found = call(capsys, *argv, *helped)["score"]
    assert found["plugins"] == list(helped[1:]) and found["label"] == "estimate"
    entries = Ledger.read(book).entries
    assert (entries["order"] > 0).sum() == found["targets"] and not Path(f"{book}.plugins").exists()
    assert call(capsys, *argv, *helped)["score"] == found
    for others in ((), helped[:2], (*helped, "--seq", "32"), (*helped, "--batch", "8")):
        said = refused_with(capsys, *argv, *others)
        assert "book: holds another evaluation" in said and "give another file" in said
    assert Ledger.read(book).entries.tobytes() == entries.tobytes()
    assert "did you mean temperature?" in refused_with(capsys, *argv, "--plugins", "temprature")
    said = refused_with(
        capsys, *argv[:-2], "--windows", "stateful", "--plugins", "shared_tests.plugin_examples:Adaptation"
    )
    assert "with plug-in Adaptation" in said
