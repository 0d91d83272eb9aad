"""A killed evaluation with plug-ins goes on and ends as if nobody had killed it. Budget: 25 s."""

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

from core.engine.protocol import Arrays
from core.scoring import snapshots
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.plugins import Plugin, Temperature
from core.scoring.score import score_text
from shared_tests.support.known_scores import make_dataset
from shared_tests.support.plugin_examples import (
    CUTS,
    LENGTHS,
    SHORT,
    TRAIN,
    Adaptation,
    Costs,
    Counted,
    Dies,
    Killed,
    Markov,
    config,
    fresh,
    held,
    small,
)
from shared_tests.support.zoo_honest import HonestCache

ROOT = Path(__file__).resolve().parents[2]


class Lives:
    """One evaluation that is killed and goes on: every life has an engine and plug-ins of its own."""

    def __init__(self, path: Path, windows: str) -> None:
        changes, length = CUTS[windows]
        self.path, self.settings, self._length = path, config(**changes), length
        self.run = small("hybrid" if windows == "stateful" else "debug", length or TRAIN.seq)
        self.dataset = make_dataset(SHORT)
        self.passes = self.updates = 0
        """What the last life computed, and how many updates all lives together made."""

    def turns(self) -> list[int]:
        """Return the number of the last pass of each turn."""
        evaluation = Evaluation(self.dataset.val, self.settings, plugins=True)
        turns = evaluation.turns(evaluation.rows(), self.settings.batch, None)
        return np.cumsum([evaluation.passes(turn).max() for turn in turns]).tolist()

    def live(self, progress: Callable[[int, int], None] | None = None, learn: int = 0) -> np.ndarray:
        """Go on; return the entries, with which of them were there before."""
        with_weights = self._length > 0
        cache, adaptation = Counted(), Adaptation(self._length)
        plugins = [Dies(learn), Temperature(), cache, *([adaptation] if with_weights else [])]
        book = Ledger.open(self.path, len(self.dataset.val), "key")
        try:
            evaluation = Evaluation(self.dataset.val, self.settings, plugins=True)
            score_text(fresh("cuda", self.run), evaluation, book, plugins=plugins, progress=progress)
        finally:
            book.close()
            self.passes, self.updates = cache.passes, adaptation.steps
        return book.entries


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["copies", "no-copies"])
@pytest.mark.parametrize("windows", CUTS)
def test_killed_after_any_pass_it_ends_the_same(
    windows: str, every: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "SNAPSHOT_EVERY", every)
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
            # Rounds of one turn, which is copied when the next one begins. A copy is deleted where the ledger is
            # complete: all passes are repeated then.
            copied = 0 if every or kill == total else max([end for end in lives.turns() if end < kill], default=0)
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
            monkeypatch.setattr(snapshots, "SNAPSHOT_EVERY", every)
            calls = iter(range(1, 9))

            def progress(done: int, total: int, calls: Any = calls, kill: int = kill) -> None:
                if next(calls) == kill:
                    raise Killed

            with pytest.raises(Killed):
                lives.live(progress)
            assert lives.passes == passes and Ledger.read(lives.path).writes == 4
        assert lives.live().tobytes() == expected.tobytes() and lives.passes == 6 - again


