"""Ablation files, the store, the runner: nothing lost, nothing twice, every mistake one clear line. Budget: 60 s."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from core.ablation import runner
from core.ablation.plan import job_key, read_plan
from core.ablation.records import StoreError, read_job
from core.ablation.runner import run_all
from core.ablation.stats.findings import assess
from core.ablation.stats.results import Start
from core.ablation.store import RunStore
from core.cli import main
from core.config import ConfigError, DataConfig
from core.files import FileError
from core.training.environment import code_version
from core.training.run import Run
from shared_tests.support.ablation_runs import DATA, PLAN, go, places, taken, write
from shared_tests.support.killed import small_data

# The file.


def test_a_plan_is_its_runs(tmp_path: Path) -> None:
    """Variants times seeds, seed by seed; the budget; both spellings of a field; the first variant is the reference."""
    plan = read_plan(write(tmp_path))
    jobs = plan.jobs()
    assert [(j.seed, j.variant) for j in jobs[:3]] == [(1, "plain"), (1, "wide"), (2, "plain")] and len(jobs) == 8
    assert plan.reference == "plain" and jobs[1].config.model.dim == 64 and jobs[0].config.train.steps == 10
    assert {j.config.seed for j in jobs} == {1, 2, 3, 4} and jobs[0].config.train.log_every == 1
    nested = read_plan(
        write(tmp_path, PLAN.replace('[variants.wide]\n    "model.dim" = 64', "[variants.wide.model]\n    dim = 64"))
    )
    assert nested.jobs() == jobs
    tokens = read_plan(write(tmp_path, PLAN.replace("steps = 10", "tokens = 1000")))
    assert tokens.jobs()[0].config.train.steps == 4, "256 tokens a step, rounded up"
    timed = read_plan(write(tmp_path, PLAN.replace("steps = 10", "seconds = 2.5"))).jobs()[0].config.train
    assert timed.seconds == 2.5 and timed.steps > 10**6


def test_every_plan_that_comes_with_the_project_is_one() -> None:
    plans = sorted((Path(__file__).parents[2] / "scripts/ablations").glob("*.toml"))
    assert len(plans) > 5 and all(read_plan(path).jobs() for path in plans)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('base = "debug"', 'base = "debgu"', "base: 'debgu' is no preset; did you mean debug"),
        ('base = "debug"', "", "base: missing"),
        ('"model.dim" = 64', '"model.dimm" = 64', "variants.wide: unknown field 'model.dimm'; did you mean model.dim"),
        (
            '"model.dim" = 64',
            '"eval.plugins.temperature.priro" = 64',
            "variants.wide: eval.plugins.temperature.priro: unkn",
        ),
        (
            '"model.dim" = 64',
            '"eval.plugins" = ["tempratur"]',
            "variants.wide: eval.plugins: 'tempratur' is not a plug-in",
        ),
        ('"model.dim" = 64', '"model.dim" = "wide"', "variants.wide: model.dim='wide': expected int"),
        ('"model.dim" = 64', '"model.dim" = 63', "variants.wide: model.dim=63"),
        ('"model.dim" = 64', "", "variants.wide: is the same as variants.plain"),
        ('"model.dim" = 64', '"train.steps" = 64', r"variants.wide: train.steps: is what \[budget\] decides"),
        ("steps = 10", "stepz = 10", "budget: .*expected one of steps, tokens, seconds"),
        ("steps = 10", "steps = 2.5", "budget.steps: 2.5: expected a positive whole number"),
        ("seeds = [1, 2, 3, 4]", "seeds = [1, 1]", "seeds: .*different whole numbers"),
        ("seeds = [1, 2, 3, 4]", "seedz = [1]", "unknown key 'seedz'; did you mean seeds"),
        ('backends = ["cuda"]', 'backends = ["cuda", "auto"]', "backends: .*each once"),
        ('backends = ["cuda"]', 'backends = ["gpu"]', "backends: 'gpu': expected auto"),
        ('backends = ["cuda"]', 'backends = ["mlx", "cuda"]\n    dtype = "float16"', "dtype: float16: is for MLX"),
        ('name = "widths"', 'name = "../widths"', "name: '../widths': expected letters"),
        ("[variants.plain]", '["variants"."pl ain"]', "'pl ain': expected letters"),
        ("[budget]", 'reference = "none"\n    [budget]', "reference: 'none' is not a variant"),
        ("[budget]", "[budget", "not TOML"),
    ],
)
def test_a_mistake_gets_one_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    """The file, the field, what was given, what is expected."""
    assert PLAN.count(old) == 1
    with pytest.raises((ConfigError, FileError), match=message) as caught:
        read_plan(write(tmp_path, PLAN.replace(old, new)))
    assert "\n" not in str(caught.value).strip()


def test_a_run_is_named_by_what_decides_it(tmp_path: Path) -> None:
    """Settings, backend, type, code and data name a run; the ablation, the variant and the preset's name do not."""
    job = read_plan(write(tmp_path)).jobs()[0]
    key = job_key(job, "code", DATA)
    assert key == job_key(job._replace(variant="other"), "code", DATA)
    elsewhere = dataclasses.replace(job.config, data=DataConfig("/another/folder"))
    assert key == job_key(job._replace(config=elsewhere), "code", DATA), "DATA says which text it is, not where"
    others = [job_key(job._replace(**change), "code", DATA) for change in ({"backend": "mlx"}, {"dtype": "float64"})]
    others += [job_key(job, "new", DATA), job_key(job, "code", {"name": "x", "sha256": "1"})]
    others += [job_key(read_plan(write(tmp_path)).jobs()[1], "code", DATA)]
    assert len({key, *others}) == 6


