"""Ablations at bad moments and on odd stores: races, moved files, damaged runs, long ones. Budget: 15 s."""

import fcntl
import json
import sys
import threading
from pathlib import Path

import pytest

from core.ablation import folders
from core.ablation.plan import Ablation, read_plan
from core.ablation.records import StoreError
from core.ablation.report import live_table
from core.ablation.runner import RunnerProgress, run_all
from core.ablation.stats.added_seeds import looked
from core.ablation.stats.findings import assess
from core.ablation.stats.results import Start
from core.ablation.store import Place, RunStore
from core.cli import main
from core.console import Console
from core.files import FileError
from core.training.run import Run
from shared_tests.support.ablation_runs import DATA, PLAN, WORKER, places, write
from shared_tests.support.ablation_worker import whole_score
from shared_tests.support.ablations import outcome
from shared_tests.support.killed import small_data

SCORE = whole_score(1.9)


def done(tmp_path: Path) -> tuple[Ablation, RunStore, list[Place]]:
    """Return a plan of two runs that are in the store, finished."""
    plan, store = read_plan(write(tmp_path, PLAN.replace("[1, 2, 3, 4]", "[1]"))), RunStore(tmp_path / "store")
    where = places(store, plan)
    for place in where:
        store.prepare(place, "code", DATA, "test")
        run = Run.create(place.folder, place.job.config, b"tokenizer")
        run.log(10, {"train/loss": 3.0, "train/bpb": 2.0, "clock/seconds": 1.0})
        run.log(10, {"final/artifact": {"score": SCORE, "bytes": 1000}})
    return plan, store, where


def test_two_processes_that_start_together_write_one_list(tmp_path: Path) -> None:
    """Both write the list of runs at the same moment; without the lock, every third write found its file gone."""
    plan, store, where = done(tmp_path)
    failed: list[OSError] = []

    def writes() -> None:
        try:
            for _ in range(50):
                store.write_members(plan, where)
        except OSError as error:
            failed.append(error)

    both = [threading.Thread(target=writes) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert not failed
    assert len(json.loads((store.ablation_folder(plan) / "members.json").read_text())["runs"]) == 2


def test_whoever_only_looks_makes_no_run_look_busy(tmp_path: Path) -> None:
    """Two looks at once both see a failed run as failed: else it was counted as neither, and the exit code was 0."""
    plan, store = read_plan(write(tmp_path)), RunStore(tmp_path / "store")
    place = places(store, plan)[0]
    with store.held(place) as held:
        assert held is not None and store.status(place)[0] == "running"
        with store.held(place) as other:
            assert other is None
    store.fail(place, "said")
    with open(place.home / "lock", "rb") as looker:
        fcntl.flock(looker, fcntl.LOCK_SH)
        assert store.status(place) == ("failed", "said")
        with store.held(place) as held:
            assert held is None, "whoever wants to train tries again later"
    (place.home / "lock").unlink()
    assert store.status(place)[0] == "failed" and not (place.home / "lock").exists(), "a look writes nothing"


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network disks have none: one line, not a traceback."""

    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    store = RunStore(tmp_path / "store")
    place = places(store, read_plan(write(tmp_path)))[0]
    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(FileError, match="lock: Operation not supported.*another disk"), store.held(place):
        pass


def test_odd_files_of_one_run_stop_no_other(tmp_path: Path) -> None:
    """Samples and starts of another shape are left out; what cannot be read is a failed run; nothing is a traceback."""
    plan, store, where = done(tmp_path)
    metrics, machine = where[0].folder / "metrics.jsonl", where[0].home / "machine.json"
    whole = metrics.read_text()
    for samples in ("null", '"abc"', "7"):
        metrics.write_text(f'{whole}{{"step": 10, "samples": {samples}}}\n')
        assert store.outcome(plan, where).results[0].samples == ()
    metrics.write_text(f'{whole}{{"step": 10, "samples": ["abc"]}}\n')
    assert store.outcome(plan, where).results[0].samples == ("abc",)
    for start in ('{"seconds": "x", "beside": 1}', '{"seconds": 1, "beside": [1]}', '{"threads": "two"}'):
        machine.write_text(f'{{"schema": 1, "starts": [{start}]}}')
        assert store.outcome(plan, where).results[0].beside is None
    machine.unlink()
    store.begin(where[0], Start("a", None, 1, 2))
    assert store.outcome(plan, where).results[0].beside == 2
    metrics.unlink()
    metrics.mkdir()
    results = store.outcome(plan, where).results
    assert [r.status for r in results] == ["failed", "done"] and "is a folder" in str(results[0].message)


def test_a_killed_worker_is_said_to_be_killed(tmp_path: Path) -> None:
    """The last line of a run that was killed is about its progress, not about why it ended."""
    store = RunStore(tmp_path / "store")
    place = places(store, read_plan(write(tmp_path)))[0]
    dying = "import os; print('step 40 of 250', flush=True); os.kill(os.getpid(), 9)"
    run_all(
        store, [place], worker=(sys.executable, "-c", dying), started=lambda _: None, ended=lambda _: None,
        shown=lambda _: None,
    )  # fmt: skip
    assert str(store.status(place)[1]).startswith("ended by signal 9 (Killed")
    assert str(store.status(place)[1]).endswith("said last: step 40 of 250")


def test_a_moved_file_keeps_its_name(tmp_path: Path) -> None:
    """A file that was moved, or is called by another path, is the same ablation; one beside it is not."""
    path, store = write(tmp_path), RunStore(tmp_path / "store")
    store.write_members(read_plan(path), [])
    (tmp_path / "link").symlink_to(tmp_path)
    store.check_name(read_plan(tmp_path / "link" / "plan.toml"))
    beside = read_plan(write(tmp_path, name="other.toml"))
    with pytest.raises(StoreError, match="give it another name"):
        store.check_name(beside)
    path.unlink()
    store.check_name(beside)


def test_what_was_read_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run is read once, whichever variant asks for it; a change in its files counts."""
    plan, store, where = done(tmp_path)
    assert [r.bpb for r in store.outcome(plan, where).results] == [1.9, 1.9]
    monkeypatch.setattr("core.ablation.store.read_result", None)
    monkeypatch.setattr(folders, "final", None)
    renamed = where[0]._replace(job=where[0].job._replace(variant="new"))
    assert [(r.variant, r.bpb) for r in store.outcome(plan, [renamed]).results] == [("new", 1.9)]
    monkeypatch.undo()
    metrics = where[0].folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("1.9", "1.85"))
    assert [r.bpb for r in store.outcome(plan, where).results] == [1.85, 1.9]
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True) if "final/artifact" not in line))
    assert store.status(where[0])[0] == "waiting"


