"""The plan of a run against the run, with an engine and a clock whose costs are known. Budget: 15 s."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import core.forecast.probe
import core.training.finish
import core.training.loop
import core.verbs.train
from core import presets
from core.cli import main
from core.config import RunConfig
from core.console import Console
from core.data.batch import Batch
from core.data.bundled import open_data
from core.data.dataset import Dataset
from core.engine.optimizer_state import optimizer_slots
from core.engine.plan import StepPlan
from core.engine.protocol import Arrays, Scoring, State, StepResult
from core.engine.ranks import Alone
from core.forecast.forecast import Forecast, StepKind, forecast
from core.forecast.probe import kinds, measure_memory, probe
from core.model.params import start_values
from core.model.storage import Stored
from core.training.finish import finish
from core.training.loop import train
from core.training.run import Run
from core.training.schedule import lr_scale, progress_by_steps
from shared_tests.support.killed import debug_data

PASS, SAMPLE, EXPORT = 0.25, 0.01, 0.125
"""Seconds of the fake engine: a forward pass of scoring, a token of a sample, rounding the weights."""


class Device:
    """A clock, and an engine's device whose steps cost what their row length, storage and repeats say."""

    def __init__(self, ahead: int) -> None:
        self.now = self.free = 0.0
        self.ahead, self.ends = ahead, []

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> float:
        """Queue a step; wait until no more than `ahead` are in flight. Return when it will be done."""
        self.free = max(self.free, self.now) + seconds
        self.ends.append(self.free)
        if len(self.ends) > self.ahead:
            self.now = max(self.now, self.ends[-1 - self.ahead])
        return self.free

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)


def cost(kind: StepKind) -> float:
    """Return the seconds of a step."""
    return kind.seq / 1000 + 0.02 * kind.quantise + 0.03 * kind.repeat


