"""Forms of the trunk: residuals, lanes, skips and repeats, held to the oracle on both backends. Budget: 10 s."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from core import presets
from core.check.tolerances import CAUSAL, P2_BFLOAT16, P2_FLOAT64, relative_rms
from core.config import ModelConfig, RunConfig, changed
from core.engine.protocol import Arrays
from core.model.params import param_table
from core.training import schedule
from shared_tests import oracle
from shared_tests.support.harness import BACKENDS, batches, engine, module, reader, tokens, working_weights
from shared_tests.support.twins import assert_same

pytestmark = pytest.mark.pair
TINY: dict[str, Any] = {
    "vocab": 29, "dim": 16, "layers": 5, "attention.heads": 2, "attention.kv_heads": 1, "attention.rope_dims": 4,
    "mlp.hidden": 12, "residual_mix": True, "depth_damping": True,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "parallel": {"layers": 3, "blocks": ("attention", "attention_parallel"), "skips.on": True},
    "gated, shared and repeated": {"blocks": ("attention_gated",), "shared_blocks": 2, "repeat_layers": (1, 2)},
    "lanes behind a loop": {
        "lanes.start": 3, "repeat_layers": (1, 2), "repeat_times": 2, "repeat_scales": "shared",
        "skips.on": True, "skips.gates": True, "skips.over": "passes",
    },
    "at once": {
        "blocks": ("attention",) * 3 + ("attention_gated",) * 2, "repeat_layers": (1, 2), "repeat_order": "at_once",
        "repeat_scales": "shared", "repeat_blend": True, "skips.on": True,
    },
    "own scales": {
        "layers": 4, "shared_blocks": 2, "repeat_layers": (1, 2), "repeat_times": 2, "repeat_blend": True,
        "skips.on": True, "skips.over": "passes",
    },
    "corrected": {
        "repeat_layers": (1, 2), "repeat_times": 2, "repeat_scales": "shared", "skips.on": True, "feedback.width": 3,
    },
    "corrected, mirrored": {
        "shared_blocks": 3, "share_order": "mirror", "repeat_layers": (2, 3, 4), "feedback.width": 3,
        "blocks": ("attention", "attention_gated", "attention_parallel", "attention_gated", "attention"),
    },
}  # fmt: skip
"""The second is the form of lanes, loop and skips that the records have, the third that of blended repeats."""
LOOPED = [name for name, changes in CASES.items() if "repeat_layers" in changes]
SEQ = 23


def of(changes: dict[str, Any]) -> RunConfig:
    """Return a run of a tiny model, whose repeats are off in the first half."""
    config = presets.mini(presets.get("debug").config)
    model = changed(ModelConfig(), TINY | changes)
    train = dataclasses.replace(config.train, batch=2, seq=SEQ, repeat_from=0.5 if model.repeat_layers else 0.0)
    return dataclasses.replace(config, model=model, train=train)


def read(changes: dict[str, Any], backend: str, rows: np.ndarray, **weights: Any) -> np.ndarray:
    """Return the logits of a tiny model with working weights, of which some are others."""
    config = of(changes)
    given = dict(working_weights(config.model, 3.0))
    for name, value in weights.items():
        places = [key for key in given if key == name or key.endswith(f".{name}")]
        assert places, name
        given |= {key: np.broadcast_to(np.float32(value), given[key].shape).copy() for key in places}
    return engine(backend, config, given, dtype="float64").logits(rows)


def text(name: str, rows: int = 2, documents: bool = True) -> np.ndarray:
    return tokens(f"trunk/{name}", rows, SEQ, 29, 1, documents)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_oracle(name: str, backend: str) -> None:
    """And every vector that a form has matters to it, in each of its rows that are in use."""
    config, rows = of(CASES[name]), text(name)
    weights = working_weights(config.model, 3.0)
    got = reader(backend, config, 3.0, dtype="float64").logits(rows)
    assert relative_rms(got, oracle.model(config.model, weights, rows)) <= P2_FLOAT64
    gradients = reader(backend, config, 3.0, dtype="float64").gradients(batches(config, 1)[0])[1]
    for key, found in gradients.items():
        if key.endswith(("scale", "mix", "gate", "blend")) or key.startswith(("skips", "lanes")):
            used = [i for i in range(len(found)) if "lanes" not in key or i >= (config.model.lanes.start or 0)]
            sizes = np.abs(found).reshape(len(found), -1).max(1)
            assert (sizes[used] > 1e-9).all() and np.count_nonzero(sizes) >= len(used), key
            assert "lanes" not in key or not sizes[: config.model.lanes.start].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_no_token_sees_a_later_one_or_another_document(name: str, backend: str) -> None:
    """Every flip in a row of its own; a prefix alone; and what stands before a document."""
    logits = reader(backend, of(CASES[name]), 3.0, dtype="float64").logits
    row = text(name, 1, documents=False)
    row[0, 14] = 1
    base = np.repeat(row, SEQ, axis=0)
    flipped = base.copy()
    np.fill_diagonal(flipped, (row[0] + 7) % 29)
    before = logits(base)
    effect = np.abs(logits(flipped) - before).max(-1)
    assert not np.tril(effect, -1).any() and (np.diagonal(effect) > 1e-9).all()
    assert not effect[:14, 14:].any() and (effect[2:13, 13] > 1e-12).all()
    for k in (1, 8, 15):
        assert np.abs(logits(row[:, :k]) - before[:1, :k]).max() <= CAUSAL


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_decoding_in_chunks_equals_the_whole(name: str, backend: str) -> None:
    """Every pass keeps its own keys: of each chunk some tokens are kept."""
    made, rows = reader(backend, of(CASES[name]), 3.0, dtype="float64"), text(name)
    whole, state, begin = made.logits(rows), made.start(2), 0
    for size, keep in ((5, 5), (1, 1), (9, 4), (3, 2), (1, 1), (10, 10)):
        tape = made.chunk(state, rows[:, begin : begin + size])
        assert np.abs(tape.logits()[:, :keep] - whole[:, begin : begin + keep]).max() <= CAUSAL
        state, begin = made.commit(tape, keep), begin + keep
    assert begin == SEQ and all(kept is not None for kept in state.model.parts if kept is not None)
    passes = sum(kept is not None for kept in state.model.parts)
    assert passes == sum(stage.part == "layer" for stage in of(CASES[name]).model.stages(True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["lanes behind a loop", "at once"])
def test_the_stream_stays_narrow_in_bfloat16(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share in float32 would widen it from there up to the logits, and with it what a step keeps."""
    config, ops, seen = of(CASES[name]), module(backend, "ops"), []
    weights, batch = working_weights(config.model, 1.0), batches(config, 1)[0]
    wide, narrow = (engine(backend, config, weights, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert relative_rms(narrow.logits(batch.tokens), wide.logits(batch.tokens)) <= P2_BFLOAT16
    costs = ops.cross_entropy
    monkeypatch.setattr(ops, "cross_entropy", lambda x, *given: seen.append(str(x.dtype)) or costs(x, *given))
    narrow.nll(batch.tokens, batch.targets)
    assert len(seen) == 1 and seen[0].endswith("bfloat16")


@pytest.mark.parametrize("name", CASES)
def test_the_twins_take_the_same_steps_before_and_after_the_switch(name: str) -> None:
    """And one that was stopped in front of it takes up where it was."""
    config = of(CASES[name])
    data, ends = batches(config, 2), []
    plans = [schedule.plan(step, progress, config.train) for step, progress in enumerate((0.25, 0.75))]
    assert [plan.repeat for plan in plans] == ([False, True] if name in LOOPED else [True, True])
    for backend in BACKENDS:
        made = engine(backend, config, working_weights(config.model, 3.0), dtype="float64")
        loss = made.train_step(data[0], plans[0]).result().loss
        again = engine(backend, config, made.params(), dtype="float64")
        again.load_optimizer(made.optimizer())
        losses = [np.array(one.train_step(data[1], plans[1]).result().loss) for one in (made, again)]
        assert losses[0] == losses[1]
        ends.append({**made.params(), **made.optimizer(), "first": np.array(loss), "second": losses[0]})
        for key, value in {**again.params(), **again.optimizer()}.items():
            assert value.tobytes() == ends[-1][key].tobytes(), key
    assert_same(ends[0], ends[1], P2_FLOAT64)


def without(model: ModelConfig, weights: Arrays) -> tuple[ModelConfig, Arrays]:
    """Return the model that there is while repeats are off, made of its own settings, with its rows of the weights."""
    fewer = {"repeat_layers": (), "repeat_times": 1, "repeat_scales": "own", "repeat_order": "after"}
    fewer |= {"feedback.width": 0}
    bare = changed(model, {**fewer, "repeat_blend": False, "skips.over": "layers"})
    kept = {}
    for name, row in param_table(bare).items():
        value = weights[name]
        kept[name] = value[0] if value.ndim > len(row.shape) else value[: row.shape[0]]
    return bare, kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOOPED)
def test_before_the_switch_it_is_the_model_without_repeats(name: str, backend: str) -> None:
    """Of skips over passes with the first rows; of the whole depth the loss is another."""
    config = of(CASES[name])
    weights, batch = working_weights(config.model, 3.0), batches(config, 1)[0]
    losses = {}
    for repeat, (model, rows) in {True: (config.model, weights), False: without(config.model, weights)}.items():
        logits = oracle.model(model, rows, batch.tokens)
        top = logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits - top, batch.targets[..., None].astype(int), -1)
        losses[repeat] = float(np.mean(np.log(np.exp(logits - top).sum(-1, keepdims=True)) - chosen))
        made = engine(backend, config, weights, dtype="float64")
        plan = schedule.plan(0, 0.75 if repeat else 0.25, config.train)
        assert made.train_step(batch, plan).result().loss == pytest.approx(losses[repeat], rel=1e-10)
    assert abs(losses[True] - losses[False]) > 1e-4