def test_a_copy_is_never_ahead_of_the_ledger_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no kill can show, for the kernel keeps what was written: the ledger reaches the disk before a copy does."""
    monkeypatch.setattr(snapshots, "SNAPSHOT_EVERY", 0.0)
    done: list[str] = []
    sync, write = Ledger.sync, snapshots.write_tensors

    def synced(self: Ledger) -> None:
        done.append(f"ledger {self.writes}")
        sync(self)

    def written(path: Path, arrays: Arrays, metadata: dict[str, str]) -> None:
        done.append(f"copy {json.loads(metadata['skc'])['number']}")
        write(path, arrays, metadata)

    monkeypatch.setattr(Ledger, "sync", synced)
    monkeypatch.setattr(snapshots, "write_tensors", written)
    Lives(tmp_path / "ledger", "plain").live()
    assert done == [f"{what} {number}" for number in range(1, 6) for what in ("ledger", "copy")]


def test_the_stored_form_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adaptation that trains with the stored form goes on with it, whatever the engine was loaded with."""
    monkeypatch.setattr(snapshots, "SNAPSHOT_EVERY", 0.0)
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
                score_text(model, Evaluation(dataset.val, settings, plugins=True), book, plugins=plugins)
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
        "import sys; from shared_tests.support.plugin_examples import child; child(*sys.argv[1:])",
    )
    writes = []
    for place, count in (("learn", 2), ("rename", 2), ("progress", 4)):
        arguments = [sys.executable, "-W", "error", "-c", program, str(path), place, str(count)]
        done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        writes.append(Ledger.read(path).writes)
        assert Path(f"{path}.plugins").exists()
    assert writes == [2, 3, 4]
    monkeypatch.setattr(snapshots, "SNAPSHOT_EVERY", 0.0)
    dataset, entries, passes = make_dataset(LENGTHS), [], []
    for place in (path, tmp_path / "whole"):
        with_cache = Counted()
        book = Ledger.open(place, len(dataset.val), "key")
        plugins: list[Plugin] = [Plugin(), with_cache, Adaptation()]
        score_text(fresh("mlx", small("debug")), Evaluation(dataset.val, config(), plugins=True), book, plugins=plugins)
        book.close()
        entries.append(book.entries.tobytes())
        passes.append(with_cache.passes)
    assert entries[0] == entries[1] and passes == [2, 6], passes
    assert not [left for left in tmp_path.iterdir() if ".plugins" in left.name]


def test_a_copy_of_other_plugins_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was learned before a kill does not fit a plug-in that was changed since; the weights stay as they were."""
    monkeypatch.setattr(snapshots, "SNAPSHOT_EVERY", 0.0)
    dataset, path = make_dataset(SHORT), tmp_path / "ledger"

    def go_on(*plugins: Plugin) -> None:
        book = Ledger.open(path, len(dataset.val), "key")
        try:
            score_text(model, Evaluation(dataset.val, config(batch=2), plugins=True), book, plugins=list(plugins))
        finally:
            book.close()

    model = fresh("cuda", small("debug", 32))
    before = held(model)
    with pytest.raises(Killed):
        go_on(Dies(3), Adaptation(32), HonestCache())
    for others in ([Plugin(), Adaptation(32), Temperature()], [Plugin(), HonestCache(), Adaptation(32)]):
        with pytest.raises(
            LedgerError, match=r"ledger.plugins: is not of these plug-ins .*; delete it and .*ledger to"
        ):
            go_on(*others)
        assert held(model) == before
    copied = Path(f"{path}.plugins").read_bytes()
    Path(f"{path}.plugins").write_bytes(copied[:-100])
    with pytest.raises(LedgerError, match=r"ledger.plugins: damaged"):
        go_on(Plugin(), Adaptation(32), HonestCache())
    path.unlink()
    go_on(Plugin(), HonestCache())  # a copy without its ledger is of no evaluation


def test_a_repeated_pass_tells_what_was_written(tmp_path: Path) -> None:
    """Another machine rounds otherwise; what the first one wrote stands, and weights that are others are refused."""
    dataset, path = make_dataset(SHORT), tmp_path / "ledger"
    told = []
    for k, start in ((1.0, [Dies(3)]), (1.00001, [Plugin()])):
        book, costs = Ledger.open(path, len(dataset.val), "key"), Costs()
        try:
            score_text(Markov(k), Evaluation(dataset.val, config(batch=2), plugins=True), book, plugins=[costs, *start])
        except Killed:
            assert k == 1.0
        book.close()
        told.append(np.concatenate(costs.told))
    assert len(told[0]) == 96 and (told[1] == book.entries["nats"]).all() and (told[1][:96] == told[0]).all()
    book = Ledger.open(path, len(dataset.val), "key")
    with pytest.raises(LedgerError, match="target .*: repeating write 1 gives .*: this evaluation cannot go on"):
        score_text(Markov(1.1), Evaluation(dataset.val, config(batch=2), plugins=True), book, plugins=[Plugin()])
    book.close()