def test_the_code_version_follows_the_code(tmp_path: Path) -> None:
    """A changed line of core or backends counts, a document does not."""
    for folder in ("core", "backends/cuda", "docs"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    before = code_version(tmp_path)
    (tmp_path / "docs" / "a.py").write_text("x = 2\n")
    (tmp_path / "core" / "notes.md").write_text("x")
    assert code_version(tmp_path) == before
    (tmp_path / "backends/cuda/a.py").write_text("x = 2\n")
    assert code_version(tmp_path) != before and len(code_version()) == 64


# The runner.


def test_runs_go_side_by_side_and_a_failed_one_stops_nobody(tmp_path: Path) -> None:
    """Two at a time; seed 13 fails with its last line; a second start repeats nothing but the failed runs."""
    plan = read_plan(write(tmp_path, PLAN.replace("[1, 2, 3, 4]", "[1, 13, 2]")))
    store = RunStore(tmp_path / "store")
    where = places(store, plan)
    shown = go(store, where)
    assert max(len(progress.running) for progress in shown) == 2
    assert (shown[-1].done, shown[-1].failed, shown[-1].total) == (4, 2, 6)
    outcome = store.outcome(plan, where)
    failed = [r for r in outcome.results if r.status == "failed"]
    assert [(r.seed, r.message) for r in failed] == [(13, "skc train: the loss (nan) is not finite")] * 2
    assert [r.bpb for r in outcome.of("wide")] == [pytest.approx(2.0 - 0.064 + s / 10_000) for s in (1, 2)]
    good = [place for place in where if place.job.seed != 13]
    before = taken(good)
    shown = go(store, where)
    assert taken(good) == before == [Counter(map(str, range(10)))] * 4 and shown[-1].done == 4


def test_a_result_says_what_it_was_measured_on(tmp_path: Path) -> None:
    """Targets, device and type; who ran beside it, counted and not as allowed; what was killed counts as allowed."""
    plan, store = read_plan(write(tmp_path, PLAN.replace("[1, 2, 3, 4]", "[1]"))), RunStore(tmp_path / "store")
    where = places(store, plan)
    go(store, where, parallel=4)
    run = Run.open(where[0].folder)
    for device in ("H100", "A100", "A100"):
        run.record_environment({"device": device, "dtype": "float32", "data": {"name": "x"}})
    first, second = store.outcome(plan, where).results
    assert (first.documents, first.total_documents, first.targets) == (9, 9, 5_000)
    assert (first.device, first.dtype, first.data) == ("H100, then A100", "float32", '{"name": "x"}')
    assert (second.device, second.dtype, second.data) == (None, None, None), "no env.json: not known, no error"
    assert first.host == second.host == runner.HOST and first.threads == 1
    assert first.beside and 1.5 < first.beside <= 2, "two ran, though four were allowed"
    for place, parallel in zip(where, (1, 4), strict=True):
        (place.home / "machine.json").unlink()
        store.begin(place, Start(runner.HOST, None, 1, parallel))
    assert [r.beside for r in store.outcome(plan, where).results] == [1, 4]
    store.end(where[1], 10.0, 2.0)
    store.begin(where[1], Start("other", None, 2, 4))
    store.end(where[1], 30.0, 3.0)
    assert store.outcome(plan, where).results[1][-3:] == (f"{runner.HOST}, then other", 2, 2.75)
    (where[1].home / "machine.json").write_text("{")
    assert store.outcome(plan, where).results[1].beside is None


DAMAGING = """
import sys
from pathlib import Path
import shared_tests.support.ablation_worker as worker
home = Path(sys.argv[1])
code = worker.main()
if '"seed": 2,' in (home / "job.json").read_text():
    metrics = home / "run" / "metrics.jsonl"
    metrics.write_text("nonsense" + metrics.read_text())
print("the whole run is in", home)
sys.exit(code)
"""


def test_a_damaged_run_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found when it ends, or later: it counts as failed with what is wrong, the others are done, the exit code is 1."""
    file = write(tmp_path, PLAN.replace("[1, 2, 3, 4]", "[1, 2, 3]"))
    plan, store = read_plan(file), RunStore(tmp_path / "store")
    where = places(store, plan)
    damaging = (sys.executable, "-c", DAMAGING)
    shown = go(store, where, worker=damaging)
    assert (shown[-1].done, shown[-1].failed) == (4, 2)
    outcome = store.outcome(plan, where)
    failed = [r for r in outcome.results if r.status == "failed"]
    assert [r.seed for r in failed] == [2, 2] and all("metrics.jsonl:1: not JSON" in str(r.message) for r in failed)
    assert assess(outcome)[0].ends[0].short == "2 of 3; 1 failed"
    last = where[0].folder / "metrics.jsonl"
    whole = last.read_text()
    for instead in ('{"score": {"loss": 1.0}}', '"new"', '{"score": {"bpb": "low"}}'):
        last.write_text(whole[: whole.rindex('{"score')] + instead + "}\n")
        result = store.outcome(plan, where).results[0]
        assert result.status == "failed" and "final/artifact" in str(result.message)
    assert Counter(r.status for r in store.outcome(plan, where).results) == {"done": 3, "failed": 3}
    (where[1].home / "failed.json").write_text("{")
    (where[1].folder / "metrics.jsonl").write_text("")
    assert "failed.json: not JSON" in str(store.outcome(plan, where).results[1].message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_all, "__kwdefaults__", {**(run_all.__kwdefaults__ or {}), "worker": damaging})
        code = main(["ablate", str(file), "--data", small_data(tmp_path), "--store", str(tmp_path / "s"), "--json"])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert code == 1 and [line.partition(":")[0] for line in found["failed"]] == [
        "plain, seed 2, cuda", "wide, seed 2, cuda",
    ]  # fmt: skip
    assert [v["n"] for v in found["backends"]["cuda"]["variants"]] == [2, 2] and said.err.count("FAILED: ") == 2
    assert "not JSON" in (tmp_path / "s" / "ablations" / "widths" / "report.html").read_text()


START = """
import json, sys
from pathlib import Path
from core.ablation.plan import read_plan
from core.ablation.store import RunStore
from shared_tests.support.ablation_runs import go, places
store = RunStore(sys.argv[2])
go(store, places(store, read_plan(sys.argv[1])))
"""


def start(plan: Path, store: Path) -> subprocess.Popen:
    """Start a process that runs an ablation."""
    variables = {**os.environ, "SKC_TEST_STEP": "0.1"}
    return subprocess.Popen([sys.executable, "-c", START, str(plan), str(store)], env=variables)


def test_kill_in_the_middle_of_eight_runs(tmp_path: Path) -> None:
    """kill -9 with two runs under way: the workers end too, and the next start takes every step that is left, once."""
    path, store = write(tmp_path), RunStore(tmp_path / "store")
    plan = read_plan(path)
    where = places(store, plan)
    first = start(path, store.path)
    until = time.monotonic() + 240
    while sum(store.status(place)[0] == "done" for place in where) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    until = time.monotonic() + 240
    while any(store.busy(place) for place in where) and time.monotonic() < until:
        time.sleep(0.05)
    states = Counter(store.status(place)[0] for place in where)
    assert states["done"] >= 2 and states["waiting"] >= 2 and not states["failed"] and not states["running"]
    go(store, where)
    assert [store.status(place)[0] for place in where] == ["done"] * 8
    for steps in taken(where):
        repeated = [step for step, times in steps.items() if times > 1]
        assert set(steps) == set(map(str, range(10))) and len(repeated) <= 1, "at most the step that was under way"


def test_two_processes_on_one_store(tmp_path: Path) -> None:
    """They share the runs: each is trained by one of them, and both end with all of them done."""
    path, store = write(tmp_path), RunStore(tmp_path / "store")
    both = [start(path, store.path) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    where = places(store, read_plan(path))
    assert taken(where) == [Counter(map(str, range(10)))] * 8


def test_stores_of_two_machines_are_merged_by_copying_their_runs(tmp_path: Path) -> None:
    """Each trains half of the seeds; with both halves in one folder nothing is left to train."""
    plan = read_plan(write(tmp_path))
    for name in ("one", "two"):
        store = RunStore(tmp_path / name)
        half = [place for place in places(store, plan) if (place.job.seed > 2) == (name == "two")]
        go(store, half, parallel=4)
    shutil.copytree(tmp_path / "two" / "runs", tmp_path / "one" / "runs", dirs_exist_ok=True)
    store = RunStore(tmp_path / "one")
    where = places(store, plan)
    assert [store.status(place)[0] for place in where] == ["done"] * 8
    shown = go(store, where)
    assert shown[-1].done == 8 and not any(progress.running for progress in shown), "a run was started again"
    assert [r.bpb is not None for r in store.outcome(plan, where).results] == [True] * 8


def test_a_name_belongs_to_one_file(tmp_path: Path) -> None:
    """Two files of one name would overwrite each other's report."""
    store, plan = RunStore(tmp_path / "store"), read_plan(write(tmp_path))
    for _ in range(2):
        store.check_name(plan)
        store.write_members(plan, places(store, plan))
    with pytest.raises(StoreError, match="name: 'widths' is that of .*plan.toml.*give it another name"):
        store.check_name(read_plan(write(tmp_path, name="other.toml")))


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    """A newer version's job, one that is none, a file in the way."""
    plan, store = read_plan(write(tmp_path)), RunStore(tmp_path / "store")
    place = places(store, plan)[0]
    store.prepare(place, "code", DATA, "test")
    assert read_job(place.home).config == place.job.config
    job = place.home / "job.json"
    value: dict[str, Any] = json.loads(job.read_text())
    job.write_text(json.dumps({**value, "schema": 2}))
    with pytest.raises(StoreError, match="job.json: schema: 2, expected 1: written by another version"):
        read_job(place.home)
    job.write_text(json.dumps({**value, "config": {**value["config"], "newer": 1}}))
    with pytest.raises(StoreError, match="newer: unknown key.*move it away"):
        read_job(place.home)
    job.write_text("{")
    with pytest.raises(StoreError, match="job.json: not JSON"):
        read_job(place.home)
    with pytest.raises(StoreError, match="is a file"):
        RunStore(job)


def test_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    """What a kill cut short is no result and no error; a damaged whole line of a finished run is named."""
    plan, store = read_plan(write(tmp_path, PLAN.replace("[1, 2, 3, 4]", "[1]"))), RunStore(tmp_path / "store")
    where = places(store, plan)
    go(store, where)
    metrics = where[0].folder / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"step": 11, "train/l')
    assert store.outcome(plan, where).results[0].bpb == pytest.approx(2.0 - 0.032 + 0.0001)
    metrics.write_text(whole[: whole.rindex('{"step": 10, "final')] + '{"step": 10, "fin')
    assert store.status(where[0])[0] == "waiting"
    metrics.write_text("nonsense\n" + whole)
    result = store.outcome(plan, where).results[0]
    assert result.status != "done" and "metrics.jsonl:1: not JSON" in str(result.message)
