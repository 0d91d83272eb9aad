"""Shapes of the learning rate and of decay, stages of rows, and where the clock stops training. Budget: 10 s."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import core.training.loop
import core.training.run
from core.compare.pair import choose_axis, positions
from core.config import ConfigError, RunConfig, TrainConfig
from core.data.batch import Batch
from core.data.bundled import open_data
from core.data.dataset import Dataset
from core.engine.plan import StepPlan
from core.engine.ranks import Ranks
from core.training import checkpoint
from core.training.loop import check_rows, done, progress_of, train, warm_up
from core.training.report import write_run_report
from core.training.run import Run
from core.training.schedule import lr_scale, plan, progress_by_steps, steps_of, tokens_before
from shared_tests.support.killed import fingerprint, timeless
from shared_tests.support.numpy_runs import BigramEngine, config_of, start

STAGES: dict[str, Any] = {
    "batch_stages": (2, 4), "batch_until": (0.3, 0.6), "seq_stages": (16,), "seq_until": (0.45,),
}  # fmt: skip


# Rates and decay.


def test_a_floor_is_reached_or_clips() -> None:
    reach = TrainConfig(warmup=0.0, warmdown=0.8, floor=0.25)
    clip = dataclasses.replace(reach, floor_rule="clip")
    places = (0.1, 0.2, 0.6, 0.75, 0.8, 0.9, 1.0, 1.5)
    assert [lr_scale(p, reach) for p in places] == pytest.approx(
        [1, 1, 0.625, 0.484375, 0.4375, 0.34375, 0.25, 0.25], abs=1e-12
    )
    assert [lr_scale(p, clip) for p in places] == pytest.approx([1, 1, 0.5, 0.3125, 0.25, 0.25, 0.25, 0.25], abs=1e-12)


def test_a_warm_down_may_be_a_cosine() -> None:
    reach = TrainConfig(warmup=0.0, warmdown=0.5, floor=0.2, decay="cosine")
    clip = dataclasses.replace(reach, floor_rule="clip")
    for share in (0.0, 0.25, 0.5, 0.9, 1.0):
        fall = (1 + math.cos(math.pi * share)) / 2
        assert lr_scale(0.5 + share / 2, reach) == pytest.approx(0.2 + 0.8 * fall, abs=1e-12)
        assert lr_scale(0.5 + share / 2, clip) == pytest.approx(max(fall, 0.2), abs=1e-12)


def test_the_whole_run_may_be_a_line_to_zero() -> None:
    """D2Z: a warm-up, and all of the rest a fall to 0."""
    for warmup in (0.0, 0.02, 0.25):
        config = TrainConfig(warmup=warmup, warmdown=1 - warmup, floor=0.0)
        for p in np.linspace(0.0, 1.0, 101):
            expected = p / warmup if p < warmup else (1 - p) / (1 - warmup)
            assert lr_scale(float(p), config) == pytest.approx(expected, abs=1e-12)
        assert lr_scale(1.0, config) == 0.0


def test_decay_is_of_a_group_and_the_matrices_tapers() -> None:
    decays: dict[str, Any] = {
        "weight_decay": 0.1, "weight_decay_embed": 0.2, "weight_decay_vector": 0.3, "weight_decay_hash": 0.4,
    }  # fmt: skip
    config = TrainConfig(**decays, weight_decay_end=0.5, weight_decay_from=0.7)
    for p, factor in ((0.0, 1.0), (0.7, 1.0), (0.85, 0.75), (1.0, 0.5), (1.5, 0.5)):
        now = plan(0, p, config)
        assert now.decay_matrix == pytest.approx(0.1 * factor, abs=1e-12)
        assert (now.decay_embed, now.decay_vector, now.decay_hash) == (0.2, 0.3, 0.4)
    assert {plan(0, p, TrainConfig(**decays)).decay_matrix for p in (0.0, 0.71, 1.0)} == {0.1}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decay": "cosine", "warmdown": 0.0}, "change nothing without a train.warmdown"),
        ({"floor_rule": "clip", "warmdown": 0.0}, "change nothing without a train.warmdown"),
        ({"weight_decay_end": 0.5, "weight_decay": 0.0}, "weight_decay_end=0.5 changes nothing"),
        ({"weight_decay_end": 0.5, "weight_decay_from": 1.0}, "weight_decay_end=0.5 changes nothing"),
        ({"weight_decay_vector": -1.0}, "weight_decay_vector=-1.0: expected a number from 0 up"),
        ({"weight_decay_hash": -1.0}, "weight_decay_hash=-1.0: expected a number from 0 up"),
        ({"weight_decay_from": 1.1}, "weight_decay_from=1.1: expected a share"),
        ({"reserve_seconds": 5.0}, "reserve_seconds=5.0: expected less than train.seconds=None"),
        ({"reserve_seconds": 5.0, "seconds": 5.0}, "reserve_seconds=5.0: expected less than train.seconds=5.0"),
        ({"reserve_seconds": -1.0, "seconds": 5.0}, "reserve_seconds=-1.0: expected a number from 0 up"),
        ({"batch_stages": (2,)}, "expected as many shares as numbers of rows"),
        ({"batch_stages": (2, 4), "batch_until": (0.5, 0.5)}, "batch_until=.*: expected rising shares"),
        ({"batch_stages": (8,), "batch_until": (0.5,)}, "8: expected from 1 to below train.batch=8"),
        ({"batch_stages": (0,), "batch_until": (0.5,)}, "0: expected from 1 to below"),
        ({"batch_stages": (3,), "batch_until": (0.5,), "micro_batch": 2}, "3 is not divisible by train.micro_batch=2"),
        ({"batch_stages": (3,), "batch_until": (0.5,), "seq": 192, "seq_stages": (128,), "seq_until": (0.5,)},
         "128 does not divide the 576 tokens"),
    ],
)  # fmt: skip
def test_what_no_run_can_keep_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        TrainConfig(**{"batch": 8, "seq": 64, **changes})
    assert "\n" not in str(error.value)


# Stages of rows.


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """The bundled text."""
    return open_data("sample")


def test_rows_grow_in_stages_and_the_text_is_read_in_one_piece() -> None:
    """Every step begins where the one before ended; the steps of a budget of tokens are the fewest that have them."""
    train = TrainConfig(steps=40, batch=8, seq=64, **STAGES)
    assert train.shapes == ((8, 16), (16, 16), (4, 64), (8, 64))
    tokens, plans = 0, []
    for step in range(train.steps):
        assert tokens_before(step, train) == tokens
        plans.append(plan(step, progress_by_steps(step, train), train))
        tokens += plans[-1].rows * plans[-1].seq
    assert [now.rows * now.seq // 64 for now in plans] == [2] * 12 + [4] * 12 + [8] * 16
    assert tokens_before(40, train) == tokens == 64 * (2 * 12 + 4 * 12 + 8 * 16)
    for asked in (1, 64, 5000, tokens, tokens + 1):
        steps = steps_of(asked, train)
        sizes = [tokens_before(n, dataclasses.replace(train, steps=n)) for n in range(max(1, steps - 1), steps + 1)]
        assert sizes[-1] >= asked and (steps == 1 or sizes[0] < asked)
    assert steps_of(1000, TrainConfig(batch=1, seq=300)) == 4


def test_ranks_that_a_stage_cannot_feed_are_refused() -> None:
    train = TrainConfig(batch=8, seq=64, **{**STAGES, "seq_stages": (), "seq_until": ()})
    check_rows(train, cast(Ranks, SimpleNamespace(world=2)))
    with pytest.raises(ConfigError, match=r"batch_stages=\(2, 4\): a stage's 2 rows of 64 tokens .* 3 ranks"):
        check_rows(train, cast(Ranks, SimpleNamespace(world=3)))
    shorter = TrainConfig(batch=8, seq=64, **STAGES)  # a stage of shorter rows has more of them
    check_rows(shorter, cast(Ranks, SimpleNamespace(world=4)))
    with pytest.raises(ConfigError, match="4 rows of 64 tokens"):
        check_rows(shorter, cast(Ranks, SimpleNamespace(world=5)))


def test_the_warm_up_has_every_shape_with_and_without_repeats_and_leaves_no_trace() -> None:
    config = config_of(batch=8, seq=64, **STAGES)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, repeat_layers=(0,)),
        train=dataclasses.replace(config.train, repeat_from=0.5),
    )
    engine: Any = BigramEngine(config)
    params, optimizer, step, seen = engine.params(), engine.optimizer(), engine.train_step, []

    def watched(batch: Batch, now: StepPlan) -> Any:
        assert batch.tokens.shape == (now.rows, now.seq)
        seen.append((now.rows, now.seq, now.repeat))
        return step(batch, now)

    engine.train_step = watched
    warm_up(engine, config)
    assert sorted(seen) == sorted((*shape, repeat) for shape in config.train.shapes for repeat in (False, True))
    assert all(np.array_equal(engine.params()[name], value) for name, value in params.items())
    assert all(np.array_equal(engine.optimizer()[name], value) for name, value in optimizer.items())


class Stop(Exception):
    """What ends a run early here."""


class Clocked:
    """The loop's clock, in which a token of a step takes 1/4096 s: sums have no rounding."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        watch = SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: 0.0)
        monkeypatch.setattr(core.training.loop, "time", watch)

    def go(self, path: Path, config: RunConfig, dataset: Dataset, stop: int | None = None) -> tuple[Run, list[Any]]:
        """Train, or go on; stop before step `stop`. Return the run, and what every step was given."""
        run, engine = start(path, config, dataset)
        step, seen = engine.train_step, []
        shapes = len(config.train.shapes)

        def timed(batch: Batch, now: StepPlan) -> Any:
            seen.append((now.step, batch.tokens.tobytes(), now.lr_embed))
            if len(seen) > shapes and now.step == stop:  # the warm-up comes first
                raise Stop
            self.now += now.rows * now.seq / 4096
            return step(batch, now)

        engine.train_step = timed
        try:
            train(run, engine, dataset, lambda line: None)
        except Stop:
            assert stop is not None
        return run, seen[shapes:]


