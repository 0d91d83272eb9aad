"""P2: logits and gradients of every preset's mini, backend against backend and against the oracle. Budget: 60 s.

Two cases compile (one per backend): about a minute each on a cold machine.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from core import presets, rng
from core.check.parity import perturbed
from core.check.tolerances import P2_BFLOAT16, P2_FLOAT32, P2_FLOAT64, relative_rms
from core.config import changed
from core.data.batch import Batch
from core.model import params
from core.model.attention import Attention
from core.training import schedule
from shared_tests import oracle
from shared_tests.reference.storage import stored_weights
from shared_tests.support.harness import (
    BACKENDS,
    EVERYTHING,
    HYBRID,
    OPPOSITE,
    batches,
    engine,
    mini,
    minis,
    module,
    reader,
    shortened,
    tokens,
    working_weights,
)
from shared_tests.support.twins import assert_same, by_group, outcome

pytestmark = pytest.mark.pair


@pytest.mark.parametrize("scale", [1.0, 5.0], ids=["cold", "hot"])
@pytest.mark.parametrize("name", shortened(minis()))
def test_the_twins_agree_in_float64(name: str, scale: float) -> None:
    ours, theirs = (outcome(b, mini(name), scale, dtype="float64") for b in BACKENDS)
    assert_same(ours, theirs, P2_FLOAT64)


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.long), 5.0], ids=["cold", "hot"])
@pytest.mark.parametrize("name", shortened(minis()))
def test_the_twins_agree_in_float32(name: str, scale: float) -> None:
    config = mini(name)
    ours, theirs = (by_group(outcome(b, config, scale, dtype="float32"), config) for b in BACKENDS)
    assert_same(ours, theirs, P2_FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", shortened(minis()))
def test_logits_equal_the_oracle(name: str, backend: str) -> None:
    config = mini(name)
    weights = working_weights(config.model, 1.0)
    tokens = batches(config, 1)[0].tokens
    got = reader(backend, config, 1.0, dtype="float64").logits(tokens)
    used = stored_weights(config.model, weights) if config.train.quantise == "always" else weights
    assert relative_rms(got, oracle.model(config.model, used, tokens)) <= P2_FLOAT64


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_alone_with_a_bank_equals_the_oracle(backend: str) -> None:
    config = mini("tiny")
    config = dataclasses.replace(config, model=changed(config.model, {"bank.at": "both", "skc.block": 8}))
    weights, rows = working_weights(config.model, 1.0), batches(config, 1)[0].tokens
    got = engine(backend, config, weights, dtype="float64").logits(rows)
    assert relative_rms(got, oracle.model(config.model, weights, rows)) <= P2_FLOAT64


@pytest.mark.long
@pytest.mark.parametrize("name", presets.PRESETS)
def test_the_real_size_runs_forward_once_and_agrees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = presets.get(name).config
    rows = tokens("real size", 1, 48, config.model.vocab, config.model.bos)
    draws = rng.normal(0, "real size", 1_000_003)
    # The same draws over and over, from places of their own: new ones for every weight would take most of the time.
    start = functools.partial(rng.below, limit=len(draws))
    monkeypatch.setattr(rng, "normal", lambda seed, name, count: np.resize(np.roll(draws, start(seed, name)), count))
    weights = perturbed(config.model, 0, 1.0)
    ours, theirs = (engine(b, config, weights, dtype="float32").logits(rows) for b in BACKENDS)
    assert relative_rms(ours, theirs) <= P2_FLOAT32


@pytest.mark.parametrize("backend", BACKENDS)
def test_fast_and_exact_models_agree_in_float32(backend: str) -> None:
    config = mini("tiny")
    runs = (outcome(backend, config, 1.0, dtype="float32", exact=form) for form in (False, True))
    fast, exact = (by_group(run, config) for run in runs)
    assert_same(fast, exact, P2_FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", shortened(minis()))
def test_bfloat16_computes_the_same_model_with_float32_masters(name: str, backend: str) -> None:
    config = mini(name)
    weights, batch = working_weights(config.model, 1.0), batches(config, 1)[0]
    wide, narrow = (engine(backend, config, weights, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert relative_rms(narrow.logits(batch.tokens), wide.logits(batch.tokens)) <= P2_BFLOAT16
    assert relative_rms(narrow.nll(batch.tokens, batch.targets), wide.nll(batch.tokens, batch.targets)) <= P2_BFLOAT16
    assert narrow.logits(batch.tokens).dtype == np.float32
    narrow.train_step(batch, schedule.plan(0, 0.5, config.train)).result()
    for key, value in narrow.params().items():
        assert value.dtype == np.float32 and not np.array_equal(value, wide.params()[key]), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_stay_narrow_up_to_the_cross_entropy(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias in float32 would widen them: twice their memory, and twice what the kernel reads and writes."""
    config, ops, seen = mini("ternary_74m"), module(backend, "ops"), []
    made, batch = engine(backend, config, dtype="bfloat16"), batches(config, 1)[0]
    assert config.model.head.bias
    costs = ops.cross_entropy
    monkeypatch.setattr(
        ops, "cross_entropy", lambda x, *given: seen.append((str(x.dtype), len(given))) or costs(x, *given)
    )
    made.gradients(batch)
    made.nll(batch.tokens, batch.targets)
    assert len(seen) == 2 and all("bfloat16" in dtype and given == 4 for dtype, given in seen), seen


