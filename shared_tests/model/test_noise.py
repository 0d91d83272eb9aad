"""Stochastic depth, noise of ternary weights, late untying: bits, keys, the quiet end. Budget: 15 s.

What is drawn is computed here once more, by core.rng.hash32 alone.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from core.check.tolerances import P2_FLOAT64, P3_FLOAT64, relative_rms
from core.config import ConfigError, RunConfig, changed
from core.data.batch import Batch
from core.data.batches import batch_from
from core.data.bundled import BUNDLED
from core.data.dataset import Split
from core.data.tokenizer import Tokenizer
from core.engine.noise import byte_scale, depth_keys, step_key, weight_keys
from core.engine.plan import StepPlan
from core.engine.protocol import Arrays
from core.model.params import param_table
from core.model.storage import decode
from core.rng import hash32, hash_key
from core.training import schedule
from shared_tests import oracle
from shared_tests.support import launches
from shared_tests.support.harness import BACKENDS, batches, call, draw, engine, mini, module, to_device, working_weights
from shared_tests.support.twins import assert_same

pytestmark = pytest.mark.pair
DROP: dict[str, Any] = {"train.depth_drop": 0.6}
TERNARY: dict[str, Any] = {
    "model.matrix_storage": "ternary/64", "train.quantise": "always", "train.ternary_noise": 0.4, "train.warmdown": 0.5,
    "train.quiet": 0.2,
}  # fmt: skip
UNTIED: dict[str, Any] = {"model.head.untied": True, "train.untie_from": 0.5}


def of(*changes: dict[str, Any]) -> RunConfig:
    """Return a run of two layers, the second of which runs twice."""
    config = changed(mini("debug"), {"model.layers": 2, "model.repeat_layers": (1,), "train.batch": 4, "train.seq": 11})
    for change in changes:
        config = changed(config, change)
    return config


def planned(config: RunConfig, step: int, progress: float) -> StepPlan:
    """Return the plan of a step."""
    return schedule.plan(step, progress, config.train)


def device_integers(backend: str, *values: Any) -> list[Any]:
    """Return uint32 numbers of the host as a backend's engine has them."""
    kind = np.uint32 if backend == "mlx" else np.int64
    return [to_device(backend, np.asarray(value, kind), "float32") for value in values]


# What is drawn.


def factors(key: int, first: int, rows: int, drop: float, passes: int) -> np.ndarray:
    """Return what stochastic depth multiplies by, (S, 2, B), in float64."""
    out = np.empty((passes, 2, rows))
    for s in range(passes):
        p = drop * (s + 1) / passes
        for b, name in enumerate(("mixer", "mlp")):
            drawn = hash32(key ^ hash_key(0, 0, f"depth/{s}/{name}"), np.arange(first, first + rows))
            out[s, b] = np.where(drawn >= np.floor(p * 2.0**32), 1 / (1 - p), 0.0)
    return out