def test_the_live_table_reads_the_end_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the last training line behind a long line and a half one, and nothing where there is none."""
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/loss": 3.0}) for step in range(3000)]
    metrics.write_text("\n".join([*lines, json.dumps({"step": 3000, "samples": ["x" * 500]})]) + '\n{"train/loss": 1')
    read: list[int] = []
    original = json.loads
    monkeypatch.setattr(json, "loads", lambda text, **how: read.append(len(text)) or original(text, **how))
    for tail in (100, *range(540, 620), 1 << 15, 1 << 20):
        monkeypatch.setattr(live_table, "TAIL", tail)
        assert live_table._last_row(metrics)["step"] == 2999
    assert len(read) == 83, "one line is parsed, not all"
    for text in ("", "\n", '{"step": 1, "val/bpb": 2.0}\n', '{"step": 1, "train/loss": 3'):
        metrics.write_text(text)
        with pytest.raises(KeyError):
            live_table._last_row(metrics)


def test_waiting_for_another_process_is_said() -> None:
    """Runs that are neither here nor done are those of another process, for which this one waits."""
    shown = live_table.Live(Console(), 1)
    assert shown._head(RunnerProgress((), 1, 1, 5), {}) == "1 of 5 runs done, 1 failed, 3 under way in another process"
    assert shown._head(RunnerProgress((), 4, 1, 5), {}) == "4 of 5 runs done, 1 failed"


def test_seeds_that_came_after_a_report_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More seeds after a look are not a number fixed beforehand; a new variant, or other settings, are."""
    plan, store = read_plan(write(tmp_path, PLAN.replace("[1, 2, 3, 4]", "[1, 2]"))), RunStore(tmp_path / "store")
    where, folder = places(store, plan), tmp_path
    assert looked(folder, where[:2]) == () == looked(folder, where), "no run is finished: there was nothing to see"
    monkeypatch.setattr("core.ablation.stats.added_seeds.finished", lambda _: True)
    assert looked(folder, where[:2]) == () == looked(folder, where[:2])
    assert looked(folder, where) == (2,) == looked(folder, where), "also in every later report"
    other = read_plan(write(tmp_path, PLAN.replace("steps = 10", "steps = 11")))
    assert looked(folder, places(store, other)) == ()
    new = read_plan(write(tmp_path, PLAN.replace("[1, 2, 3, 4]", "[1]") + '[variants.new]\n"model.dim" = 96\n'))
    assert looked(folder, places(store, new)) == ()
    made = outcome(tmp_path / "made", {"plain": 0.0, "wide": 0.1})
    assert not any("came after" in doubt for doubt in assess(made)[0].doubts)
    assert any("seed 2 came after a report" in doubt for doubt in assess(made._replace(added=(2,)))[0].doubts)


def test_a_tracker_that_cannot_write_stops_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a line; what was copied is not copied again; devices that nothing runs on are named."""
    path, data = write(tmp_path, PLAN.replace("[1, 2, 3, 4]", "[1]")), small_data(tmp_path)
    monkeypatch.setenv("SKC_TEST_STEP", "0")
    monkeypatch.setattr(run_all, "__kwdefaults__", {**(run_all.__kwdefaults__ or {}), "worker": WORKER})
    command = ["ablate", str(path), "--data", data, "--store", str(tmp_path / "s"), "--parallel", "2", "--track"]
    folder = tmp_path / "s" / "ablations" / "widths"
    folder.mkdir(parents=True)
    (folder / "tracked").write_text("in the way")
    assert main([*command, "tensorboard", "--devices", "0", "1", "2"]) == 0
    said = capsys.readouterr().out
    assert said.count("was not copied") == 2 and "nothing runs on --devices 2;" in said
    (folder / "tracked").unlink()
    assert main([*command, "tensorboard"]) == 0
    assert "not copied" not in capsys.readouterr().out
    events = {file: file.stat().st_mtime_ns for file in folder.glob("tracked/*/tensorboard/*")}
    assert len(events) == 2
    assert main([*command, "tensorboard"]) == 0
    assert {file: file.stat().st_mtime_ns for file in folder.glob("tracked/*/tensorboard/*")} == events