# torch imports its compiler's parts under names it has itself deprecated.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backend, name", [*((backend, "debug") for backend in BACKENDS), ("mlx", OPPOSITE)])
def test_compiled_and_eager_agree(backend: str, name: str) -> None:
    config = mini(name)
    results, weights = [], []
    for compiled in (False, True):
        made = engine(backend, config, working_weights(config.model, 1.0), dtype="float32", compile=compiled)
        run = batches(config, 3)
        for step, batch in enumerate(run):
            results.append(made.train_step(batch, schedule.plan(step, 0.5, config.train)).result().loss)
        weights.append(made.params())
        if compiled:
            parts = {"mlx": 1, "cuda": 1 + len(params.banks(config.model))}  # the whole; loss and each bank
            assert made.stats()["traces"] == parts[backend], "one compilation of each part per shape"
    assert np.allclose(results[:3], results[3:], rtol=0, atol=P2_FLOAT32)
    assert_same(weights[1], weights[0], 10 * P2_FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", shortened(minis()))
def test_every_parameter_gets_a_gradient_within_two_steps(name: str, backend: str) -> None:
    config = mini(name)
    made, live = engine(backend, config, dtype="float32"), set()
    for step, batch in enumerate(batches(config, 2)):
        for key, g in made.gradients(batch)[1].items():
            scales = key.endswith(("_scale", "_mix"))  # one row per pass: each must learn
            live |= (
                {key}
                if (np.abs(g).reshape(-1, config.model.dim).max(1).min() if scales else np.abs(g).max()) > 0
                else set()
            )
        made.train_step(batch, schedule.plan(step, 0.5, config.train)).result()
    assert live == set(made.params())


@pytest.mark.parametrize("seq", [1, 5])
@pytest.mark.parametrize("name", ["tiny", "ternary_74m", "skc_mac", EVERYTHING])
def test_one_layer_trains(name: str, seq: int) -> None:
    """The twins take the same steps where there is nothing to skip to, and parameters of 0 rows would be."""
    config = mini(name)
    alone: dict[str, Any] = {"layers": 1, "shared_blocks": None, "repeat_layers": (), "engram.layer": 0}
    alone["feedback.width"] = 0
    alone["bank.at"] = "none" if config.model.bank.at == "none" else "head"
    alone |= {"value_embed.dim": 0, "value_embed.layers": ()}
    alone |= {"experts.start": 0.0} if config.model.experts.count else {}
    if config.model.kind(0) != "attention":  # then no setting may be on that only attention has a use for
        alone |= {f"attention.{name}": getattr(Attention, name) for name in ("conv", "xsa", "xsa_layers", "head_gate")}
        alone |= {f"attention.{name}": getattr(Attention, name) for name in ("head_gate_width", "head_gate_scale")}
        alone |= {f"attention.{name}": getattr(Attention, name) for name in ("head_width", "output_gate")}
    config = dataclasses.replace(
        config,
        model=changed(config.model, alone),
        train=dataclasses.replace(config.train, batch=2, seq=seq, repeat_from=0.0),
    )
    assert all(row.size for row in params.param_table(config.model).values())
    ends = []
    for backend in BACKENDS:
        made = engine(backend, config, working_weights(config.model, 1.0), dtype="float64")
        for step, batch in enumerate(batches(config, 2)):
            made.train_step(batch, schedule.plan(step, 0.5, config.train)).result()
        ends.append(made.params())
    assert_same(ends[0], ends[1], P2_FLOAT64)


@pytest.mark.parametrize("name", ["tiny", "ablate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_give_the_gradient_of_the_whole(backend: str, name: str) -> None:
    config = mini(name)
    small = dataclasses.replace(config, train=dataclasses.replace(config.train, micro_batch=1))
    ends = []
    for c in (config, small):
        made = engine(backend, c, working_weights(config.model, 1.0), dtype="float64")
        for step, batch in enumerate(batches(config, 3)):
            result = made.train_step(batch, schedule.plan(step, 0.5, config.train)).result()
        ends.append(
            {**made.params(), **made.optimizer(), "loss": np.array(result.loss), "norm": np.array(result.grad_norm)}
        )
    assert_same(ends[1], ends[0], P2_FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(backend: str) -> None:
    config = mini("debug")
    weights = working_weights(config.model, 1.0)
    made = engine(backend, config, weights, dtype="float32")
    batch = batches(config, 1)[0]
    assert made.train_step(batch, schedule.plan(0, 0.5, config.train)).result().finite
    before = {**made.params(), **made.optimizer()}
    poisoned = dict(made.params())
    poisoned["head.bias"] = np.full_like(poisoned["head.bias"], np.nan)
    made.load_params(poisoned)
    result = made.train_step(batch, schedule.plan(1, 0.5, config.train)).result()
    assert not result.finite
    after = {**made.params(), **made.optimizer()}
    for key, value in before.items():
        if key != "head.bias":
            assert np.array_equal(after[key], value), key


@pytest.mark.parametrize("name", ["tiny", "skc_mac", HYBRID, EVERYTHING])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_do_not_depend_on_their_neighbours(backend: str, name: str) -> None:
    from core.check.tolerances import CAUSAL

    config = mini(name)
    made = reader(backend, config, 1.0, dtype="float64")
    batch = Batch(*batches(config, 1)[0])
    together = made.logits(batch.tokens)
    for row in range(len(batch.tokens)):
        alone = made.logits(batch.tokens[row : row + 1])
        assert np.abs(alone[0] - together[row]).max() <= CAUSAL


@pytest.mark.parametrize(
    "name", [OPPOSITE, *(pytest.param(name, marks=pytest.mark.long) for name in ("delta_ablate", EVERYTHING))]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_torch_compile_sees_the_step_as_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph break would send the step back to Python on a GPU; nothing is compiled here."""
    import torch

    config = mini(name)
    model = dataclasses.replace(config.model, repeat_layers=config.model.repeat_layers[:1])
    train = dataclasses.replace(config.train, batch=2, seq=12)
    config = dataclasses.replace(config, model=model, train=train)
    for recurrence in ("scan", "delta"):  # two chunks: every branch, in a third of the operations
        monkeypatch.setattr(module("cuda", recurrence), "CHUNK", 8)
    made: Any = engine("cuda", config, working_weights(config.model, 1.0), dtype="float32")
    objective, arguments = made.trace(batches(config, 1)[0])
    found = torch._dynamo.explain(objective)(*arguments)
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
