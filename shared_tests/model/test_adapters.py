"""Adapters of rows: one pass for nats and gradients, rows that know nothing of each other, twins. Budget: 20 s."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core import rng
from core.checks import ConfigError
from core.config import ModelConfig, changed
from core.engine.adapting import AdaptStep
from core.model.adapters import (
    AdapterSpec,
    adapted_flops,
    adapted_shapes,
    adapter_parameters,
    adapter_sizes,
    chosen_sites,
    first_a,
    sites,
    start_a,
)
from core.model.shares import flops_per_token
from core.scoring.predictions import Prediction
from shared_tests.support.harness import (
    BACKENDS,
    EVERYTHING,
    draw,
    engine,
    mini,
    module,
    reader,
    to_device,
    to_numpy,
    tokens,
    working_weights,
)

pytestmark = pytest.mark.pair
FORMS = ("debug", "pr1855", EVERYTHING)
"""Attention under a factored head; repeats, lanes and a tied head; every part, shared blocks, experts."""
SEQ = 13


def spec_of(name: str, rank: int = 2) -> AdapterSpec:
    """Return adapters at every site of a mini."""
    return AdapterSpec(rank, 2.0 * rank, sites(mini(name).model), seed=3)


def text(name: str, rows: int, seq: int = SEQ) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and targets for a mini."""
    model = mini(name).model
    drawn = tokens(f"adapters/{rows}", rows, seq + 1, model.vocab, model.bos)
    return drawn[:, :-1], drawn[:, 1:]


def shares_of(rows: int, seq: int = SEQ) -> np.ndarray:
    """Return weights of targets that add up to about 1 in a row."""
    return np.abs(draw("shares", rows, seq)) / seq


def scored(backend: str, name: str, dtype: str = "float64") -> Any:
    """Return an engine that nobody trains."""
    return reader(backend, mini(name), 3.0, dtype=dtype)


def moved(backend: str, made: Any, adapters: Any, name: str) -> Any:
    """Return adapters whose B is no longer 0."""
    size = adapters.values_BN.shape
    values = to_numpy(adapters.values_BN) + 0.2 * draw(name, size[1])
    return adapters._replace(values_BN=to_device(backend, values.astype(made.dtype), made.dtype))


def learned(made: Any, adapters: Any, rows: tuple, shares: np.ndarray, updates: int, **step: Any) -> Any:
    """Return adapters after updates, and the last nats before them."""
    nats = None
    for turn in range(updates):
        tape = made.adapted(adapters, *rows)
        nats = tape.nll()
        adapters = made.adapt(tape, shares, AdaptStep(taken=turn, **step))
    return adapters, nats


def values(adapters: Any) -> list[np.ndarray]:
    """Return values and moments, (rows, N) each."""
    return [to_numpy(array) for array in (adapters.values_BN, adapters.m_BN, adapters.v_BN)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMS)
