"""Experts: oracle, forms, router, dormant ones, planted leaks, loss of balance, switch, counts. Budget: 25 s."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from core import presets
from core.check.parity import teacher_forced
from core.check.tolerances import CAUSAL, P2_FLOAT64, P4_FLIPS, P4_TEACHER, relative_rms
from core.config import ConfigError, ModelConfig, RunConfig, changed, from_json
from core.model.params import param_table, start_values
from core.model.shares import shares
from core.training import schedule
from shared_tests import oracle
from shared_tests.reference import optim as reference
from shared_tests.support.harness import (
    BACKENDS,
    batches,
    call,
    draw,
    engine,
    gradients,
    module,
    to_device,
    to_numpy,
    tokens,
)
from shared_tests.support.harness import working_weights as working
from shared_tests.support.one_layer import check_reading_back
from shared_tests.support.sleepers import SLEEPER, TINY, kept, sleeping
from shared_tests.support.sleepers import run_with as of

pytestmark = pytest.mark.pair
CASES: dict[str, dict[str, Any]] = {
    "one of four, in the upper layer": {},
    "two of three beside a shared one, everywhere": {
        "experts.count": 3, "experts.active": 2, "experts.shared": 5, "experts.start": 0.0, "output_norm": "gain",
    },
    "all, of other kinds, shared and repeated": {
        "layers": 6, "blocks": ("koopman", "attention_gated"), "shared_blocks": 4, "repeat_layers": (3, 4),
        "experts.active": 4, "experts.start": 0.5, "depth_damping": True, "output_norm": "plain",
    },
    "in lanes": {"layers": 4, "lanes.start": 1, "mlp.activation": "leaky_relu2", "experts.start": 0.7},
}  # fmt: skip
RULES = ("adamw", "muon")


def steps(made: Any, config: RunConfig, count: int, **changes: Any) -> list[Any]:
    """Train for some steps in the middle of a run and return their results."""
    plan = dataclasses.replace(schedule.plan(3, 0.5, config.train), **changes)
    return [made.train_step(batch, plan).result() for batch in batches(config, count)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_the_right_layers_equal_the_oracle(name: str, backend: str) -> None:
    config, rows = of(CASES[name]), tokens(name, 2, 23, 29, 1)
    weights = working(config.model, 5.0)
    made = engine(backend, config, weights, dtype="float64")
    assert relative_rms(made.logits(rows), oracle.model(config.model, weights, rows)) <= P2_FLOAT64
    passes = made.routes(rows)
    assert passes.shape[1:] == (2, 23, config.model.experts.active) and set(np.unique(passes)) == set(
        range(config.model.experts.count)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [{}, {"experts.active": 2, "experts.shared": 5}], ids=["one", "two"])
def test_one_layer_reads_back(settings: dict[str, Any], backend: str) -> None:
    one = {name: value for name, value in TINY.items() if name != "koopman.dim"} | {"layers": 1, "experts.start": 0.0}
    check_reading_back(one | settings, "experts", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_the_grouped_form_is_the_dense_one(name: str, backend: str) -> None:
    """Logits and all gradients; the rows of an expert fill blocks of 32 or 16, the last in part."""
    config = of(CASES[name])
    weights, batch = working(config.model, 2.0), batches(config, 1)[0]
    dense, grouped = (engine(backend, config, weights, dtype="float32", exact=exact) for exact in (True, False))
    assert np.array_equal(dense.routes(batch.tokens), grouped.routes(batch.tokens))
    assert relative_rms(grouped.logits(batch.tokens), dense.logits(batch.tokens)) <= 1e-6
    (ours, mine), (theirs, other) = dense.gradients(batch), grouped.gradients(batch)
    assert abs(ours - theirs) <= 1e-6
    for key, grad in mine.items():
        assert relative_rms(other[key], grad) <= 2e-5, key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count, rows", [(3, 1), (3, 7), (4, 64), (5, 333), (2, 300)])
def test_rows_lie_in_blocks_of_one_expert(count: int, rows: int, backend: str) -> None:
    routing = module(backend, "routing")
    expert = (np.abs(draw(f"experts/{count}/{rows}", rows)) * 2).astype(np.int32) % count
    for wanted in (expert, np.full_like(expert, count - 1)):  # and the others get nothing
        row, place, owner = call(backend, lambda x: tuple(routing.blocks(x, count)), (wanted,), "float32")
        size, x, weight = len(row) // len(owner), draw("rows", rows, 6), draw("weights", count, 5, 6)
        assert (row[place] == np.arange(rows)).all() and np.sum(row >= 0) == rows
        assert (np.diff(owner) >= 0).all() and (owner[place // size] == wanted).all()

        def products(x: Any, weight: Any, row: Any, place: Any, owner: Any) -> Any:
            return routing.moved(routing.products(routing.moved(x, row, place), weight, owner), place, row)

        (y,) = call(backend, products, (x, weight, row, place, owner), "float32")
        assert np.abs(y - np.einsum("ni,noi->no", x, weight[wanted])).max() <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_index(backend: str) -> None:
    p = np.array([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.4, 0.1], [0.0, 0.0, 1.0, 0.0], [0.2, 0.5, 0.1, 0.2]])
    (found,) = call(backend, module(backend, "routing").ranks, (p,), "float32")
    assert found.tolist() == [[0, 1, 2, 3], [2, 0, 1, 3], [1, 2, 0, 3], [1, 0, 3, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_overflows_is_told_and_changes_nothing(backend: str) -> None:
    """Probabilities that are no numbers send tokens to experts that there are; the guard does the rest."""
    config = of({"experts.active": 2})
    weights = working(config.model, 2.0)
    weights["blocks.1.mixer_scale"] = np.full_like(weights["blocks.1.mixer_scale"], np.nan)
    made = engine(backend, config, weights, dtype="float32", exact=False)
    assert made.routes(batches(config, 1)[0].tokens).max() < 4
    (result,) = steps(made, config, 1)
    assert not result.finite
    assert all(np.array_equal(value, weights[name], equal_nan=True) for name, value in made.params().items())


# The router.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("active", [1, 2])
def test_router_gets_a_gradient_with_one_expert(active: int, backend: str) -> None:
    """From the cross-entropy alone, from the second step on: at first every expert puts out 0."""
    config = of({"experts.active": active}, router_balance=0.0)
    made, batch = engine(backend, config, dtype="float64"), batches(config, 1)[0]
    name = "blocks.1.mlp.router"
    assert not made.gradients(batch)[1][name].any()
    steps(made, config, 1)
    assert np.abs(made.gradients(batch)[1][name]).max() > 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_one_expert_is_that_of_log_p(backend: str) -> None:
    """The weight itself is exactly 1, whatever p is."""
    weights, p = module(backend, "parts.experts").weights, np.array([[[0.7, 0.1, 0.2], [0.3, 0.3, 0.4]]])
    chosen = p == p.max(-1, keepdims=True)
    (found,) = call(backend, lambda p, chosen: weights(p, chosen, 1), (p, chosen), "float32")
    assert np.array_equal(found, chosen)
    (two,) = call(backend, lambda p, chosen: weights(p, chosen, 2), (p, p > 0.15), "float64")
    assert np.allclose(two, [[[7 / 9, 0, 2 / 9], [0.3, 0.3, 0.4]]], rtol=0, atol=1e-15)
    for k, total in ((1, 0.7), (2, 0.9)):  # of two, p / sum p: its gradient says which of them should have more
        given, towards = (p[:, :1], p[:, :1] > 0.65 if k == 1 else p[:, :1] > 0.15), np.array([[[1.0, 2.0, 3.0]]])
        found = gradients(backend, lambda p, chosen, k=k: weights(p, chosen, k), given, [towards], "float64")
        wanted = [1 / 0.7, 0, 0] if k == 1 else [(1 - 13 / 9) / total, 0, (3 - 13 / 9) / total]
        assert np.allclose(next(iter(found.values())), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", ["mlx", pytest.param("cuda", marks=pytest.mark.long)])
def test_every_expert_is_used_after_two_hundred_steps(backend: str) -> None:
    config = of({}, lr_vector=1e-2, batch=2, seq=16)
    made = engine(backend, config, dtype="float32", exact=False)
    data = batches(config, 20)
    for step in range(200):
        made.train_step(data[step % 20], schedule.plan(step, 0.5, config.train)).result()
    (route,) = made.routes(np.concatenate([batch.tokens for batch in data]))
    assert np.bincount(route.ravel(), minlength=4).min() / route.size > 0.05


# Dormant experts.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_dormant_expert_keeps_its_bits_and_wakes_up(rule: str, backend: str) -> None:
    """Weights and moments, with decay on, until its first token; test_ranks.py has two ranks."""
    config, weights = sleeping(rule)
    made = engine(backend, config, weights, dtype="float32", exact=False)
    before = made.params() | made.optimizer()
    assert all(result.finite for result in steps(made, config, 20))
    asleep = made.params() | made.optimizer()
    bits = kept(before, asleep)
    assert len(bits) == (4 if rule == "muon" else 6)
    assert all(same == [e == SLEEPER for e in range(4)] for same in bits.values()), bits
    router = made.params()["blocks.1.mlp.router"]
    router[SLEEPER] *= -1.0
    made.load_params(made.params() | {"blocks.1.mlp.router": router}, True)
    steps(made, config, 1)
    assert not any(same[SLEEPER] for same in kept(asleep, made.params() | made.optimizer()).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_muon_updates_each_expert_by_itself(backend: str) -> None:
    config = of({}, matrix_rule="muon", clip=None, muon_scale="rms")
    made = engine(backend, config, working(config.model, 1.0), dtype="float64")
    before, grads = made.params(), made.gradients(batches(config, 1)[0])[1]
    plan = schedule.plan(3, 0.5, config.train)
    steps(made, config, 1)
    for name in ("blocks.1.mlp.up.weight", "blocks.1.mlp.down.weight", "blocks.0.mlp.up.weight"):
        count = param_table(config.model)[name].slices
        assert count == (4 if name.startswith("blocks.1") else 1)
        old, grad = (np.split(arrays[name].astype(np.float64), count) for arrays in (before, grads))
        numbers = (plan.lr_matrix, plan.decay_matrix, plan.momentum, config.train)
        new = [reference.muon(a, [g], *numbers)[0] for a, g in zip(old, grad, strict=True)]
        # A change of 1e-4 or so: what differs by a matrix that is updated whole is as large as the change.
        assert np.abs(made.params()[name] - np.concatenate(new)).max() <= 1e-6 * np.abs(before[name]).max(), name
        whole = reference.muon(before[name].astype(np.float64), [grads[name]], *numbers)[0]
        assert count == 1 or np.abs(made.params()[name] - whole).max() > 1e-5


# Planted leaks: what the original's experts did.


def planted(rule: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an expert take no more than its part of all tokens: the first, the most probable, or by its own choice."""

    def leaky(p_BTE: Any, chosen_BTE: Any, active: int) -> Any:
        p, chosen = (to_numpy(x).reshape(-1, x.shape[-1]) for x in (p_BTE, chosen_BTE))
        room, taken = -(-len(p) // p.shape[1]), np.zeros_like(chosen)
        for e in range(p.shape[1]):
            wanted = np.flatnonzero(chosen[:, e]) if rule != "choice" else np.arange(len(p))
            if rule != "order":
                wanted = wanted[np.argsort(-p[wanted, e], kind="stable")]
            taken[wanted[:room], e] = True
        return to_device(backend, (p * taken).reshape(p_BTE.shape), "float64")

    monkeypatch.setattr(module(backend, "parts.experts"), "weights", leaky)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", ["honest", "order", "probability", "choice"])
def test_capacity_and_expert_choice_are_leaks(rule: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an expert has room for depends on other tokens: of the row's future, of other rows, of other documents."""
    config = of({"experts.active": 2} if rule == "honest" else {})
    if rule != "honest":
        planted(rule, backend, monkeypatch)
    logits = engine(backend, config, working(config.model, 5.0), dtype="float64").logits
    rows = tokens("leaks", 3, 40, 29, 1, documents=False)
    rows[:, 17] = 1
    whole, flips, later = logits(rows), [0.0], [0.0]
    for place in range(5, 40, 6):
        other = rows.copy()
        other[:, place] = (rows[:, place] + 3) % 27 + 2
        effect = np.abs(logits(other) - whole).max(axis=(0, 2))
        flips.append(effect[:place].max())
        later.append(effect[17:].max() if place < 17 else 0.0)
    alone = max(np.abs(logits(rows[i : i + 1])[0] - whole[i]).max() for i in range(3))
    prefix = max(np.abs(logits(rows[:, :k]) - whole[:, :k]).max() for k in (9, 16, 33))
    if rule == "honest":
        assert max(flips) == max(later) == 0.0 and max(alone, prefix) <= CAUSAL
        return
    assert min(max(flips), alone, prefix) > 1e-3
    assert max(later) > 1e-3 or rule == "probability"


def test_capacity_is_refused() -> None:
    for name in ("capacity", "capacity_factor", "choice"):
        with pytest.raises(ConfigError, match=rf"^m.experts.{name}: unknown key"):
            from_json(ModelConfig, {"experts": {"count": 4, "hidden": 8, name: 1.0}}, "m")


# The loss of balance.


@pytest.mark.parametrize("backend", BACKENDS)
def test_auxiliary_losses_are_sums_over_rows(backend: str) -> None:
    """Micro-batches give what the whole gives; logits and loss are the same bits without, gradients are not."""
    ends, config = [], of({"experts.active": 2, "experts.start": 0.0}, router_balance=0.5)
    batch = batches(config, 1)[0]
    for changes in ({}, {"micro_batch": 1}):
        run = changed(config, {f"train.{name}": value for name, value in changes.items()})
        made = engine(backend, run, working(config.model, 2.0), dtype="float64")
        steps(made, run, 2)
        ends.append(made.params())
    assert max(relative_rms(ends[1][name], value) for name, value in ends[0].items()) <= P2_FLOAT64
    bare = engine(backend, changed(config, {"train.router_balance": 0.0}), working(config.model, 2.0), dtype="float64")
    made = engine(backend, config, working(config.model, 2.0), dtype="float64")
    assert np.array_equal(bare.logits(batch.tokens), made.logits(batch.tokens))
    (plain, without), (objective, grads) = bare.gradients(batch), made.gradients(batch)
    assert relative_rms(grads["blocks.1.mlp.router"], without["blocks.1.mlp.router"]) > 1e-3
    # By hand: the coefficient, the number of experts, each one's share of what is sent and its mean probability.
    routes = made.routes(batch.tokens)
    sent = np.stack([(routes == e).mean(axis=(2, 3)) for e in range(4)], axis=-1)  # (passes, B, E)
    assert np.allclose(sent.sum(-1), 1.0)
    assert 0.5 * 2 * 0.9 < objective - plain < 0.5 * 2 * 4  # two layers; 1 each where all get the same
    assert steps(bare, config, 1)[0].loss == steps(made, config, 1)[0].loss


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_of_balance_by_hand(backend: str) -> None:
    p = np.abs(draw("balance", 2, 7, 3)) + 0.1
    p /= p.sum(-1, keepdims=True)
    ranks = np.argsort(np.argsort(-p, axis=-1), axis=-1)
    (found,) = call(backend, lambda p, c: module(backend, "parts.experts").balance(p, c, 2), (p, ranks < 2), "float64")
    shares_ = (ranks < 2).sum(1) / (2 * 7)
    assert np.allclose(found, 3 * (shares_ * p.mean(1)).sum(-1), rtol=0, atol=1e-14)


# The switch.


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_sent_without_a_jump(backend: str) -> None:
    """Before the switch only the shared expert learns; it is felt in no logit and no loss, and then all learn."""
    config = of({"experts.shared": 5}, route_from=0.6, weight_decay=0.5, router_balance=0.1)
    plans = [schedule.plan(step, progress, config.train) for step, progress in enumerate((0.0, 0.59, 0.6, 1.0))]
    assert [plan.route for plan in plans] == [False, False, True, True]
    made, start = engine(backend, config, dtype="float64"), start_values(config.model, config.seed)
    steps(made, config, 3, route=False)
    slept = made.params()
    own = [name for name in slept if name.startswith("blocks.1.mlp.")]
    same = {name.removeprefix("blocks.1.mlp.") for name in own if np.array_equal(slept[name], start[name])}
    assert same == {"router", "up.weight", "down.weight"}
    batch = batches(config, 1)[0]
    bare = engine(backend, config, slept, dtype="float64")
    off, on = (e.train_step(batch, plan).result() for e, plan in ((bare, plans[1]), (made, plans[2])))
    assert off.loss == on.loss
    assert not np.array_equal(made.params()["blocks.1.mlp.down.weight"], start["blocks.1.mlp.down.weight"])


# What is counted.


def test_counted_by_hand() -> None:
    base = of({"experts.count": 0, "experts.hidden": 0, "mlp.hidden": 12})
    model = of({"mlp.hidden": 12, "experts.shared": 5}).model
    table = param_table(model)
    rows = {name.removeprefix("blocks.1.mlp."): row for name, row in table.items() if name.startswith("blocks.1.mlp.")}
    assert {name: (row.shape, row.group, row.slices) for name, row in rows.items()} == {
        "router": ((4, 16), "vector", 1),
        "up.weight": ((48, 16), "matrix", 4),
        "down.weight": ((64, 12), "matrix", 4),
        "shared.up.weight": ((5, 16), "matrix", 1),
        "shared.down.weight": ((16, 5), "matrix", 1),
    }
    coarse = param_table(changed(model, {"deviations.mlp": 12.0, "matrix_storage": "int6/row"}))
    assert all(row.deviation == 12.0 for name, row in coarse.items() if ".mlp." in name and row.group == "matrix")
    deep = of({"layers": 25, "experts.start": 0.28}).model
    assert deep.experts.first(deep) == 7, "0.28 of 25 is 7, though floats say a little more"
    assert table["blocks.1.mlp_scale"].init.scale == 0.25 and table["blocks.0.mlp_scale"].init.scale == 1.0
    ours, bare = shares(model, 37), shares(base.model, 37)
    mine, theirs = ours["experts"], bare["mlp"]
    assert mine.parameters == 4 * theirs.parameters // 2 + 64 + 2 * 5 * 16
    # A token goes to one of four experts, to the shared one, and through the router.
    assert mine.flops == theirs.flops // 2 + 3 * (2 * 2 * 5 * 16 + 2 * 16 * 4)
    assert ours["mlp"].flops == theirs.flops // 2 and ours["attention"] == bare["attention"]


@pytest.mark.parametrize("kind", ["normal", "uniform", "orthogonal"])
def test_each_expert_starts_as_a_matrix(kind: str) -> None:
    config = of({"matrix_init": kind, "experts.start": 0.0})
    start = start_values(config.model, 3)["blocks.0.mlp.up.weight"].reshape(4, 12, 16)
    size = {"normal": 0.02, "uniform": 16**-0.5 / 3**0.5, "orthogonal": 0.25}[kind]
    assert start.std() == pytest.approx(size, rel=0.1)
    if kind == "orthogonal":
        assert np.abs(start @ start.swapaxes(1, 2) - np.eye(12)).max() < 1e-6


def test_routes_that_differ_are_counted() -> None:
    """In float32, before every step from common weights; a router that is off sends tokens elsewhere."""
    config = of({}, quantise="always")
    engines = [engine(backend, config, dtype="float32", exact=False) for backend in BACKENDS]
    losses, _, elsewhere = teacher_forced(engines, config, batches(config, 10))
    ours, theirs = (np.array(losses[backend]) for backend in BACKENDS)
    assert elsewhere <= P4_FLIPS and np.abs(ours - theirs).max() <= P4_TEACHER
    honest = engines[1].routes
    engines[1].routes = lambda tokens: (honest(tokens) + (tokens == 7)[..., None]) % 4  # type: ignore[method-assign]
    _, _, elsewhere = teacher_forced(engines, config, batches(config, 2))
    assert 0.001 < elsewhere < 0.2


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"hidden": 0}, {}, "model.experts.hidden=0: expected at least 1, the width of an expert"),
    ({"count": 1}, {}, "model.experts.count=1: expected 2 to 256, or 0 for none"),
    ({"count": 257}, {}, "model.experts.count=257: expected 2"),
    ({"active": 0}, {}, "model.experts.active=0: expected 1 to 4"),
    ({"active": 5}, {}, "model.experts.active=5: expected 1 to 4"),
    ({"shared": -1}, {}, "model.experts.shared=-1: expected a number from 0 up"),
    ({"start": 1.0}, {}, "model.experts.start=1.0: expected a share from 0 to below 1"),
    ({"start": 0.6}, {}, "model.experts.start=0.6: layer 2 would be the first with experts, of 2 blocks; lower it"),
    ({"count": 0}, {}, "model.experts.hidden=12: there are no experts; set model.experts.count"),
    ({"count": 0, "hidden": 0, "start": 0.3}, {}, "model.experts.start=0.3: there are no experts"),
    ({"count": 0, "hidden": 0}, {"router_balance": 0.1}, "train.router_balance=0.1: there is no router"),
    ({"active": 4}, {"router_balance": 0.1}, "train.router_balance=0.1: every expert gets every token"),
    ({}, {"router_balance": -1.0}, "train.router_balance=-1.0: expected a number from 0 up"),
    ({}, {"route_from": 0.5}, "train.route_from=0.5: expected a share below 1, and a model.experts.shared"),
    ({"shared": 4}, {"route_from": 1.0}, "train.route_from=1.0: expected a share below 1, and a"),
]  # fmt: skip


@pytest.mark.parametrize("model, train, words", REFUSED)
def test_what_cannot_be_built_is_refused(model: dict[str, Any], train: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}") as error:
        of({f"experts.{name}": value for name, value in model.items()}, **train)
    assert "\n" not in str(error.value)


def test_a_mini_keeps_its_experts() -> None:
    """Those of a deep model may begin above the last layer of a shallow one, and above its last block."""
    for changes, first in (({"experts.start": 0.9}, 3), ({"experts.start": 0.15, "shared_blocks": 3}, 1)):
        small = presets.mini(of({"layers": 12, "dim": 64, "experts.shared": 7} | changes)).model
        assert small.experts.first(small) == first and small.experts.within(small, first)
        assert (small.experts.count, small.experts.active) == (4, 1)
        assert (small.dim, small.experts.hidden, small.experts.shared) == (32, 6, 4)
