"""Every setting of training changes what the compiled step computes: dead ones are the commonest fault. Budget: 25 s.

A setting that only changes the plan must act in code that was compiled without it: it reaches the device as a number,
or as one of the graphs that the warm-up makes. One that is a constant of the compiled code gets an engine of its own.
"""

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from core import rng
from core.config import POLAR_EXPRESS, RunConfig, TrainConfig, changed
from core.data.batch import Batch
from core.data.batches import batch_from
from core.data.bundled import BUNDLED
from core.data.dataset import Split
from core.data.tokenizer import Tokenizer
from core.training.loop import progress_of, warm_up
from core.training.schedule import plan
from shared_tests.support.harness import BACKENDS, engine, mini, working_weights

pytestmark = pytest.mark.pair
INERT = {
    "log_every", "eval_every", "sample_every", "save_every", "save_minutes", "keep_every",
    "micro_batch",  # but for rounding: test_model.py::test_micro_batches_give_the_gradient_of_the_whole
}  # fmt: skip
"""Settings of training that change nothing that is computed."""
CLOCK = {"seconds": 6.0}
LENGTHS, ROWS = {"seq_stages": (4,), "seq_until": (0.3,)}, {"batch_stages": (1,), "batch_until": (0.3,)}
PLANNED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "steps": ({}, {"steps": 9}),
    "seconds": (CLOCK, {"seconds": 12.0}),
    "reserve_seconds": (CLOCK, {"reserve_seconds": 2.0}),
    "batch": ({}, {"batch": 1}),
    "seq": ({}, {"seq": 4}),
    **{f"lr_{group}": ({}, {f"lr_{group}": 0.002}) for group in ("embed", "matrix", "vector", "hash")},
    "warmup": ({}, {"warmup": 0.4}),
    "warmdown": ({}, {"warmdown": 0.3}),
    "decay": ({}, {"decay": "cosine"}),
    "floor": ({}, {"floor": 0.3}),
    "floor_rule": ({"floor": 0.6}, {"floor_rule": "clip"}),
    "weight_decay": ({}, {"weight_decay": 0.2}),
    "weight_decay_end": ({}, {"weight_decay_end": 0.5}),
    "weight_decay_from": ({"weight_decay_end": 0.5}, {"weight_decay_from": 0.3}),
    **{f"weight_decay_{group}": ({}, {f"weight_decay_{group}": 0.1}) for group in ("embed", "vector", "hash")},
    "muon_momentum": ({}, {"muon_momentum": 0.8}),
    "muon_momentum_start": ({}, {"muon_momentum_start": 0.7}),
    "muon_momentum_steps": ({}, {"muon_momentum_steps": 2}),
    "quantise": ({}, {"quantise": "always"}),
    "quantise_below": ({"quantise": "late"}, {"quantise_below": 0.9}),
    "average_from": ({}, {"average_from": 0.6}),
    "average_decay": ({}, {"average_decay": 0.5}),
    "seq_stages": ({}, LENGTHS),
    "seq_until": (LENGTHS, {"seq_until": (0.6,)}),
    "batch_stages": ({}, ROWS),
    "batch_until": (ROWS, {"batch_until": (0.6,)}),
    "repeat_from": ({}, {"repeat_from": 0.3}),
    "repeat_every": ({}, {"repeat_every": 2}),
}
"""Setting -> what both runs have that it needs, and the change; the engine is that of BASE."""
APART = {
    "batch", "seq", "seq_stages", "seq_until", "batch_stages", "batch_until", "repeat_from", "repeat_every",
    "quantise", "quantise_below",
}  # fmt: skip
"""Of those, what has code of its own, which the warm-up makes: another shape, no repeats, quantisers."""
EXPERTS = {
    "model.experts.count": 2, "model.experts.hidden": 3, "model.experts.shared": 2, "model.experts.start": 0.0,
}  # fmt: skip
BUILT: dict[str, Any] = {
    "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "matrix_rule": "adamw", "muon_iterations": 3,
    "muon_coefficients": POLAR_EXPRESS, "muon_rows": True, "muon_scale": "rms", "clip": 0.3, "z_loss": 0.1,
    "average_ternary": True, "mtp_heads": 2, "mtp_weight": 0.9, "quantise_soft": (1.0, 4.0), "snapshot_every": 1,
    "snapshot_below": 0.99, "untie_from": 0.6, "depth_drop": 0.4, "ternary_noise": 0.3, "quiet": 0.6,
    "router_balance": 0.5, "route_from": 0.6, "rate": 0.3, "rate_from": 0.6, "consistency": 0.5,
}  # fmt: skip
"""Setting -> its change; each has an engine of its own, since code is compiled with these."""
NEEDED: dict[str, dict[str, Any]] = {
    "mtp_weight": {"train.mtp_heads": 2},
    **dict.fromkeys(("router_balance", "route_from"), EXPERTS),
    "quantise_soft": {"train.quantise": "always", "model.matrix_storage": "int4/row"},
    "snapshot_every": {"train.snapshot_below": 0.99},
    "snapshot_below": {"train.snapshot_every": 1, "train.snapshot_below": 0.3},
    "untie_from": {"model.head.untied": True},
    "ternary_noise": {"train.quantise": "always"},
    "quiet": {"train.depth_drop": 0.4},
    "rate_from": {"train.rate": 0.3},
    "consistency": {"model.bank.at": "head", "model.skc.block": 4},
}  # fmt: skip
"""What a change of BUILT has no use without."""