def test_a_b_of_zero_changes_nothing(name: str, backend: str) -> None:
    for dtype, most in (("float64", 1e-11), ("float32", 2e-6)):
        made, rows = scored(backend, name, dtype), text(name, 3)
        tape = made.adapted(made.adapters(spec_of(name), 3, 0), *rows)
        assert np.abs(tape.nll() - made.nll(*rows)).max() <= most


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_is_a_change_of_its_matrix(backend: str) -> None:
    """W + alpha / rank B A as a weight says what W with the adapter says."""
    config, rows = mini("debug"), text("debug", 1)
    names = tuple(site for site in sites(config.model) if f"{site}.weight" in working_weights(config.model, 3.0))
    spec = AdapterSpec(2, 5.0, names[:-1])  # the last is the embedding, which tokens are looked up in, too
    made = scored(backend, "debug")
    adapters = moved(backend, made, made.adapters(spec, 1, 0), "folded")
    sizes = adapter_sizes(config.model, spec)
    parts = [part.reshape(2, -1) for part in np.split(values(adapters)[0][0], np.cumsum(sizes)[:-1])]
    weights = {name: value.astype(np.float64) for name, value in working_weights(config.model, 3.0).items()}
    for site, a, b in zip(spec.sites, parts[: len(parts) // 2], parts[len(parts) // 2 :], strict=True):
        weights[f"{site}.weight"] = weights[f"{site}.weight"] + 5.0 / 2 * b.T @ a
    folded = engine(backend, config, weights, dtype="float64").nll(*rows)
    assert np.abs(made.adapted(adapters, *rows).nll() - folded).max() <= 1e-11
    assert np.abs(made.nll(*rows) - folded).max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("site, off", [("blocks.3.mixer", "mlp"), ("blocks.3.block_mlp", "mixer"), ("embed", "")])
def test_maps_beside_a_mixer_an_mlp_and_the_head(site: str, off: str, backend: str) -> None:
    """In the last layer, whose other branch is switched off, and at the head, they are added by hand."""
    (given, targets), off_too = text("tiny", 2), dict.fromkeys(("depth_damping", "residual_mix", "skips.on"), False)
    config = changed(mini("tiny"), {f"model.{name}": value for name, value in off_too.items()})
    model, weights = config.model, dict(working_weights(config.model, 3.0))
    weights |= {f"blocks.3.{off}_scale": 0 * weights[f"blocks.3.{off}_scale"]} if off else {}
    made, spec = engine(backend, config, weights, dtype="float64"), AdapterSpec(2, 6.0, (site,))
    adapters = moved(backend, made, made.adapters(spec, 2, 0), "by hand")
    a, b = (part.reshape(2, 2, -1) for part in np.split(values(adapters)[0], [2 * model.dim], axis=1))

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + model.norm_eps)

    def added(x: np.ndarray) -> np.ndarray:
        return 3.0 * norm(x) @ a.transpose(0, 2, 1) @ b

    record = made.activations(given)
    x = record["blocks.3"]
    if off:
        scale = weights["blocks.3.mlp_scale" if off == "mixer" else "blocks.3.mixer_scale"]
        x = x + scale * added(record["blocks.2"])
    z = norm(x) @ weights["embed.weight"].astype(np.float64).T + (0 if off else added(x))
    z = model.head.softcap * np.tanh(z / model.head.softcap)
    nats = np.log(np.sum(np.exp(z), axis=-1)) - np.take_along_axis(z, targets[..., None], axis=-1)[..., 0]
    tape = made.adapted(adapters, given, targets)
    assert np.abs(tape.nll() - nats).max() <= 1e-10 and np.abs(made.nll(given, targets) - nats).max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMS)
def test_gradients_equal_differences_at_every_site(name: str, backend: str) -> None:
    """Every row has the same text and adapters, but one A or B moved along a direction: all differences in one pass."""
    made, spec, eps, seq = scored(backend, name), spec_of(name), 1e-4, 9
    sizes = adapter_sizes(mini(name).model, spec)
    ends, (given, targets), shares = np.cumsum(sizes), text(name, 1, seq), shares_of(1, seq)
    one = moved(backend, made, made.adapters(spec, 1, 0), "b")
    step = AdaptStep("sgd", lr=1.0, momentum=0.0)
    start = values(one)[0]
    gradient = (start - values(made.adapt(made.adapted(one, given, targets), shares, step))[0])[0]
    directions = np.zeros((len(sizes), ends[-1]))
    for i, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        directions[i, end - size : end] = draw(f"direction/{i}", size) / size**0.5
    offsets = np.concatenate([eps * directions, -eps * directions])
    many = made.adapters(spec, len(offsets), 0)._replace(values_BN=to_device(backend, start + offsets, "float64"))
    nats = made.adapted(many, given.repeat(len(offsets), axis=0), targets.repeat(len(offsets), axis=0)).nll()
    up, down = np.split(np.sum(nats * shares, axis=1), 2)
    differences, slopes = (up - down) / (2 * eps), directions @ gradient
    names = [f"{half} of {site}" for half in "AB" for site in spec.sites]
    for place, slope, difference in zip(names, slopes, differences, strict=True):
        assert abs(slope - difference) <= 1e-6 * max(abs(slope), 1e-2), (place, slope, difference)
        assert slope != 0, f"{place}: no gradient"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["debug", EVERYTHING])