CLOCKS: dict[str, dict[str, Any]] = {
    "steps": {"steps": 24},
    "seconds": {"steps": 1000, "seconds": 1.5},
    "reserve": {"steps": 1000, "seconds": 2.0, "reserve_seconds": 0.5},
}


@pytest.mark.parametrize("name", CLOCKS)
def test_a_run_that_stops_in_any_stage_goes_on_in_the_same_bits(
    name: str, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the clock knows how far a step was, the checkpoint says what was read."""
    clock = Clocked(monkeypatch)
    config = config_of(seq=64, save_every=1, eval_every=None, log_every=1, **STAGES, **CLOCKS[name])
    calm, seen = clock.go(tmp_path / "calm", config, dataset)
    saved = calm.checkpoint()
    assert saved and saved.tokens == sum(len(tokens) // 4 for _, tokens, _ in seen) == calm.last("tokens")
    assert len({len(tokens) for _, tokens, _ in seen}) == 3, "every stage was reached"
    if name == "steps":
        assert saved.tokens == tokens_before(24, config.train)
    else:
        assert 1.5 <= saved.seconds < 1.625, "training stops where the reserve begins"
    pieces: list[Any] = []
    for stop in (*range(3, saved.step, 3), None):
        run, more = clock.go(tmp_path / "stopping", config, dataset, stop)
        pieces += more[: None if stop is None else -1]  # the last was stopped before it was taken
    assert pieces == seen
    assert fingerprint(cast(Any, run.checkpoint())) == fingerprint(saved) and timeless(run) == timeless(calm)


def test_a_resume_that_does_not_know_what_was_read_is_noticed(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clocked(monkeypatch)
    config = config_of(seq=64, save_every=1, eval_every=None, log_every=1, **STAGES, **CLOCKS["seconds"])
    calm, seen = clock.go(tmp_path / "calm", config, dataset)
    clock.go(tmp_path / "run", config, dataset, 9)
    read = checkpoint.read_checkpoint
    lossy: Any = lambda path, config: read(path, config)._replace(tokens=9 * config.train.tokens_per_step)  # noqa: E731
    monkeypatch.setattr(core.training.run, "read_checkpoint", lossy)
    _, more = clock.go(tmp_path / "run", config, dataset)
    assert [step for step, _, _ in more] == [step for step, _, _ in seen[9:]] and more != seen[9:]


def test_records_count_the_tokens_of_stages(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, tokens a second, the report and the axis of a comparison."""
    config = config_of(seq=64, **STAGES, steps=20, log_every=5, eval_every=10, save_every=None)
    run, _ = Clocked(monkeypatch).go(tmp_path / "run", config, dataset)
    expected = {step: tokens_before(step, config.train) for step in range(0, 21, 5)}
    for row in run.metrics():
        assert row["tokens"] == run.tokens(row) == expected[row["step"]]
        if "perf/tok_s" in row:
            took = row["perf/step_ms"] * 5 / 1000
            assert row["perf/tok_s"] * took == pytest.approx(expected[row["step"]] - expected[row["step"] - 5])
    assert list(positions(run, "train/loss", "tokens")) == [expected[step] for step in (5, 10, 15, 20)]
    assert list(positions(run, "val/bpb", "tokens")) == [expected[10], expected[20]]
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_stages=(), batch_until=()))
    assert choose_axis([config, plain], "auto") == "tokens" and choose_axis([plain, plain], "auto") == "step"
    final = {"label": "score", "bpb": 2.0, "byte_rule": "raw", "error": None, "bpb_raw": None, "documents": 1}
    final |= {
        "total_documents": 1,
        "windows": "plain",
        "nats": 1.0,
        "targets": 1,
        "bytes": 1,
        "loss": 1.0,
        "full": True,
    }
    run.log(20, {"final/score": final})
    run.log(20, {"final/artifact": {"score": final, "gap": 0.0, "bytes": 9, "allowed": 10, "within": True}})
    write_run_report(run)
    assert f"| training | 20 steps, {expected[20]:,} tokens, " in (run.path / "report.md").read_text()


# The clock.


def test_training_stops_where_the_reserve_begins() -> None:
    """Progress is 1 there, and the schedule has come to its end."""
    config = TrainConfig(seconds=10.0, reserve_seconds=4.0, warmdown=0.5, floor=0.0)
    assert config.train_stop == 6.0
    assert [progress_of(3, seconds, config) for seconds in (0.0, 3.0, 6.0, 7.0)] == [0.0, 0.5, 1.0, 1.0]
    assert not done(3, 5.99, config) and done(3, 6.0, config)
    assert lr_scale(progress_of(3, 4.5, config), config) == 0.5 and lr_scale(progress_of(3, 6.0, config), config) == 0.0
