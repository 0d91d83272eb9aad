"""One process trains all seeds of a variant: bits as alone, a failed seed loses no other, locks end. Budget: 40 s."""

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import core.training.finish
from core import ROOT
from core.ablation import runner
from core.ablation.plan import read_plan
from core.ablation.store import Place, RunStore
from core.config import DataConfig, RunConfig
from core.console import Console
from core.data.dataset import identity, open_dataset
from core.engine.kept import KeptEngine
from core.engine.loading import load_engine
from core.training.environment import code_version
from core.training.run import Run
from core.verbs.ablation_worker import GONE
from core.verbs.common import Context
from core.verbs.train import Train, train_run
from shared_tests.support.ablation_runs import DATA, PLAN, WORKER, go, places, write
from shared_tests.support.harness import BACKENDS
from shared_tests.support.killed import everything, small_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_data(tmp_path_factory.mktemp("data"))


def trained(config: RunConfig, seed: int, out: Path, backend: str, load: Any) -> Run:
    """Train a run to its end and return it."""
    options = Train.of(dataclasses.replace(config, seed=seed))
    train_run(dataclasses.replace(options, backend=backend, out=str(out)), Context(Console(), "skc train", load))
    return Run.open(out)


def what_was_trained(run: Run) -> dict[str, Any]:
    """Return all that a run made, to the bit, but for what clocks say."""
    saved = run.checkpoint()
    assert saved is not None
    rows = [{k: v for k, v in row.items() if not k.startswith(("perf/", "clock/"))} for row in run.metrics()]
    arrays = {f"{kind}/{n}": v.tobytes() for kind in ("params", "optimizer") for n, v in getattr(saved, kind).items()}
    return {**arrays, "rows": rows, "artifact": run.artifact_path.read_bytes(), "step": saved.step}


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_has_the_bits_that_it_has_alone(
    backend: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Muon, averages, rows that grow and late storage: weights, optimizer, records and artifact after another seed."""
    monkeypatch.setattr(core.training.finish, "write_run_report", lambda run: [])  # seconds of drawing
    config = everything(data, steps=8)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, documents=4))
    kept = KeptEngine()
    first = what_was_trained(trained(config, 1, tmp_path / "first", backend, kept.load))
    after = what_was_trained(trained(config, 2, tmp_path / "after", backend, kept.load))
    alone = what_was_trained(trained(config, 2, tmp_path / "alone", backend, load_engine))
    assert [name for name, value in alone.items() if after[name] != value] == [] and alone.keys() == after.keys()
    assert first["artifact"] != after["artifact"], "the seeds are not different"
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("first", "after", "alone")]
    assert not any("compiled again" in log for log in logs), "the warm-up has not seen every step of the plan"


def test_what_was_compiled_is_used_again(data: str) -> None:
    """The same engine for another seed; another one for other settings, and then no longer the first."""
    from core.engine.protocol import EngineOptions
    from core.engine.ranks import Alone
    from core.model.params import start_values

    config, kept = everything(data), KeptEngine()

    def load(**changes: Any) -> Any:
        changed = dataclasses.replace(config, **changes)
        weights = start_values(changed.model, changed.seed)
        return kept.load("cuda", changed, weights, EngineOptions(), ranks=Alone())

    first = load(seed=1)
    assert load(seed=2) is first
    other = load(train=dataclasses.replace(config.train, lr_matrix=0.5))
    assert other is not first and load(seed=1) is not first


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
    """The workers that were started."""
    started: list[subprocess.Popen] = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(runner.subprocess, "Popen", Popen)
    return started


def pids(where: list[Place]) -> list[str]:
    """Return which process trained each run last."""
    return [(place.home / "pid.txt").read_text() for place in where]


@pytest.mark.parametrize(("seeds", "statuses", "count"), [
    ([1, 2, 3], ["done"] * 3, 1),
    ([1, 13, 2, 3], ["done", "failed", "done", "done"], 1),  # it said how it ended, and lives
    ([1, 99, 2, 3], ["done", "failed", "done", "done"], 2),  # it was killed
])  # fmt: skip
def test_a_variant_has_one_process(
    seeds: list[int], statuses: list[str], count: int, tmp_path: Path, processes: list[subprocess.Popen]
) -> None:
    text = PLAN.replace("[1, 2, 3, 4]", str(seeds)).partition("[variants.wide]")[0]
    store = RunStore(tmp_path / "store")
    where = places(store, read_plan(write(tmp_path, text)))
    go(store, where, parallel=1)
    assert [store.status(place)[0] for place in where] == statuses
    assert len(processes) == count == len(set(pids(where)))
    assert all(process.returncode is not None for process in processes), "a worker was left behind"
    if 99 in seeds:
        assert "ended by signal 9" in str(store.status(where[1])[1]) and pids(where)[0] == pids(where)[1]
        go(store, where, parallel=1)
        assert store.status(where[1])[0] == "done", "a second start trains what failed"


def test_variants_side_by_side(tmp_path: Path, processes: list[subprocess.Popen]) -> None:
    """Two slots, two variants: each slot keeps to its own, so that two processes do all."""
    store = RunStore(tmp_path / "store")
    where = places(store, read_plan(write(tmp_path, PLAN.replace("[1, 2, 3, 4]", "[1, 2]"))))
    go(store, where, parallel=2)
    of = {name: {pid for place, pid in zip(where, pids(where), strict=True) if place.job.variant == name}
          for name in ("plain", "wide")}  # fmt: skip
    assert len(processes) == 2 and all(len(each) == 1 for each in of.values()) and of["plain"] != of["wide"]


def test_a_run_that_has_ended_is_free_while_its_worker_goes_on(tmp_path: Path) -> None:
    """Nobody waits for the lock of a run until the last seed of its variant is done."""
    store = RunStore(tmp_path / "store")
    where = places(store, read_plan(write(tmp_path, PLAN.partition("[variants.wide]")[0])))
    busy: list[bool] = []
    runner.run_all(
        store, where, threads=1, worker=WORKER, shown=lambda _: None,
        started=lambda place: store.prepare(place, "code", DATA, "test"),
        ended=lambda place: busy.append(store.busy(place)),
    )  # fmt: skip
    assert busy == [False] * 4 and len(set(pids(where))) == 1


def test_the_worker_itself(data: str, tmp_path: Path, processes: list[subprocess.Popen]) -> None:
    """Two seeds of real training in one process, each with its words, its scores and its folder."""
    text = PLAN.replace("[1, 2, 3, 4]", "[1, 2]").replace("steps = 10", "steps = 3").partition("[variants.wide]")[0]
    plan = read_plan(write(tmp_path, text))
    store, code, identities = RunStore(tmp_path / "store"), code_version(), identity(open_dataset(data))
    jobs = [j._replace(config=dataclasses.replace(j.config, data=DataConfig(data))) for j in plan.jobs()]
    where = [store.place(job, code, identities) for job in jobs]
    runner.run_all(
        store, where, threads=1, ended=lambda _: None, shown=lambda _: None,
        started=lambda place: store.prepare(place, code, identities, "skc ablate test.toml"),
    )  # fmt: skip
    assert [store.status(place) for place in where] == [("done", None)] * 2 and len(processes) == 1
    for place, other in zip(where, where[::-1], strict=True):
        words = (place.home / "worker.txt").read_text()
        assert str(place.folder) in words and str(other.folder) not in words and "step 3/3" in words
        assert str(other.folder) not in (place.folder / "log.txt").read_text()


def test_a_worker_whose_answer_nobody_reads_ends(tmp_path: Path) -> None:
    """A parent that is killed before it reads an answer resets the connection, which is no end of it."""
    ours, theirs = socket.socketpair()
    code = "from core.verbs.ablation_worker import take_orders; take_orders(lambda folder: 0)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=theirs.fileno(), cwd=ROOT)
    theirs.close()
    try:
        assert ours.recv(1, socket.MSG_PEEK) == b"0"
        ours.close()
        assert process.wait(60) == GONE
    finally:
        process.kill()
        process.wait()