def bells(key: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return sums of four random bytes less their mean, over their standard deviation."""
    drawn = hash32(key ^ hash_key(0, 0, name), np.arange(np.prod(shape)))
    return (drawn.view(np.uint8).reshape(-1, 4).astype(np.float64).sum(1) - 510).reshape(shape) / 147.8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_noise_is_equal_on_twins_and_differs_by_step(dtype: str, backend: str) -> None:
    noise, seen = module(backend, "noise"), []
    for step, first in ((0, 0), (1, 0), (1, 5)):
        key = step_key(3, step)
        given = device_integers(backend, key, first)
        drop, keys = to_device(backend, np.array(0.5), dtype), device_integers(backend, depth_keys(4))[0]
        (kept,) = call(backend, lambda *_: noise.kept(given[0], given[1], 64, drop, keys), (), dtype)  # noqa: B023
        expected = factors(key, first, 64, 0.5, 4)
        assert np.array_equal(kept == 0, expected == 0) and relative_rms(kept, expected) < 1e-6
        names, scale = ["one", "two"], to_device(backend, np.array(byte_scale(0.3)), dtype)
        drawn = noise.of_weights(given[0], *device_integers(backend, weight_keys(names)), (7, 9), scale)
        (found,) = call(backend, lambda: drawn, (), dtype)  # noqa: B023
        wanted = np.stack([bells(key, name, (7, 9)) for name in names])
        found = found.reshape(wanted.shape)  # MLX quantises matrices, torch stacks of them
        assert np.array_equal(found, np.round(wanted * 147.8) * byte_scale(0.3)), "no rounding anywhere"
        seen.append((kept, found))
    assert (seen[0][0] != seen[1][0]).any() and (seen[0][1] != seen[1][1]).any()
    assert np.array_equal(seen[1][0][..., 5:], seen[2][0][..., :-5]), "rows have one number, whoever counts from where"
    assert np.array_equal(seen[1][1], seen[2][1])


def test_what_is_drawn_is_fair() -> None:
    """Branches stay as often as they should and are as large in the mean; the noise has mean 0 and deviation 1."""
    many = factors(step_key(0, 7), 0, 40_000, 0.5, 4)
    for s in range(4):
        p = 0.5 * (s + 1) / 4
        assert np.abs((many[s] > 0).mean(1) - (1 - p)).max() < 0.01 and np.abs(many[s].mean(1) - 1).max() < 0.02
    pairs = (many > 0).reshape(8, -1).astype(float)
    assert np.abs(np.corrcoef(pairs) - np.eye(8)).max() < 0.03, "passes and branches are drawn apart"
    drawn = bells(step_key(0, 7), "blocks.0.mlp.up.weight", (200, 200))
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.01
    assert abs(byte_scale(0.3) * 147.8 / 0.3 - 1) < 2**-12 and byte_scale(0.0) == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_codes_of_noisy_weights(dtype: str, backend: str) -> None:
    """round(w / s + noise), with the scale of w alone, on groups that end in mid-row."""
    w, noise = draw("noisy", 2, 5, 70).astype(np.float32) * 0.02, draw("moved", 2, 5, 70).astype(np.float32) * 0.4
    storage = module(backend, "storage")
    for matrix in range(2):
        given = w[matrix], noise[matrix]
        (found,) = call(backend, lambda w, noise: storage.stored(w, "ternary/64", noise=noise), given, dtype)
        (still,) = call(backend, lambda w, noise: storage.stored(w, "ternary/64", noise=0 * noise), given, dtype)
        host = storage.to_host(to_device(backend, w[matrix], dtype), "ternary/64")
        assert host.scales is not None
        assert np.array_equal(still, decode(host, "ternary/64"))
        s = np.repeat(host.scales.astype(np.float64), 64, axis=1)[:, :70]
        codes = np.clip(np.round(w[matrix] / s + noise[matrix]), -1, 1)
        assert np.array_equal(found, (codes * s).astype(np.float32))
        assert (found != still).mean() > 0.1


# What a step does with it.


def loss_of(config: RunConfig, weights: Arrays, batch: Batch, kept: np.ndarray, u: float = 1.0) -> float:
    """Return the loss by the oracle, every row with residual scales of its own: times what its branches get."""
    passes = [stage for stage in config.model.stages(True) if stage.part == "layer"]
    losses = []
    for r, (row, targets) in enumerate(zip(batch.tokens, batch.targets, strict=True)):
        mine = {name: np.array(value, np.float64) for name, value in weights.items()}
        for s, stage in enumerate(passes):
            for b, name in enumerate(("mixer_scale", "mlp_scale")):
                scale = mine[f"{stage.name}.{name}"]
                scale[stage.row if scale.ndim > 1 else slice(None)] *= kept[s, b, r]
        if config.model.head.untied:
            mine["head.weight"] *= u
        logits = oracle.model(config.model, mine, row[None])[0]
        top = logits.max(-1, keepdims=True)
        total = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        losses.append(total - np.take_along_axis(logits, targets[:, None].astype(int), 1)[:, 0])
    return float(np.mean(losses))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_leaves_out_what_is_drawn(backend: str) -> None:
    """Row by row and pass by pass, as the oracle has it: the key is that of the run's seed and the step."""
    config = of(DROP, UNTIED, {"train.z_loss": 0.0})
    weights, batch = working_weights(config.model, 3.0), batches(config, 1)[0]
    found = []
    for step, progress in ((0, 0.2), (1, 0.2), (1, 0.6), (1, 0.95)):
        made, now = engine(backend, config, weights, dtype="float64"), planned(config, step, progress)
        found.append(made.train_step(batch, now).result().loss)
        assert (now.drop, now.untie) == (0.6 if progress < 0.9 else 0.0, float(progress >= 0.5))
        kept = factors(hash_key(config.seed, step, "noise"), 0, 4, now.drop, 3)
        assert found[-1] == pytest.approx(loss_of(config, weights, batch, kept, now.untie), rel=1e-12)
    assert len(set(found)) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_counts_rows_globally(backend: str) -> None:
    """Micro-batches, and a rank with rows from the second on, draw what one pass over all rows draws."""
    config, ends = of(DROP), []
    weights, batch, plan = working_weights(config.model, 3.0), batches(config, 1)[0], planned(config, 0, 0.2)
    for rows in (4, 3, 1):
        made: Any = engine(backend, config, weights, dtype="float64")
        made._rows = lambda seq, rows=rows: rows
        result = made.train_step(batch, plan).result()
        ends.append({**made.params(), "loss": np.array(result.loss)})
    for other in ends[1:]:
        assert all(relative_rms(other[name], value) <= P3_FLOAT64 for name, value in ends[0].items())
    kept = factors(step_key(config.seed, 0), 0, 4, 0.6, 3)
    for first in (0, 1):
        made = engine(backend, config, weights, dtype="float64")
        mine = Batch(batch.tokens[1:3], batch.targets[1:3], 2, first)
        found = made.train_step(mine, plan).result().loss
        assert found == pytest.approx(loss_of(config, weights, mine, kept[..., first : first + 2]), rel=1e-12)


def test_a_ranks_batch_says_where_its_rows_stand() -> None:
    text = Split([np.arange(2, 90, dtype=np.uint16)], Tokenizer.load(str(BUNDLED / "tokenizer.model")))
    whole = batch_from(text, 10, 7, 4, 0)
    for part in (slice(0, 3), slice(3, 7)):
        mine = batch_from(text, 10, 7, 4, 0, part)
        assert (whole.first, mine.first, mine.total) == (0, part.start, 7)
        assert np.array_equal(mine.tokens, whole.tokens[part])


LANES: dict[str, Any] = {"model.repeat_layers": (0,), "model.lanes.start": 1, "train.repeat_from": 0.6}


@pytest.mark.parametrize("changes", [{}, LANES], ids=["stream", "lanes"])
def test_the_twins_take_the_same_noisy_steps(changes: dict[str, Any]) -> None:
    """In two lanes too, and in steps that repeat nothing, which have fewer passes."""
    config, ends = of(DROP, TERNARY, UNTIED, changes), []
    for backend in BACKENDS:
        made = engine(backend, config, working_weights(config.model, 3.0), dtype="float64")
        losses = [
            made.train_step(batch, planned(config, step, (step + 1) / 4)).result().loss
            for step, batch in enumerate(batches(config, 4))
        ]
        ends.append({**made.params(), "losses": np.array(losses)})
    assert_same(ends[0], ends[1], P2_FLOAT64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quiet_end_has_no_noise_and_gap_zero(backend: str) -> None:
    """There a step sees the weights that are stored, all branches, and has the loss that is scored; before it does not.

    Scores, gradients and what is stored know no noise at any time.
    """
    config, plain = of(DROP, TERNARY), of({**TERNARY, "train.ternary_noise": 0.0, "train.quiet": 0.1})
    weights, batch = working_weights(config.model, 3.0), batches(config, 1)[0]
    still = engine(backend, plain, weights, dtype="float64")
    for progress, same in ((0.3, False), (0.7, False), (0.85, True), (1.0, True)):
        made, now = engine(backend, config, weights, dtype="float64"), planned(config, 5, progress)
        assert (now.drop == now.ternary_noise == 0.0) == same
        assert made.logits(batch.tokens).tobytes() == still.logits(batch.tokens).tobytes()
        ours, theirs = made.gradients(batch)[1], still.gradients(batch)[1]
        assert all(value.tobytes() == theirs[name].tobytes() for name, value in ours.items())
        table, stored = param_table(config.model), made.quantised()
        for name, value in made.weights().items():
            assert np.array_equal(value, decode(stored[name], table[name].storage)), name
        scored = float(np.mean(made.nll(batch.tokens, batch.targets)))
        loss = made.train_step(batch, now).result().loss
        assert (abs(loss - scored) <= 1e-13 * scored) == same
    assert planned(config, 0, 0.5).ternary_noise == 0.4 and planned(config, 0, 0.65).ternary_noise == pytest.approx(0.2)
    assert planned(config, 0, 0.8).drop == 0.0, "the quiet share is all of it"
    flat = changed(config, {"train.warmdown": 0.1})
    assert planned(flat, 0, 0.79).ternary_noise == 0.4 and planned(flat, 0, 0.81).ternary_noise == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_of_weights_is_drawn_by_name_and_place(backend: str) -> None:
    """A step whose weights are stored beforehand, with the noise of the test, has the same loss without any."""
    config = of(TERNARY)
    weights, batch, now = working_weights(config.model, 3.0), batches(config, 1)[0], planned(config, 2, 0.2)
    noisy = engine(backend, config, weights, dtype="float64").train_step(batch, now).result().loss
    storage, key, made = module(backend, "storage"), step_key(config.seed, 2), {}
    for name, row in param_table(config.model).items():
        value = weights[name].astype(np.float64)
        host = storage.to_host(to_device(backend, value, "float64"), row.storage)
        made[name] = decode(host, row.storage)
        if row.storage == "ternary/64":
            s = np.repeat(host.scales.astype(np.float64), 64, axis=1)[:, : row.shape[1]]
            drawn = np.round(bells(key, name, row.shape) * 147.8) * byte_scale(0.4)
            made[name] = (np.clip(np.round(value / s + drawn), -1, 1) * s).astype(np.float32)
    never = changed(config, {"train.quantise": "never", "train.ternary_noise": 0.0, "train.quiet": 0.1})
    plain = engine(backend, never, made, dtype="float64").train_step(batch, planned(never, 2, 0.2)).result().loss
    assert noisy == pytest.approx(plain, rel=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_untying_is_continuous(backend: str) -> None:
    """At the switch no bit of the loss changes, before it the head's own vectors keep theirs, behind it they learn."""
    config = of(
        UNTIED, {"model.embedding.storage": "int6/row", "train.quantise": "always", "train.weight_decay_embed": 0.1}
    )
    made, data = engine(backend, config, dtype="float64"), batches(config, 4)
    own, table = (param_table(config.model)[name] for name in ("head.weight", "embed.weight"))
    assert (own.shape, own.group, own.storage) == (table.shape, table.group, "int6/row")
    assert not made.params()["head.weight"].any()
    for step in range(2):
        made.train_step(data[step], planned(config, step, 0.2)).result()
    assert not made.params()["head.weight"].any() and not made.optimizer()["head.weight.m"].any()
    ends = []
    for progress in (0.4999, 0.5):
        again = engine(backend, config, made.params(), dtype="float64")
        again.load_optimizer(made.optimizer())
        now = planned(config, 2, progress)
        scored = again.nll(data[2].tokens, data[2].targets)
        ends.append((now.untie, again.train_step(data[2], now).result().loss, again.params()))
        assert ends[-1][1] == pytest.approx(float(np.mean(scored)), rel=1e-12), "scoring always has both tables"
    assert [u for u, *_ in ends] == [0.0, 1.0] and ends[0][1] == ends[1][1]
    tied, untied = (params for *_, params in ends)
    assert not tied["head.weight"].any() and (untied["head.weight"] != 0).mean() > 0.9
    assert relative_rms(untied["embed.weight"], tied["embed.weight"]) < 1e-3


def test_a_branch_that_may_be_left_out_takes_few_launches() -> None:
    """All factors are drawn at once; a layer of a compiled step in bfloat16 takes six launches more, there and back."""
    plain, totals = mini("debug"), []
    for changes in ({}, {"model.layers": 4}, DROP, {"model.layers": 4, **DROP}):
        totals.append(launches.step(changed(plain, changes))["step"].total())
    more = totals[2] - totals[0], totals[3] - totals[1]
    assert more[0] <= 2 * 6 + 8 and more[1] - more[0] <= 2 * 6, more


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"depth_drop": 1.0}, "depth_drop=1.0: expected from 0 to below 1"),
        ({"depth_drop": -0.1}, "depth_drop=-0.1: expected from 0 to below 1"),
        ({"ternary_noise": -0.1}, "ternary_noise=-0.1: expected a number from 0 up"),
        ({"ternary_noise": 0.1}, "ternary_noise=0.1 moves weights that .* train.quantise=always, not never"),
        ({"ternary_noise": 0.1, "quantise": "always"}, "ternary_noise=0.1: the model has no ternary weights"),
        ({"quiet": 0.2}, "quiet=0.2 ends no noise: it needs a train.depth_drop or a train.ternary_noise"),
        ({"depth_drop": 0.1, "quiet": 0.0}, "quiet=0.0: expected a share above 0 and below 1"),
        ({"depth_drop": 0.1, "quiet": 1.0}, "quiet=1.0: expected a share above 0 and below 1"),
        ({"untie_from": 0.5}, "untie_from=0.5: expected a share below 1, and model.head.untied=True"),
    ],
)  # fmt: skip
def test_what_has_no_use_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^train.{words}"):
        changed(mini("debug"), {f"train.{name}": value for name, value in changes.items()})
    assert dataclasses.replace(of(UNTIED)).train.untie_from == 0.5