def test_a_row_alone_equals_the_row_among_many(name: str, backend: str) -> None:
    many, row = (64, 37) if name == "debug" else (4, 2)
    for dtype, eps, most in (("float64", 1e-8, 1e-10), ("float32", 1e-6, 1e-5))[: 1 + (name == "debug")]:
        made, spec, rows, shares = scored(backend, name, dtype), spec_of(name), text(name, many), shares_of(many)
        whole = made.adapters(spec, many, 2)
        alone = made.adapters(spec, 1, 2, {site: a[row : row + 1] for site, a in whole.a().items()})
        step: dict[str, Any] = {"lr": 0.01, "eps": eps, "decay": 0.5, "clip": 1.0}
        whole, nats = learned(made, whole, rows, shares, 4, **step)
        one = tuple(part[row : row + 1] for part in rows)
        alone, own = learned(made, alone, one, shares[row : row + 1], 4, **step)
        assert np.abs(own[0] - nats[row]).max() <= most
        if dtype == "float64":
            assert max(np.abs(a[0] - b[row]).max() for a, b in zip(values(alone), values(whole), strict=True)) <= most


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_twins_agree_over_twenty_updates(rule: Any) -> None:
    """Learning rates and counts differ by row."""
    for name in FORMS if rule == "adamw" else FORMS[:1]:
        rows, shares, ends, updates = text(name, 3), shares_of(3), [], 2 if name == EVERYTHING else 20
        for backend in BACKENDS:
            made, nats = scored(backend, name), None
            adapters = made.adapters(spec_of(name), 3, 0)
            for turn in range(updates):
                tape = made.adapted(adapters, *rows)
                nats, lr, taken = tape.nll(), 0.01 * np.array([1.0, 0.5, 0.25]), turn + np.array([0, 1, 2])
                step = AdaptStep(rule, lr, decay=0.1, clip=0.5, taken=taken)
                adapters = made.adapt(tape, shares, step)
            ends.append([nats, *values(adapters)])
        assert max(np.abs(ours - theirs).max() for ours, theirs in zip(*ends, strict=True)) <= 1e-8, name