class FakeEngine:
    """An engine that computes nothing and takes its time."""

    backend, device, dtype, notes, ranks = "fake", "CPU", "float32", (), Alone()
    quantise = False

    def __init__(self, config: RunConfig, device: Device) -> None:
        self.config, self.clock = config, device
        self.values = start_values(config.model, config.seed)
        slots = optimizer_slots(config.model, config.train)
        self.state = {name: np.zeros(shape, np.float32) for name, shape in slots.items()}
        self.passes = self.steps = 0
        self.scoring = Scoring(ahead=32 if device.ahead else 1)

    def train_step(self, batch: Batch, now: StepPlan) -> Any:
        assert batch.tokens.shape == (now.rows, now.seq)
        self.steps += 1
        self.quantise = now.quantise
        done = self.clock.work(cost(StepKind.of(now)))

        def result() -> StepResult:
            self.clock.wait(done)
            return StepResult(2.0, 1.0, True)

        return SimpleNamespace(result=result)

    def nll(self, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
        self.passes += 1
        self.clock.now += PASS
        return np.ones(tokens.shape)

    def nll_later(self, tokens: np.ndarray, targets: np.ndarray, often: bool) -> Any:
        self.passes += 1
        self.clock.free = done = max(self.clock.free, self.clock.now) + PASS

        def wait() -> np.ndarray:
            self.clock.wait(done)
            return np.ones(tokens.shape)

        return wait

    def start(self, rows: int) -> State:
        return State(None, np.zeros(rows, np.int64), np.zeros(rows, np.int64))

    def chunk(self, state: State, tokens: np.ndarray) -> Any:
        self.clock.now += SAMPLE
        logits = np.zeros((*tokens.shape, self.config.model.vocab))
        logits[..., 500:] = -1e9  # never BOS: every sample has its full length
        logits[..., self.config.model.bos] = -1e9
        return SimpleNamespace(logits=lambda: logits, state=state)

    def commit(self, tape: Any, n: np.ndarray) -> State:
        return State(None, tape.state.position + n, tape.state.seen + n)

    def forget(self, state: State, rows: np.ndarray) -> State:
        return State(None, np.where(rows, 0, state.position), np.where(rows, 0, state.seen))

    def quantised(self) -> dict[str, Stored]:
        self.clock.now += EXPORT
        return {name: Stored(value.astype(np.float16), None) for name, value in self.values.items()}

    def weights(self) -> Arrays:
        stored = {name: value.astype(np.float16).astype(np.float32) for name, value in self.values.items()}
        return stored if self.quantise else self.values

    def params(self) -> Arrays:
        return self.values

    def optimizer(self) -> Arrays:
        return self.state

    def load_params(self, params: Arrays, quantise: bool = False) -> None:
        self.values, self.quantise = params, quantise

    def load_optimizer(self, state: Arrays) -> None:
        self.state = state

    def stats(self) -> dict[str, float]:
        return {"peak_bytes": 5e8, "limit_bytes": 1e9, "traces": 0.0}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """The bundled text."""
    return open_data("sample")


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A fake device, whose clock is that of training; the parameter says how far the host may be ahead."""
    made = Device(getattr(request, "param", 0))
    monkeypatch.setattr(
        core.training.loop, "time", SimpleNamespace(perf_counter=made.perf_counter, monotonic=made.perf_counter)
    )
    monkeypatch.setattr(core.training.finish, "write_run_report", lambda run: [])  # seconds of drawing
    yield made


def config_of(**train: Any) -> RunConfig:
    """Return a run with every phase."""
    base = presets.get("debug").config
    fields: dict[str, Any] = {
        "steps": 200, "batch": 8, "seq": 64, "seq_stages": (16, 32), "seq_until": (0.2, 0.4), "warmup": 0.1,
        "warmdown": 0.3, "floor": 0.0, "quantise": "late", "quantise_below": 0.52, "average_from": 0.75,
        "repeat_from": 0.6, "log_every": 10, "eval_every": 60, "sample_every": 100, "save_every": 50, "keep_every": 2,
    }  # fmt: skip
    model = dataclasses.replace(base.model, repeat_layers=(1,))
    settings = dataclasses.replace(base.train, **{**fields, **train})
    return dataclasses.replace(base, model=model, train=settings)


def planned(engine: Any, dataset: Dataset, config: RunConfig, **changes: Any) -> Forecast:
    """Return the plan of a run."""
    choices: dict[str, Any] = {
        "machine": "fake", "official": False, "train_tokens": len(dataset.train), "artifact_bytes": 90_000,
        "build": 0.0, "disk_free": 10**9, "rule_seconds": 600.0,
    }  # fmt: skip
    return forecast(config, probe(engine, dataset, config, lambda line: None), **{**choices, **changes})


def happened(path: Path, config: RunConfig, dataset: Dataset, device: Device) -> tuple[Run, Any, list[float]]:
    """Train and finish the run; return it, the engine, and wall seconds at begin, end of training, and end."""
    engine: Any = FakeEngine(config, device)
    run = Run.create(path, config, dataset.tokenizer.model)
    times = [device.now]
    summary = train(run, engine, dataset, lambda line: None)
    times.append(device.now)
    finish(run, engine, dataset, summary.steps, Console(as_json=True))
    return run, engine, [*times, device.now, summary.steps, summary.seconds]


STEPS = {"steps": {}, "odd": {"steps": 187, "eval_every": 7, "sample_every": None, "save_every": None,
                              "keep_every": None, "log_every": 3},
         "rows": {"batch_stages": (2, 4), "batch_until": (0.1, 0.3)}, "every": {"repeat_every": 3}}  # fmt: skip
SECONDS = {
    "seconds": {"seconds": 6.01, "steps": 100_000},
    "short": {"seconds": 1.7, "steps": 100_000, "log_every": 4},
    "steps first": {"seconds": 100.0, "steps": 90},
    "reserve": {"seconds": 7.01, "reserve_seconds": 1.0, "steps": 100_000, "batch_stages": (2,), "batch_until": (0.3,)},
}


@pytest.mark.parametrize("device", [0, 2], indirect=True, ids=["host and device in step", "host ahead"])
@pytest.mark.parametrize("name", [*STEPS, *SECONDS])
def test_the_plan_is_what_happens(name: str, device: Device, dataset: Dataset, tmp_path: Path) -> None:
    """Steps, training time, wall time and passes of scoring, for a machine whose steps always take the same."""
    config = config_of(**{**STEPS, **SECONDS}[name])
    found = planned(FakeEngine(config, device), dataset, config)
    run, engine, (began, trained, ended, steps, seconds) = happened(tmp_path / "run", config, dataset, device)
    assert found.steps == steps and found.seconds == pytest.approx(seconds, rel=1e-9)
    rows = run.metrics()
    limit = config.train.train_stop
    assert found.tokens == (run.last("tokens") if config.train.batch_stages else 512 * steps)
    assert rows[-1]["step"] == steps and (limit is None or steps == 90 or 1.0 <= seconds / limit < 1.15)
    works = {name: (times, took) for name, times, took in found.works}
    inside = ("compiling", "validation estimate", "checkpoint")
    every = config.train.sample_every or 10**9
    # Two texts of 64 tokens, side by side.
    during = sum("samples" in row and row["step"] % every == 0 for row in rows) * 64 * SAMPLE
    assert found.seconds + sum(works[n][1] for n in inside) + during == pytest.approx(trained - began, rel=1e-9)
    beside = sum(took for _, took in works.values()) - works["building"][1]
    assert found.total == pytest.approx(found.seconds + beside, rel=1e-9)
    assert found.total == pytest.approx(ended - began, rel=1e-9)
    assert works["validation estimate"][0] == sum("val/bpb" in row for row in rows)
    assert works["samples"][0] == sum("samples" in row for row in rows)
    kept = 0 if config.train.keep_every is None else steps // 100
    saved = [*(run.path / "state").glob("*.safetensors")]
    assert len(run.kept()) == kept and len(saved) == 1 + kept
    size = saved[0].stat().st_size
    assert found.checkpoint_bytes == pytest.approx(size, rel=0.01)
    assert found.disk_bytes == pytest.approx((2 + kept) * size + 90_000, rel=0.01)


def test_a_plan_that_knows_one_kind_of_step_only_is_wrong(device: Device, dataset: Dataset) -> None:
    """The control: the kinds of steps matter by more than the tenth that a plan may be off."""
    config = config_of()
    costs = probe(FakeEngine(config, device), dataset, config, lambda line: None)  # type: ignore[arg-type]
    assert costs.steps == {kind: pytest.approx(cost(kind)) for kind in kinds(config.train)} and len(costs.steps) == 5
    choices: dict[str, Any] = {"machine": "", "official": False, "train_tokens": 1, "artifact_bytes": 1, "build": 0.0,
                               "disk_free": 1, "rule_seconds": 1.0}  # fmt: skip
    right = forecast(config, costs, **choices).seconds
    slow = max(costs.steps.values())
    wrong = forecast(config, dataclasses.replace(costs, steps={StepKind(8, 64, False, True): slow}), **choices).seconds
    assert abs(wrong / right - 1) > 0.1


def test_phases_are_the_schedules(device: Device, dataset: Dataset) -> None:
    """Every border lies where core.training.schedule changes its answer."""
    config = config_of()
    found = planned(FakeEngine(config, device), dataset, config)
    spans = {phase.name: phase.steps for phase in found.phases}
    assert spans == {
        "warm-up": (0, 19), "constant rate": (19, 140), "warm-down": (140, 200), "rows of 16 tokens": (0, 40),
        "rows of 32 tokens": (40, 80), "rows of 64 tokens": (80, 200), "stored weights": (168, 200),
        "averaging": (150, 200), "repeated layers": (119, 200),
    }  # fmt: skip
    for name, holds in (("warm-up", False), ("constant rate", True)):
        rates = [lr_scale(progress_by_steps(i, config.train), config.train) for i in range(*spans[name])]
        assert all((rate == 1.0) is holds for rate in rates)
    times = {phase.name: phase.seconds for phase in found.phases}
    assert times["rows of 16 tokens"] == pytest.approx((0.0, 40 * 0.016))
    assert times["warm-down"][1] == pytest.approx(found.seconds)


def test_tokens_and_epochs(device: Device, dataset: Dataset) -> None:
    """A step keeps its tokens whatever the row length."""
    config = config_of()
    found = planned(FakeEngine(config, device), dataset, config)
    assert found.tokens == 200 * 8 * 64 and found.epochs == found.tokens / len(dataset.train)


def test_limits_bind(device: Device, dataset: Dataset) -> None:
    """Bytes, memory and disk make the plan fail; the 600 s of another machine do not, and say so."""
    config = config_of()
    engine: Any = FakeEngine(config, device)
    fine = planned(engine, dataset, config)
    assert fine.ok and not any(limit.over for limit in fine.limits)
    for change, what in (
        ({"artifact_bytes": 15_770_001}, "artifact"),
        ({"disk_free": 200_000}, "disk for checkpoints"),
    ):
        found = planned(engine, dataset, config, **change)
        assert not found.ok and [x.what.split(",")[0] for x in found.limits if x.over] == [what]
    assert planned(engine, dataset, config, artifact_bytes=15_770_000).ok
    slow = planned(engine, dataset, config, rule_seconds=0.1)
    assert slow.ok and [x.what for x in slow.limits if x.over] == ["training", "scoring"]
    assert all("for information" in x.note for x in slow.limits if x.over)
    here = planned(engine, dataset, config, rule_seconds=0.1, official=True)
    assert [x.note for x in here.limits if x.over] == ["on 8xH100"] * 2
    engine.stats = lambda: {"peak_bytes": 2e9, "limit_bytes": 1e9, "traces": 0.0}
    found = planned(engine, dataset, config)
    assert not found.ok and [x.what for x in found.limits if x.over] == ["memory of the fullest device"]


def test_memory_of_processes_is_that_of_their_machine(device: Device) -> None:
    """Processes on one machine share it; devices have their own."""

    class Three(Alone):
        def gather(self, value: np.ndarray) -> list[np.ndarray]:
            return [value, value + [1e9, 0, 0], value + [5e9, 0, 1]]

    engine: Any = FakeEngine(config_of(), device)
    engine.ranks = Three()
    engine.stats = lambda: {"process_bytes": 1e9}
    found = measure_memory(engine)
    assert found.used == 6e9 and found.of == "machine (processes)"  # 1 + 2 on one machine, 6 on the other
    engine.stats = lambda: {"peak_bytes": 1e9, "limit_bytes": 8e9}
    assert measure_memory(engine)[:2] == (6e9, "fullest device")


def everything_under(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file with its size and time."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither where there is no run, nor where there is one; its JSON is the plan; and a budget too small is told."""
    options = debug_data(tmp_path)
    before = everything_under(tmp_path)
    assert main(["train", "debug", *options, "--dry-run", "--json"]) == 0
    assert everything_under(tmp_path) == before and not (tmp_path / "run").exists()
    value = json.loads(capsys.readouterr().out)
    assert value["ok"] and value["steps"] == 6 and value["seconds"] > 0 and value["memory_bytes"] > 2**20
    assert main(["train", "debug", *options]) == 0
    before = everything_under(tmp_path)
    capsys.readouterr()
    assert main(["train", "debug", *options, "--dry-run", "--export.budget", "250000"]) == 1
    assert everything_under(tmp_path) == before
    out = capsys.readouterr().out
    assert "would exceed: artifact, predicted" in out and "holds a run already" in out


def test_a_run_that_does_not_fit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What frameworks say when memory runs out is not a traceback; other faults stay what they are."""

    def fail(message: str) -> Any:
        def warm_up(*_: Any) -> None:
            raise RuntimeError(message)

        return warm_up

    options = debug_data(tmp_path)
    monkeypatch.setattr(core.forecast.probe, "warm_up", fail("CUDA out of memory. Tried to allocate 9 GiB"))
    assert main(["train", "debug", *options, "--dry-run"]) == 1
    assert "needs more memory than there is (CUDA out of memory" in capsys.readouterr().err
    monkeypatch.setattr(core.forecast.probe, "warm_up", fail("a shape is wrong"))
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        main(["train", "debug", *options, "--dry-run"])


# The deadline for training data.