def test_a_gradient_that_only_repeats_have_is_sent_too() -> None:
    """Ranks wait for every gradient: while repeats are off, that of their blend is 0, and each is sent once."""
    import torch

    config = of(CASES["at once"])
    made: Any = engine("cuda", config, working_weights(config.model, 3.0), dtype="float64")
    weights, batch = made._trained(made._params, False), batches(config, 1)[0]
    for repeat in (False, True):
        sent: list[tuple[str, Any]] = []
        *_, grads = made._gradient(weights, batch, slice(None), repeat, lambda *given, to=sent: to.append(given))
        assert sorted(name for name, _ in sent) == sorted(made.params())
        assert all(grad.shape == weights[name].shape for name, grad in sent)
        assert bool(torch.count_nonzero(grads["blocks.1.blend"])) == repeat


@pytest.mark.parametrize("backend", BACKENDS)
def test_lanes_that_write_everything_are_parallel_layers(backend: str) -> None:
    """Lanes that are written to alike stay equal; of lanes that have a branch each, the mean has half of each."""
    rows, plain = text("lanes"), {"residual_mix": False, "layers": 3}
    parallel = read({**plain, "blocks": ("attention_parallel",)}, backend, rows)
    lanes = read({**plain, "lanes.start": 0}, backend, rows, **{"lanes.write": 1.0, "lanes.keep": 1.0})
    assert relative_rms(lanes, parallel) <= P2_FLOAT64
    blocks = ("attention", "attention", "attention_parallel")
    halves = {"blocks.2.mixer_scale": 0.3, "blocks.2.mlp_scale": 0.7}
    parallel = read({**plain, "blocks": blocks}, backend, rows, **halves)
    apart = {"lanes.write": np.eye(2), "lanes.keep": 1.0}
    twice = {name: 2 * value for name, value in halves.items()}
    lanes = read({**plain, "lanes.start": 2}, backend, rows, **apart, **twice)
    assert relative_rms(lanes, parallel) <= P2_FLOAT64
    assert relative_rms(read({**plain, "lanes.start": 2}, backend, rows, **apart, **halves), parallel) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_shut_is_not_there(backend: str) -> None:
    """A skip whose gate keeps all of the stream; a repeat of which nothing is blended in, or all; a gate of a half."""
    rows = text("shut")
    bare = read({"skips.on": False}, backend, rows)
    skips = {"skips.on": True, "skips.gates": True}
    assert relative_rms(read(skips, backend, rows, **{"skips.gate": 99.0}), bare) < 1e-12
    assert relative_rms(read(skips, backend, rows, **{"skips.gate": -99.0}), bare) > 1e-3
    twice: dict[str, Any] = {"repeat_layers": (1, 2), "repeat_scales": "shared"}
    blended = {**twice, "repeat_blend": True}
    assert relative_rms(read(blended, backend, rows, blend=0.0), bare) < 1e-12
    assert relative_rms(read(blended, backend, rows, blend=1.0), read(twice, backend, rows)) < 1e-12
    gated, halved = {"blocks": ("attention_gated",)}, {"mixer_scale": 0.5, "mlp_scale": 0.5}
    parallel = read({"blocks": ("attention_parallel",)}, backend, rows, **halved)
    assert relative_rms(read(gated, backend, rows, gate=0.5, mixer_scale=1.0, mlp_scale=1.0), parallel) < 1e-12


@pytest.mark.long
@pytest.mark.parametrize("name", ["lanes behind a loop", "at once"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_torch_compile_sees_one_graph(name: str) -> None:
    import torch

    config = of(CASES[name])
    made: Any = engine("cuda", config, working_weights(config.model, 1.0), dtype="float32")
    objective, arguments = made.trace(batches(config, 1)[0])
    found = torch._dynamo.explain(objective)(*arguments)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
