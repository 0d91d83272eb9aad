"""`skc bench`: what it computes from its workers' times, and that timing an update changes nothing. Budget: 20 s."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from core import presets
from core.check import bench
from core.check.bench_worker import rank_of
from core.cli import main
from core.config import ConfigError, RunConfig
from core.data.batch import Batch
from core.engine.measured import load_measured
from core.engine.protocol import EngineOptions
from core.engine.ranks import buckets, updated_by
from core.training import schedule
from shared_tests.support.harness import BACKENDS, batches, engine, mini, to_numpy, working_weights

STEPS = {"ablate": [1.0, 10.0, 4.0], "ablate_float": [1.0, 5.0, 8.0]}
"""Preset -> seconds per step by round: the median of the ratios (1) is not the ratio of the medians (0.8)."""
UPDATES = {"ablate": [0.5, 2.0, 0.4], "ablate_float": [0.1, 0.5, 0.8]}
DEVICE = {"device": "CPU", "dtype": "float32", "notes": ["a note"], "step": 2.0}


class FakeWorker:
    """Answers as a worker would, from STEPS and UPDATES; `asked` has every line of every worker in order."""

    asked: list[tuple[str, str, str]]
    closed: int
    configs: list[RunConfig]

    def __init__(self, variant: str, config: RunConfig, threads: int, ranks: int):
        self.preset, self.variant, self.round = config.preset, variant, -1
        FakeWorker.configs.append(config)

    def ask(self, line: str) -> dict[str, Any]:
        FakeWorker.asked.append((self.preset, self.variant, line))
        word, number = (*line.split(), "0")[:2]
        if word == "ready":
            return DEVICE
        if word == "steps":
            self.round += 1
            seconds = STEPS[self.preset][self.round] * int(number)
            stats = {"process_bytes": 1e6 * (1 + self.round), "traces": 1.0}
            cpu, peak = seconds / (4 if self.preset == "ablate" else 2), 1e9 * (1 + self.round)
            return {
                "seconds": seconds,
                "cpu": cpu,
                "steps": int(number),
                "peak": peak,
                "peak_size": 1024,
                "stats": stats,
            }
        if word == "updates":
            return {"seconds": UPDATES[self.preset][self.round]}
        return {"process_bytes": 9e9, "traces": 2.0}

    def close(self) -> None:
        FakeWorker.closed += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWorker]:
    """Put FakeWorker in place of processes, on a machine with both backends."""
    FakeWorker.asked, FakeWorker.configs, FakeWorker.closed = [], [], 0
    monkeypatch.setattr(bench, "Worker", FakeWorker)
    monkeypatch.setattr(bench, "available_backends", lambda: ["mlx", "cuda"])
    return FakeWorker


def compared(**options: Any) -> bench.BenchReport:
    ours, theirs = (presets.get(name).config for name in ("ablate", "ablate_float"))
    return bench.run_bench(ours, against=theirs, rounds=3, seconds=6.0, **options)


def test_a_ratio_is_the_median_of_the_rounds_own(fake: type[FakeWorker]) -> None:
    found = compared(variants=["cuda"]).against
    assert found is not None
    assert found.ratios == (bench.Ratio("cuda", 1.0, (0.5, 2.0), 0.5, (0.25, 1.0)),)
    assert bench.middle_and_spread(bench.per_round([1.0, 9.0], [2.0, 3.0])) == (1.75, (0.5, 3.0))


def test_the_updates_share_is_that_of_its_own_round(fake: type[FakeWorker]) -> None:
    row = compared(variants=["cuda"]).rows[0]
    assert (row.update_ms, row.update_share, *row.update_spread) == pytest.approx((500.0, 0.2, 0.1, 0.5))
    assert (row.ms_per_step, *row.spread) == pytest.approx((4000.0, 1000.0, 10_000.0))
    assert row.own_peak == 3e9 and row.tokens_per_second == pytest.approx(8 * 512 / 4)


def test_memory_is_what_steps_took_and_compilations_are_counted_at_the_end(fake: type[FakeWorker]) -> None:
    row = compared(variants=["cuda"]).rows[0]
    assert (row.peak_bytes, row.peak_of, row.traces) == (1e6, "process", 2.0)


def test_workers_take_turns_and_every_other_round_turns_back(fake: type[FakeWorker]) -> None:
    compared(variants=["cuda", "mlx"])
    keys = [("ablate", "cuda"), ("ablate_float", "cuda"), ("ablate", "mlx"), ("ablate_float", "mlx")]
    rounds = [*keys, *reversed(keys), *keys]
    expected = [(*key, line) for key in rounds for line in ("steps 3", "updates 3")]
    assert fake.asked == [(*k, "ready") for k in keys] + expected + [(*k, "stats") for k in keys]
    assert fake.closed == 4


def test_the_other_preset_gets_the_work_of_the_first_and_the_report_says_so(fake: type[FakeWorker]) -> None:
    config, other = presets.get("ablate").config, presets.get("ablate_float").config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch=16, micro_batch=4))
    other = dataclasses.replace(
        other, train=dataclasses.replace(other.train, seq=256, seq_stages=(64,), seq_until=(0.5,), micro_batch=2)
    )
    report = bench.run_bench(config, against=other, rounds=1, variants=["mlx"])
    assert fake.configs[0] == config
    used = fake.configs[1].train
    assert (used.batch, used.seq, used.micro_batch, used.lengths) == (16, 512, 4, (512,))
    assert fake.configs[1].model == other.model and used.matrix_rule == other.train.matrix_rule
    text = "\n".join(report.lines())
    for line in ("train.batch: 8 -> 16", "train.seq: 256 -> 512", "train.micro_batch: 2 -> 4"):
        assert f"ablate_float was changed for this comparison: {line}\n" in text
    assert text.endswith(
        "mlx: a step of ablate takes 1.000 times that of ablate_float (rounds 1.000 to 1.000); "
        "of processor time 0.500 times (rounds 0.500 to 0.500)"
    )


def test_without_another_preset_nothing_is_compared(fake: type[FakeWorker]) -> None:
    report = bench.run_bench(presets.get("ablate").config, rounds=1, variants=["cuda", "cuda"])
    assert fake.closed == len(report.rows) == 1, "a variant that is named twice is timed once"
    assert report.against is None and report.to_json()["against"] is None
    assert "times that of" not in "\n".join(report.lines())
    with pytest.raises(ConfigError, match="expected 1 to 1,024"):
        bench.run_bench(presets.get("ablate").config, rounds=0, variants=["cuda"])


def unusual(micro_batch: int | None) -> RunConfig:
    """Return a mini with Muon, clipping, stored weights and averages."""
    config = mini("ablate")
    train = dataclasses.replace(config.train, micro_batch=micro_batch, average_from=0.0, average_ternary=True)
    return dataclasses.replace(config, train=train)


@pytest.mark.pair
@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_timing_an_update_changes_nothing(backend: str, micro_batch: int | None) -> None:
    config, runs = unusual(micro_batch), []
    for timed in (False, True):
        made, losses = engine(backend, config, working_weights(config.model, 1.0), dtype="float32"), []
        for step, batch in enumerate(batches(config, 3)):
            plan = schedule.plan(step, 0.5, config.train)
            losses.append(made.train_step(batch, plan))
            if timed:  # with the step still in flight
                assert made.update_seconds(plan, 1) > 0
        runs.append({"losses": np.array([p.result().loss for p in losses]), **made.params(), **made.optimizer()})
        runs[-1] |= {f"scored {name}": value for name, value in made.weights().items()}
    for name, value in runs[0].items():
        assert runs[1][name].tobytes() == value.tobytes(), name


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_timed_is_the_whole_update(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = unusual(2)
    made: Any = engine(backend, config, working_weights(config.model, 1.0), dtype="float32")
    finish, calls = made._finish, []

    def spy(params: dict, state: dict, grads: dict, loss: Any, hyper: Any, count: Any) -> Any:
        before = {**params, **state}
        kept = {name: to_numpy(value).copy() for name, value in before.items()}
        out = finish(params, state, grads, loss, hyper, count)
        after = {**out[0], **out[1]} if backend == "mlx" else before
        moved = {name for name, value in after.items() if (to_numpy(value) != kept[name]).any()}
        calls.append((float(count), moved))
        return out

    monkeypatch.setattr(made, "_finish", spy)
    made.update_seconds(schedule.plan(3, 0.5, config.train), 2)
    everything = {*made._params, *made._state}
    assert [count for count, _ in calls] == [2.0] * 3, "one update more than is timed, and as many micro-batches"
    assert len(everything) > 10 and calls[0][1] == everything


def test_the_verb_compares_two_presets(capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--variants", "cuda", "--rounds", "1", "--seconds", "0.01", "--json")
    assert main(["bench", "debug", "--train.batch", "2", "--against", "tiny", *short]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    value = json.loads(out)
    ours, theirs = value["rows"][0], value["against"]["other"]["rows"][0]
    assert (value["preset"], value["against"]["other"]["preset"]) == ("debug", "tiny")
    assert (value["against"]["other"]["batch"], value["against"]["other"]["seq"]) == (value["batch"], 64) == (2, 64)
    assert value["against"]["changed"] == ["train.batch: 16 -> 2", "train.seq: 256 -> 64"]
    (ratio,) = value["against"]["ratios"]
    assert ratio["variant"] == "cuda" and ratio["spread"] == [ratio["median"]] * 2
    assert ratio["median"] == pytest.approx(ours["ms_per_step"] / theirs["ms_per_step"], rel=1e-9)
    for row in (ours, theirs):
        assert set(row) == {f.name for f in dataclasses.fields(bench.BenchRow)} and row["tokens_per_second"] > 0
        assert row["update_share"] == pytest.approx(row["update_ms"] / row["ms_per_step"], rel=1e-9)
        assert 0 < row["update_share"] < 1
    assert ours["notes"][-1] == "forward pass: float weights"


def test_an_unknown_preset_to_compare_with_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "debug", "--against", "abalte"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "skc bench: preset 'abalte' does not exist; did you mean ablate? (see: skc presets)\n"


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_rank_of_several_does_its_part_and_sends_nothing(backend: str) -> None:
    config = unusual(1)
    ranks = rank_of(2, backend)
    options = EngineOptions(dtype="float32", compile=False)
    made = load_measured(backend, config, working_weights(config.model, 1.0), options, True, ranks)
    before, (batch,) = {**made.params(), **made.optimizer()}, batches(config, 1)
    mine = Batch(batch.tokens[:2], batch.targets[:2], 4)
    assert made.update_seconds(schedule.plan(0, 0.5, config.train), 1) > 0
    after = {**made.params(), **made.optimizer()}
    assert all(after[name].tobytes() == value.tobytes() for name, value in before.items()), "timing changes nothing"
    assert made.train_step(mine, schedule.plan(0, 0.5, config.train)).result().finite
    alone, all_ = updated_by(buckets(config, 2), 0)
    matrices = [name for bucket in buckets(config, 2) if bucket.slots for name in bucket.names]
    assert 0 < len(alone) < len(matrices)
    after = made.params()
    assert {name for name in after if after[name].tobytes() != before[name].tobytes()} == {*alone, *all_}


def test_the_verb_times_one_rank_of_two(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "debug", "--train.matrix-rule", "muon", "--ranks", "2", "--variants", "cuda", "--rounds", "1"]
    assert main([*command, "--seconds", "0.01", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    row = value["rows"][0]
    assert (value["ranks"], value["batch"], row["peak_size"]) == (2, 2, 1024)
    assert row["tokens_per_second"] == pytest.approx(2 * 64 / row["ms_per_step"] * 1e3)
    with pytest.raises(ConfigError, match="ranks=3: expected a divisor of train.batch=4"):
        bench.run_bench(presets.get("debug").config, ranks=3)


@pytest.mark.parametrize("gpu", [False, True])
def test_the_peak_is_of_a_product_that_fills_the_device(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU 20 in a row between two events: a wait after each would be timed too."""
    import torch

    made: Any = engine("cuda", mini("debug"), dtype="float32")
    calls: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("event")

        def synchronize(self) -> None:
            calls.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 40.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "matmul", lambda a, b: calls.append(tuple(a.shape)))
    monkeypatch.setattr(torch, "randn", lambda shape, device: torch.empty(1).expand(shape))
    monkeypatch.setattr(made, "_device", torch.device("cuda" if gpu else "cpu"))
    size, rate = made.matmul_rate()
    if gpu:
        assert (size, rate) == (8192, pytest.approx(2 * 8192**3 * 20 / 0.040))
        assert calls == [(8192, 8192), "event", *[(8192, 8192)] * 20, "event", "wait"]
    else:
        assert size == 1024 and calls == [(1024, 1024)] * 6 and rate > 0