def test_an_update_is_what_its_rule_says() -> None:
    """AdamW by its formulas, from gradients that SGD without momentum shows; a row is clipped by its own norm."""
    made, spec, rows, shares = scored("cuda", "debug"), spec_of("debug"), text("debug", 2), shares_of(2)
    start = made.adapters(spec, 2, 0)
    plain = values(made.adapt(made.adapted(start, *rows), shares, AdaptStep("sgd", 1.0, momentum=0.0)))[0]
    w = values(start)[0]
    gradient = w - plain
    norm = np.linalg.norm(gradient, axis=1)
    clip = float(norm.mean())
    assert norm.min() < clip < norm.max()
    clipped = gradient * np.minimum(clip / (norm + 1e-6), 1.0)[:, None]
    beta1, beta2, lr, decay, taken = 0.8, 0.9, 0.02, 0.5, np.array([0, 3])
    step = AdaptStep("adamw", lr, beta1, beta2, 1e-6, decay, clip=clip, taken=taken)
    m, v, count = (1 - beta1) * clipped, (1 - beta2) * clipped**2, (taken + 1)[:, None]
    moved_ = (m / (1 - beta1**count)) / (np.sqrt(v / (1 - beta2**count)) + 1e-6)
    expected = [w - lr * (moved_ + decay * w), m, v]
    for ours, theirs in zip(values(made.adapt(made.adapted(start, *rows), shares, step)), expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-12
    sgd = AdaptStep("sgd", lr, decay=decay, momentum=0.7)
    once = made.adapt(made.adapted(start, *rows), shares, sgd)
    first = values(once)
    assert np.abs(first[1] - gradient).max() <= 1e-12 and not first[2].any()
    assert np.abs(first[0] - (w - lr * (gradient + decay * w))).max() <= 1e-12
    second = values(made.adapt(made.adapted(once, *rows), shares, sgd))
    plain = values(made.adapt(made.adapted(once, *rows), shares, AdaptStep("sgd", 1.0, momentum=0.0)))[0]
    assert np.abs(second[1] - (0.7 * gradient + first[0] - plain)).max() <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_know_nothing_of_each_other_and_idle_ones_stay(backend: str) -> None:
    made, spec, rows, shares = scored(backend, "pr1855"), spec_of("pr1855"), text("pr1855", 4), shares_of(4)
    shares[3] = 0.0
    before, _ = learned(made, made.adapters(spec, 4, 0), rows, shares_of(4), 1, lr=0.01)
    after, nats = learned(made, before, rows, shares, 2, lr=0.01)
    other = tuple(part.copy() for part in rows)
    for part in other:
        part[2] = (part[2] + 7) % mini("pr1855").model.vocab
    changed_, others = learned(made, before, other, shares, 2, lr=0.01)
    for ours, theirs, old in zip(values(after), values(changed_), values(before), strict=True):
        assert np.array_equal(ours[:2], theirs[:2]) and not np.array_equal(ours[2], theirs[2])
        assert np.array_equal(ours[3], old[3]) and not np.array_equal(ours[0], old[0])
    assert np.array_equal(nats[:2], others[:2]) and np.array_equal(nats[3], others[3])
    tape = made.adapted(after, *rows)
    assert made.adapt(tape, np.zeros_like(shares), AdaptStep()) is after


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMS)
def test_no_target_depends_on_a_later_token(name: str, backend: str) -> None:
    made, (given, targets) = scored(backend, name), text(name, 2)
    adapters = moved(backend, made, made.adapters(spec_of(name), 2, 0), "flip")
    nats = made.adapted(adapters, given, targets).nll()
    later, place = given.copy(), SEQ // 2
    later[:, place] = (later[:, place] + 5) % mini(name).model.vocab
    flipped = made.adapted(adapters, later, targets).nll()
    assert np.array_equal(nats[:, :place], flipped[:, :place])
    assert not np.array_equal(nats[:, place:], flipped[:, place:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMS)
def test_a_carried_state_goes_on_and_gets_no_gradient(name: str, backend: str) -> None:
    made, (given, targets), shares = scored(backend, name), text(name, 2), shares_of(2)
    adapters = moved(backend, made, made.adapters(spec_of(name), 2, 0), "state")
    whole = made.adapted(adapters, given, targets).nll()
    cut = 6
    first = made.adapted(adapters, given[:, :cut], targets[:, :cut], state=made.start(2))
    state = made.commit(first, cut)
    second = made.adapted(adapters, given[:, cut:], targets[:, cut:], state=state)
    assert np.abs(np.concatenate([first.nll(), second.nll()], axis=1) - whole).max() <= 1e-11
    step, eps = AdaptStep("sgd", 1.0, momentum=0.0), 1e-4
    start = values(adapters)[0]
    gradient = start - values(made.adapt(second, shares[:, cut:], step))[0]
    # Differences with the state as it is: if a gradient had reached what made the state, they would not be those.
    direction, costs = draw("carried", start.shape[1]), []
    for sign in (1, -1):
        placed = start + sign * eps * direction / start.shape[1] ** 0.5
        placed = adapters._replace(values_BN=to_device(backend, placed, "float64"))
        nats = made.adapted(placed, given[:, cut:], targets[:, cut:], state=state).nll()
        costs.append(np.sum(nats * shares[:, cut:], axis=1))
    difference = (costs[0] - costs[1]) / (2 * eps)
    assert np.abs(difference - gradient @ direction / start.shape[1] ** 0.5).max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_forward_pass_runs_once_and_leaves_the_model_as_it_was(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = mini("debug")
    made, rows, count = engine(backend, config, working_weights(config.model, 3.0)), text("debug", 3), []
    before, weights, ops = made.nll(*rows), made.weights(), module(backend, "ops")
    lookup = ops.embedding
    monkeypatch.setattr(ops, "embedding", lambda *given: (count.append(1), lookup(*given))[1])
    adapters, _ = learned(made, made.adapters(spec_of("debug"), 3, 0), rows, shares_of(3), 3, lr=0.1)
    assert len(count) == 3
    monkeypatch.undo()
    assert np.array_equal(made.nll(*rows), before), "an adapter stayed behind"
    assert all(np.array_equal(value, weights[name]) for name, value in made.weights().items())
    assert not np.array_equal(made.adapted(adapters, *rows).nll(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prediction_changes_what_is_told_not_what_is_learned(backend: str) -> None:
    made, rows, shares = scored(backend, "debug"), text("debug", 2), shares_of(2)
    adapters = moved(backend, made, made.adapters(spec_of("debug"), 2, 0), "told")
    warm = Prediction(inverse=0.7)
    plain, told = made.adapted(adapters, *rows), made.adapted(adapters, *rows, warm)
    assert np.abs(plain.nll() - told.nll()).max() > 1e-3
    assert np.abs(np.sum(np.exp(told.logprobs()), axis=-1) - 1).max() <= 1e-12
    own = np.take_along_axis(told.logprobs(), rows[1][..., None], axis=-1)[..., 0]
    assert np.abs(own + told.nll()).max() <= 1e-11
    ours, theirs = (values(made.adapt(tape, shares, AdaptStep())) for tape in (plain, told))
    assert max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)) <= 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_reset_clears_b_and_moments_and_a_may_stay_warm(backend: str) -> None:
    made, spec, rows, shares = scored(backend, "debug"), spec_of("debug"), text("debug", 3), shares_of(3)
    first = made.adapters(spec, 3, 1)
    after, _ = learned(made, first, rows, shares, 3, lr=0.02)
    marked, size = np.array([True, False, True]), sum(adapter_sizes(mini("debug").model, spec)[: len(spec.sites)])
    for keep_a in (False, True):
        new, old, begun = values(made.reset(after, marked, keep_a)), values(after), values(first)
        assert np.array_equal(new[0][marked, :size], (old if keep_a else begun)[0][marked, :size])
        assert not new[0][marked, size:].any() and not new[1][marked].any() and not new[2][marked].any()
        assert all(np.array_equal(a[~marked], b[~marked]) for a, b in zip(new, old, strict=True))
    warm = made.adapters(spec, 3, 9, after.a())
    kept = made.reset(after, np.ones(3, bool), True)
    assert all(np.array_equal(a, b) for a, b in zip(values(warm), values(kept), strict=True))
    assert not np.array_equal(values(warm)[0], values(first)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_adapted_is_refused(backend: str) -> None:
    made, rows, shares = scored(backend, "debug"), text("debug", 2), shares_of(2)
    adapters = made.adapters(spec_of("debug"), 2, 0)
    tape = made.adapted(adapters, *rows)
    made.adapt(tape, shares, AdaptStep())
    with pytest.raises(ValueError, match="run the pass again"):
        made.adapt(tape, shares, AdaptStep())
    with pytest.raises(ValueError, match="began without a state"):
        made.commit(tape, 3)
    for wrong in (shares[:1], np.full_like(shares, np.nan)):
        with pytest.raises(ValueError, match="one finite number"):
            made.adapt(made.adapted(adapters, *rows), wrong, AdaptStep())
    with pytest.raises(ValueError, match="adapters at blocks.7.mixer.q: expected"):
        made.adapters(AdapterSpec(2, 1.0, ("blocks.7.mixer.q",)), 2, 0)
    with pytest.raises(ValueError, match="A of adapters: .* has shape"):
        made.adapters(spec_of("debug"), 2, 0, made.adapters(spec_of("debug"), 3, 0).a())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_passes_are_the_same(backend: str) -> None:
    config, rows, ends = mini("debug"), text("debug", 3), []
    for compiled in (False, True):
        made = engine(backend, config, working_weights(config.model, 3.0), dtype="float32", compile=compiled)
        adapters = made.adapters(spec_of("debug"), 3, 0)
        for turn in range(2):
            tape = made.adapted(adapters, *rows, often=True)
            ends.append(tape.nll())
            adapters = made.adapt(tape, shares_of(3), AdaptStep(lr=0.01, eps=1e-4, taken=turn))
    assert np.abs(ends[0] - ends[2]).max() <= 1e-5 and np.abs(ends[1] - ends[3]).max() <= 1e-4


def choice(*names: str, layers: tuple[int, ...] = ()) -> Any:
    """Return settings that choose sites."""
    return SimpleNamespace(sites=names, layers=layers)


def test_sites_are_the_matrices_of_every_pass_and_two_maps_beside_them() -> None:
    model = mini("pr1855").model
    known = sites(model)
    passes = ("blocks.0", "blocks.1", "blocks.2", "blocks.1.again", "blocks.2.again", "blocks.3")
    for label in passes:
        for name in ("mixer.q", "mixer.k", "mixer.v", "mixer.o", "mlp.up", "mlp.down", "mixer", "block_mlp"):
            assert f"{label}.{name}" in known
    assert known[-1] == "embed" and len(known) == len(set(known))
    passes_of_1 = tuple(f"blocks.1{'.again' * turn}.mixer.q" for turn in range(3))
    assert chosen_sites(model, choice("q", layers=(1,))) == passes_of_1
    assert chosen_sites(model, choice("head", "blocks.0.mlp.up")) == ("blocks.0.mlp.up", "embed")
    assert len(chosen_sites(model, choice("mixer", "block_mlp"))) == 2 * len([s for s in known if s.endswith(".q")])
    all_of_it = mini(EVERYTHING).model
    assert {"bank_head.route", "feedback.1.again.pool", "embed_up", "engram.key"} <= set(sites(all_of_it))
    # Of shared blocks each layer has adapters of its own; experts' own matrices are no site.
    assert all_of_it.shared_blocks and "blocks.4.mixer.value" in sites(all_of_it)
    assert "blocks.3.mlp.shared.up" in sites(all_of_it) and "blocks.3.mlp.up" not in sites(all_of_it)


@pytest.mark.parametrize(
    "given, words",
    [
        (choice("qq"), "eval.adapt.sites=qq: no matrix .* did you mean q?"),
        (choice("route"), "eval.adapt.sites=route: no matrix"),
        (choice("q", layers=(9,)), "eval.adapt.layers=9: expected layers from 0 to 3"),
        (choice("head", layers=(1,)), "eval.adapt.layers=1: none of eval.adapt.sites is there"),
    ],
)
def test_settings_without_a_site_are_refused_in_one_line(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        chosen_sites(mini("tiny").model, given)
    assert "\n" not in str(error.value)


def test_a_name_that_the_layers_leave_out_is_refused() -> None:
    model = mini("skc_mac").model
    with pytest.raises(ConfigError, match="write: none is in eval.adapt.layers=0; it is in layers 1, 3"):
        chosen_sites(model, choice("value", "write", layers=(0,)))


def test_a_is_drawn_row_by_row_and_counted() -> None:
    model, spec = mini("debug").model, spec_of("debug", rank=3)
    few, many = (start_a(model, spec, rows, 4) for rows in (2, 5))
    for site, shape in adapted_shapes(model, spec).items():
        assert np.array_equal(few[site], many[site][:2]) and not np.array_equal(many[site][0], many[site][1])
        bound = shape.into**-0.5
        assert 0.5 * bound < np.abs(many[site]).max() < bound and abs(many[site].mean()) < 0.2 * bound
    other = start_a(model, spec, 2, 5)
    assert not any(np.array_equal(few[site], other[site]) for site in spec.sites)
    expected = rng.uniform(3, "adapter/4/embed/1", few["embed"][1].size) * few["embed"].shape[2] ** -0.5
    assert np.array_equal(few["embed"][1].reshape(-1), expected)
    assert first_a(model, spec, 2, 4, None).shape == (2, sum(adapter_sizes(model, spec)[: len(spec.sites)]))
    assert adapter_parameters(model, spec) == scored("cuda", "debug").adapters(spec, 1, 0).values_BN.shape[1]


def test_flops_of_an_adapted_pass() -> None:
    """One attention layer, counted by hand: two products with every matrix, three with every A and B."""
    model = changed(
        ModelConfig(), {"layers": 1, "dim": 64, "attention.heads": 2, "attention.rope_dims": 16, "mlp.hidden": 96}
    )
    spec = AdapterSpec(4, 4.0, ("blocks.0.mixer.q", "embed"))
    kv = model.attention.kv_heads * 32
    matrices = 2 * 64 * 64 + 2 * kv * 64 + 2 * 64 * 96 + 64 * model.vocab
    beside = 4 * (64 + 64 + 64 + model.vocab)
    assert adapter_parameters(model, spec) == beside
    attention = flops_per_token(model, 32) - 6 * matrices
    assert attention == 3 * 2 * 32 * 64
    assert adapted_flops(model, spec, 32) == 4 * matrices + attention + 6 * beside