def base() -> RunConfig:
    """Return a run of one layer with parameters of every group, ternary matrices, Muon, averages and repeats."""
    model = {
        "model.layers": 1, "model.repeat_layers": (0,), "model.bigram.buckets": 13, "model.bigram.dim": 4,
        "model.matrix_storage": "ternary/64", "model.embedding.storage": "int6/row",
    }  # fmt: skip
    train = {
        "steps": 4, "batch": 2, "seq": 8, "matrix_rule": "muon", "warmup": 0.25, "warmdown": 0.6, "floor": 0.1,
        "average_from": 0.3, "muon_momentum_steps": 6, "clip": 0.9,
    }  # fmt: skip
    return changed(mini("debug"), {**model, **{f"train.{name}": value for name, value in train.items()}})


BASE = base()


@functools.cache
def text() -> Split:
    """Return random tokens in documents of about nine."""
    tokens = rng.integers16(0, "switches", 4096) % BASE.model.vocab
    tokens[rng.integers16(0, "switches/bos", 4096) % 9 == 0] = BASE.model.bos
    return Split([tokens.astype(np.uint16)], Tokenizer.load(str(BUNDLED / "tokenizer.model")))


class Trained:
    """An engine, and what four steps by any settings make of its start: losses, parameters, optimizer state."""

    def __init__(self, backend: str, config: RunConfig, compiled: bool = True) -> None:
        self.engine: Any = engine(
            backend, config, working_weights(config.model, 1.0), dtype="float32", compile=compiled
        )
        self._start = self.engine.params(), self.engine.optimizer()

    def steps(self, train: TrainConfig) -> list[bytes]:
        """Train by the loop's own functions, on a clock by which a step takes 1.5 seconds."""
        params, optimizer = self._start
        self.engine.load_params(params)
        self.engine.load_optimizer(optimizer)
        tokens, found = 0, []
        for step in range(4):
            now = plan(step, progress_of(step, 1.5 * step, train), train)
            batch: Batch = batch_from(text(), tokens // now.seq, now.rows, now.seq, 0)
            found.append(np.float64(self.engine.train_step(batch, now).result().loss).tobytes())
            tokens += now.rows * now.seq
        state = self.engine.params() | self.engine.optimizer()
        return [*found, *(value.tobytes() for _, value in sorted(state.items()))]


def pass_through(patch: pytest.MonkeyPatch) -> None:
    """Let torch compile as it does, by a compiler that runs its graphs as they are: inductor takes a minute."""
    import torch

    patch.setattr(torch._dynamo, "lookup_backend", lambda name: lambda graph, inputs, **options: graph.forward)


def test_every_setting_of_training_is_sorted() -> None:
    """Whoever adds one says here whether it changes what is computed, and how that is seen."""
    names = [*PLANNED, *BUILT, *INERT]
    assert sorted(names) == sorted(field.name for field in dataclasses.fields(TrainConfig))


@pytest.fixture(scope="module", params=BACKENDS)
def shared(request: pytest.FixtureRequest) -> Iterator[Trained]:
    """The compiled engine of BASE, and no other: what it compiled stands."""
    with pytest.MonkeyPatch.context() as patch:
        pass_through(patch)
        yield Trained(request.param, BASE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("name", PLANNED)
def test_a_setting_of_the_plan_acts_in_code_that_is_compiled(name: str, shared: Trained) -> None:
    given, change = PLANNED[name]
    train = dataclasses.replace(BASE.train, **given)
    before = shared.steps(train)
    assert shared.steps(train) == before, "nothing but the setting makes a difference"
    traces = shared.engine.stats()["traces"]
    assert shared.steps(dataclasses.replace(train, **change)) != before
    assert name in APART or shared.engine.stats()["traces"] == traces > 0


@functools.cache
def unchanged(backend: str, compiled: bool, needed: tuple[tuple[str, Any], ...]) -> tuple[list[bytes], list[bytes]]:
    """Return what BASE computes with what a change needs, and the weights that are scored then."""
    config = changed(BASE, dict(needed))
    found = Trained(backend, config, compiled)
    return found.steps(config.train), scored(found)


def scored(trained: Trained) -> list[bytes]:
    """Return the weights that would be scored and stored."""
    return [value.tobytes() for _, value in sorted(trained.engine.weights().items())]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", BUILT)
def test_a_setting_that_is_compiled_in_acts(
    name: str, compiled: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pass_through(monkeypatch)
    needed = NEEDED.get(name, {})
    config = changed(BASE, {**needed, f"train.{name}": BUILT[name]})
    found = Trained(backend, config, compiled)
    steps, weights = unchanged(backend, compiled, tuple(needed.items()))
    assert found.steps(config.train) != steps
    assert scored(found) != weights


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backend", ["mlx", pytest.param("cuda", marks=pytest.mark.long)])
def test_noise_is_no_constant_of_compiled_code(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one start every step has another loss, by its key or by the plan, and none is compiled again."""
    pass_through(monkeypatch)
    noise, count = importlib.import_module("backends.mlx.noise"), [0]
    honest = noise.of_weights  # MLX's traces are those of the step, this is compiled apart from it
    monkeypatch.setattr(noise, "of_weights", lambda *given: count.append(0) or honest(*given))
    train = {"depth_drop": 0.6, "ternary_noise": 0.4, "quantise": "always", "quiet": 0.2, "untie_from": 0.5}
    changes = {"model.head.untied": True, "model.repeat_layers": (), **{f"train.{n}": v for n, v in train.items()}}
    config = changed(BASE, changes)
    made: Any = engine(backend, config, working_weights(config.model, 1.0), dtype="float32", compile=True)
    start, batch = (made.params(), made.optimizer()), batch_from(text(), 0, 2, 8, 0)
    losses, traces = [], []
    for step, progress in ((0, 0.2), (1, 0.2), (2, 0.2), (2, 0.6), (3, 0.9)):
        made.load_params(start[0], True)
        made.load_optimizer(start[1])
        losses.append(made.train_step(batch, plan(step, progress, config.train)).result().loss)
        traces.append((made.stats()["traces"], len(count)))
    assert len(set(losses)) == len(losses)
    assert min(traces[0]) > 0 and len(set(traces)) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backend", ["mlx", pytest.param("cuda", marks=pytest.mark.long)])
def test_the_warm_up_compiles_all_that_a_run_takes(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape of its stages, before and after repeats, experts and rounding; and leaves no trace."""
    pass_through(monkeypatch)
    changes = {
        "repeat_from": 0.6, "route_from": 0.6, "quantise": "late", "quantise_below": 0.4, "batch_stages": (1,),
        "batch_until": (0.3,),
    }  # fmt: skip
    config = changed(BASE, EXPERTS | {f"train.{name}": value for name, value in changes.items()})
    trained = Trained(backend, config)
    made = trained.engine
    before = made.params() | made.optimizer()
    warm_up(made, config)
    after, traces = made.params() | made.optimizer(), made.stats()["traces"]
    assert before.keys() == after.keys() and all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert not made.quantise and traces > 0
    plans = [plan(step, progress_of(step, 0.0, config.train), config.train) for step in range(4)]
    assert [(now.rows, now.repeat, now.quantise) for now in plans] == [
        (1, False, False), (2, False, False), (2, True, False), (2, True, True)
    ]  # fmt: skip
    trained.steps(config.train)
    assert made.stats()["traces"] == traces, "a step waited for a compilation while the clock ran"
