"""The twin: what it drafts, what it learns from, and what it leaves alone. Budget: 25 s."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from core.check.tolerances import CAUSAL, P1_DIFFERENCE, P2_FLOAT64, P4_FLOAT64, relative_rms
from core.config import ConfigError, RunConfig, changed
from core.engine.protocol import Arrays, Engine, State
from core.model.context import DeltaTape, Draft, each_array
from core.twin.anchors import anchor_places, draw_anchors
from core.twin.params import MASK, low_rank, scale, twin_rows, twin_start
from core.twin.protocol import Twin
from core.twin.settings import TwinConfig
from shared_tests import oracle
from shared_tests.support.harness import (
    BACKENDS,
    EVERYTHING,
    HYBRID,
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
from shared_tests.support.one_layer import ONE_LAYER, run_of

pytestmark = pytest.mark.pair
BLOCK = 4
NAMES = ("tiny", "delta_ablate", HYBRID, EVERYTHING, "shared")
"""Attention, delta and attention, Koopman with SKC and attention, every option with loops, layers that share blocks."""
PLAIN = {"exact_anchor": False, "attention": "causal"}
"""With these a draft is what the model itself would compute."""


@functools.cache
def config_of(name: str) -> RunConfig:
    if name != "shared":
        return mini(name)
    config = mini("delta_ablate")
    kinds = {"layers": 4, "blocks": ("attention_gated", "delta"), "shared_blocks": 2, "documents": "packed"}
    return dataclasses.replace(config, model=changed(config.model, kinds))


def made(name: str, backend: str) -> Engine:
    return reader(backend, config_of(name), 1.0, dtype="float64")


def text(name: str, seq: int = 30) -> np.ndarray:
    """Return two rows of documents; the second is one."""
    model = config_of(name).model
    rows = tokens("twin", 2, seq, model.vocab, model.bos)
    rows[1, 1:] = np.where(rows[1, 1:] == model.bos, 5, rows[1, 1:])
    return rows


def state_at(model: Engine, rows: np.ndarray, n: Any) -> State:
    return model.commit(model.chunk(model.start(len(rows)), rows), n)


def moved(twin: Twin, size: float = 0.3) -> Arrays:
    """Return the twin's weights, every one elsewhere."""
    return {name: value + size * np.std(value) * draw(name, *value.shape) for name, value in twin.params().items()}


def drafted(name: str, backend: str, n: int, **settings: Any) -> tuple[Twin, np.ndarray]:
    """Return a fresh twin and what it drafts behind n tokens of the text."""
    model, rows = made(name, backend), text(name)
    twin = model.twin(TwinConfig(block=BLOCK, **settings))
    return twin, twin.draft(state_at(model, rows, n), rows[:, n]).logits()


def plain(name: str) -> dict[str, Any]:
    return PLAIN if config_of(name).model.mixes("attention") else {"exact_anchor": False}


def by_oracle(name: str, backend: str, n: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Return what the oracle says of n tokens, an anchor and masks: a mask is one more token, which no hash reads."""
    model, weights, rows = config_of(name).model, made(name, backend).weights(), text(name)
    count = model.vocab
    for key in ("embed.weight", "head.weight", "head.bias", "value_embed.table"):
        if key in weights:
            more = weights[key].mean(axis=0, keepdims=True) * (key == "embed.weight")
            weights[key] = np.concatenate([weights[key], more])
    for part, hashes in (("engram", {"ngrams": -1}), ("bigram", {"ngrams": -1, "xors": model.bigram.buckets - 1})):
        for function, nothing in hashes.items():
            own = getattr(oracle.MODULES[part], function)

            def blind(text: Any, *rest: Any, own: Any = own, nothing: int = nothing) -> np.ndarray:
                return np.where(text.tokens[..., None] == count, nothing, own(text, *rest))

            monkeypatch.setattr(oracle.MODULES[part], function, blind)
    masks = np.full((len(rows), BLOCK - 1), count, rows.dtype)
    return oracle.model(model, weights, np.concatenate([rows[:, : n + 1], masks], axis=1))[:, n:, :count]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_twin_is_its_model_and_equals_the_oracle(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T7. From the model's own state, in every form of the twin; a mask is the mean vector, and hashes read nothing."""
    for n in (1, 14):
        wanted = by_oracle(name, backend, n, monkeypatch)
        for form in ({}, {"rank": 2}, {"rank": 3, "pissa": False}):
            for exact in (False, True):
                _, found = drafted(name, backend, n, **plain(name) | form | {"exact_anchor": exact})
                assert relative_rms(found, wanted) <= P2_FLOAT64, (n, form, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["delta_ablate", HYBRID, "shared"])
def test_a_draft_is_a_chunk_by_the_twins_mixers_from_the_models_own_state(name: str, backend: str) -> None:
    """A mask of some token's vector is that token; the prefix, convolutions' left context too, is the frozen one's."""
    model, rows = made(name, backend), text(name)
    twin = model.twin(TwinConfig(block=BLOCK, **plain(name)))
    params = moved(twin) | {MASK: model.weights()["embed.weight"][7]}
    twin.load_params(params)
    other = model.weights() | {key.removeprefix("twin."): value for key, value in params.items() if key != MASK}
    both = engine(backend, config_of(name), None, dtype="float64")
    both.load_params(other)
    state, block = state_at(model, rows, np.array([9, 16])), np.array([[rows[0, 9], 7, 7, 7], [rows[1, 16], 7, 7, 7]])
    wanted = both.chunk(state, block.astype(np.int32)).logits()
    assert relative_rms(twin.draft(state, block[:, 0]).logits(), wanted) <= CAUSAL
    assert relative_rms(model.chunk(state, block.astype(np.int32)).logits(), wanted) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_first_draft_is_the_models_own_and_the_state_stays(name: str, backend: str) -> None:
    """Exact anchor, for any weights of the twin, bit for bit; T4."""
    model, rows = made(name, backend), text(name)
    twin = model.twin(TwinConfig(block=BLOCK))
    twin.load_params(moved(twin))
    state, anchors = state_at(model, rows, np.array([9, 16])), np.array([rows[0, 9], rows[1, 16]])
    before: list[bytes] = []
    after: list[bytes] = []
    each_array(state.model, lambda x: before.append(to_numpy(x).tobytes()))
    said = twin.draft(state, anchors)
    each_array(state.model, lambda x: after.append(to_numpy(x).tobytes()))
    assert before == after and len(before) > 1 and (state.position == [9, 16]).all()
    own = model.chunk(state, anchors[:, None].astype(np.int32))
    assert (said.logits()[:, :1] == own.logits()).all() and (said.best()[:, :1] == own.best()).all()
    assert (said.best() == said.logits().argmax(-1)).all() and said.best().shape == (2, BLOCK)
    assert twin.draft(state, anchors, 1).logits().shape[1] == 1
    with pytest.raises(ValueError, match="began without a state"):
        model.commit(cast(Any, said), 1)


def forms(name: str) -> list[TwinConfig]:
    """Return twins of every rule that a model has a use for, in full and of low rank."""
    mixes = config_of(name).model.mixes
    found = [TwinConfig(block=BLOCK), TwinConfig(block=BLOCK, rank=2, **plain(name))]
    if mixes("koopman", "skc", "delta"):
        found.append(TwinConfig(block=BLOCK, rule="end", rank=2, pissa=False, vectors=False))
    if mixes("delta"):
        found.append(TwinConfig(block=BLOCK, rule="first_order", exact_anchor=False, learned_mask=False))
    return found


WEIGHTS = np.array([0.3, 1.0, 0.5, 0.25])


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_many_anchors_in_one_pass_are_as_many_drafts(name: str, backend: str) -> None:
    """T8. The loss is what drafts behind each anchor's own prefix cost, so that nothing behind an anchor is seen."""
    model, rows = made(name, backend), text(name)
    anchors = np.array([[0, 17], [8, 25]])
    whole = log_softmax(model.logits(rows))
    for config in forms(name)[:: 2 if name == EVERYTHING else 1]:
        twin, first = model.twin(config), int(config.exact_anchor)
        twin.load_params(moved(twin))
        kl, entropy = 0.0, 0.0
        for (row, _), anchor in np.ndenumerate(anchors):
            part = rows[row : row + 1]
            said = log_softmax(twin.draft(state_at(model, part, int(anchor)), part[:, anchor]).logits())[0, first:]
            at = np.arange(anchor + first, anchor + BLOCK)
            known, share = whole[row, at], WEIGHTS[first:] / WEIGHTS[first:].sum() / anchors.size
            kl += float(((np.exp(known) * (known - said)).sum(-1) * share).sum())
            entropy -= float((said[np.arange(len(at)), part[0, at + 1]] * share).sum())
        for loss, wanted in (("kl", kl), ("cross_entropy", entropy)):
            assert abs(twin.gradients(rows, anchors, WEIGHTS, loss)[0] / wanted - 1) <= P2_FLOAT64, (config, loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_many_anchors_are_the_mean_of_each(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """T8, also where memory asks for a group at a time; and they are those of finite differences."""
    name, anchors = "delta_ablate", np.array([[0, 3, 17], [8, 9, 25]])
    model, rows = made(name, backend), text(name)
    for config in forms(name)[1:]:
        twin = model.twin(config)
        start = moved(twin)
        twin.load_params(start)
        value, grads = twin.gradients(rows, anchors, WEIGHTS)
        each = [twin.gradients(rows, anchors[:, m : m + 1], WEIGHTS) for m in range(3)]
        assert abs(value - np.mean([one for one, _ in each])) <= CAUSAL
        for key, grad in grads.items():
            assert relative_rms(grad, np.mean([one[key] for _, one in each], axis=0)) <= P2_FLOAT64, key
        with monkeypatch.context() as patch:
            patch.setattr(module(backend, "twin"), "PLACES", 1)
            apart = twin.gradients(rows, anchors, WEIGHTS)[1]
        assert max(relative_rms(apart[key], grad) for key, grad in grads.items()) <= P2_FLOAT64
        move, losses = {key: np.std(value) * draw(f"move/{key}", *value.shape) for key, value in start.items()}, []
        for size in (1e-4, -1e-4, 2e-4, -2e-4):
            twin.load_params({key: value + size * move[key] for key, value in start.items()})
            losses.append(twin.gradients(rows, anchors, WEIGHTS)[0])
        near, far = (losses[0] - losses[1]) / 2e-4, (losses[2] - losses[3]) / 4e-4
        slope = sum(float((grads[key] * move[key]).sum()) for key in grads)
        assert abs((4 * near - far) / 3 / slope - 1) <= P1_DIFFERENCE


def test_the_twins_of_both_backends_draft_and_learn_alike() -> None:
    """Drafts, losses, gradients and steps (ten of a full clone), in float64."""
    for name in NAMES:
        rows = text(name)
        anchors = draw_anchors(rows, config_of(name).model.bos, BLOCK, 2, 0, "alike")
        for i, config in enumerate(forms(name)[: None if name in ("delta_ablate", HYBRID) else 1]):
            found, steps = [], 2 if i else 10
            for backend in BACKENDS:
                model = made(name, backend)
                twin, loss = model.twin(config), ("kl", "cross_entropy")[i % 2]
                _, grads = twin.gradients(rows, anchors, WEIGHTS, loss)
                losses = [twin.step(rows, anchors, WEIGHTS, loss, 3e-3, 1.0).loss for _ in range(steps)]
                report = twin.report(rows, anchors)
                tail = [report.agreement, report.kl, np.array(list(report.cosine.values()))]
                said = twin.draft(state_at(model, rows, 11), rows[:, 11]).logits()
                found.append((np.array(losses), [*grads.values(), said], tail, list(grads)))
            ours, theirs = found
            assert ours[3] == theirs[3] == list(twin_rows(config_of(name).model, config))
            assert np.abs(ours[0] - theirs[0]).max() <= P4_FLOAT64 and ours[0][-1] < ours[0][0], (name, config)
            for a, b in zip(ours[1][:-1], theirs[1][:-1], strict=True):
                assert relative_rms(a, b) <= P2_FLOAT64 or np.abs(a - b).max() <= 1e-15, (name, config)
            for a, b in zip((*ours[2], ours[1][-1]), (*theirs[2], theirs[1][-1]), strict=True):
                assert np.abs(a - b).max() <= P4_FLOAT64, (name, config)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_twin_learns_and_goes_on_from_what_was_kept(backend: str) -> None:
    """T8: no weight of the model has a gradient or moves; params and moments are all that a step needs."""
    name, anchors = HYBRID, np.array([[0, 3], [8, 9]])
    model, rows = made(name, backend), text(name)
    before = {key: value.tobytes() for key, value in model.weights().items()}
    twin = model.twin(TwinConfig(block=BLOCK))
    state = state_at(model, rows, 4)
    fresh = twin.draft(state, rows[:, 4]).logits()
    for _ in range(2):
        twin.step(rows, anchors, WEIGHTS, "kl", 1e-2, 1.0)
    again = model.twin(TwinConfig(block=BLOCK), twin.params())
    said = twin.draft(state, rows[:, 4]).logits()
    assert (said == again.draft(state, rows[:, 4]).logits()).all() and (said[:, 1:] != fresh[:, 1:]).any()
    again.load_optimizer(twin.optimizer())
    results = [one.step(rows, anchors, WEIGHTS, "kl", 1e-2, 1.0) for one in (twin, again)]
    assert results[0] == results[1] and results[0].finite
    assert all((value == again.params()[key]).all() for key, value in twin.params().items())
    assert {key: value.tobytes() for key, value in model.weights().items()} == before
    kept = twin.params()
    twin.load_params(kept | {MASK: np.full_like(kept[MASK], np.nan)})
    assert not twin.step(rows, anchors, WEIGHTS, "kl", 1e-2, 1.0).finite
    assert all((value == kept[key]).all() for key, value in twin.params().items() if key != MASK)
    with pytest.raises(ValueError, match="twin.mask is missing"):
        twin.load_params({key: value for key, value in kept.items() if key != MASK})


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_block_reads_at_its_end(backend: str) -> None:
    """The delta layer's rules by loops: S_end = G S_0 + sum of what is left of k d^T, d exact or of first order."""
    parts, (rows, seq, heads, key, value) = module(backend, "parts.delta"), (2, 5, 2, 4, 3)
    settings = {"delta.heads": heads, "delta.key_heads": heads, "delta.key_dim": key, "delta.value_dim": value}
    layer = parts.Delta(run_of(ONE_LAYER | {"blocks": ("delta",)} | settings).model, True)
    q, k, v = (draw(f"end/{name}", rows, seq, heads, n) for name, n in (("q", key), ("k", key), ("v", value)))
    beta, g = (1 / (1 + np.exp(-draw(f"end/{name}", rows, seq, heads))) for name in ("beta", "g"))
    start, documents = draw("end/start", rows, heads, key, value), np.zeros((rows, seq), np.int32)
    documents[1] = 1  # the second begins with its block
    for rule in ("end", "first_order"):
        wanted = np.empty((rows, seq, heads, value))
        written = np.empty((rows, seq, heads, value))
        for row, head in np.ndindex(rows, heads):
            before = start[row, head] * (row == 0)
            state, left = before.copy(), np.cumprod(g[row, ::-1, head])[::-1]
            gamma = left[0] if row == 0 else 0.0
            first = gamma * start[row, head]
            for t in range(seq):
                state = g[row, t, head] * state
                d = beta[row, t, head] * (v[row, t, head] - k[row, t, head] @ state)
                written[row, t, head] = d
                state = state + np.outer(k[row, t, head], d)
                d = beta[row, t, head] * (v[row, t, head] - k[row, t, head] @ before)
                first = first + (left[t + 1] if t + 1 < seq else 1.0) * np.outer(k[row, t, head], d)
            wanted[row, :, head] = q[row, :, head] @ (state if rule == "end" else first)
        found = at_end(backend, layer, rule, q, k, v, beta, np.log(g), documents, start, written)
        assert relative_rms(found, wanted) <= CAUSAL, rule


def at_end(backend: str, layer: Any, rule: str, *given: np.ndarray) -> np.ndarray:
    """Return what the part alone reads by a rule."""
    q, k, v, beta, decay, documents, start, written = (to_device(backend, x, "float64") for x in given)
    context = SimpleNamespace(draft=Draft(None, rule), documents=documents)
    tape = DeltaTape(None, k, written, decay, start)
    return to_numpy(layer.at_end(q, k, v, beta, tape, context))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["koopman", "skc", "delta", "attention"])
def test_what_the_places_of_one_layer_read(kind: str, backend: str) -> None:
    """A block's last place reads by `end` and by open attention what it reads causally, the others do not; without
    rotations all masks see the same in open attention.
    """
    recurrent = kind != "attention"
    settings = {"blocks": (kind,), "attention.rope_dims": 0, "koopman.dim": 16}
    config, rows = run_of(ONE_LAYER | settings), tokens("reads", 2, 12, 29, 1)
    model = reader(backend, config, 5.0, dtype="float64")
    state, said = state_at(model, rows, np.array([5, 9])), {}
    for option in ("causal", "end", "first_order") if recurrent else ("causal", "open"):
        if option == "first_order" and kind != "delta":
            continue
        given: dict[str, Any] = {"rule": option} if recurrent else {"attention": option}
        said[option] = model.twin(TwinConfig(block=6, exact_anchor=False, **given)).draft(state, rows[:, 10]).logits()
    end = "end" if recurrent else "open"
    assert relative_rms(said[end][:, -1], said["causal"][:, -1]) <= CAUSAL
    assert min(relative_rms(said[end][:, i], said["causal"][:, i]) for i in range(5)) > 1e-4
    if kind == "delta":
        assert relative_rms(said["first_order"][:, -1], said["end"][:, -1]) > 1e-4
    if not recurrent:
        assert np.abs(said["open"][:, 1:] - said["open"][:, 1:2]).max() <= CAUSAL
        assert np.abs(said["causal"][:, 2] - said["causal"][:, 1]).max() > 1e-6


def test_what_a_twin_has() -> None:
    model = changed(config_of("delta_ablate").model, {"blocks": ("delta", "attention"), "layers": 2})
    weights = working_weights(model, 1.0)
    clone = twin_rows(model, TwinConfig())
    mixers = {f"twin.{name}": value.shape for name, value in weights.items() if ".mixer." in name}
    assert {name: row.shape for name, row in clone.items() if name != MASK} == mixers
    seed = TwinConfig(rank=4, full=("attention",), vectors=False, learned_mask=False)
    rows, low = twin_rows(model, seed), low_rank(model, seed)
    there = {name for name in rows if name.startswith("twin.blocks.0.mixer")}
    small = {"beta.weight", "decay.weight", "conv"}
    factors = {f"{name}.lora_{side}" for name in ("qkv", "gate", "o") for side in "ab"}
    assert there == {f"twin.blocks.0.mixer.{name}" for name in small | factors}
    assert {name for name in mixers if ".1." in name} == rows.keys() - there and MASK not in rows
    start, rest = twin_start(model, seed, weights)
    for name, one in low.items():
        whole = np.concatenate([weights[member] for member in one.members])
        made = rest[name] + scale(seed) * start[f"{name}.lora_b"] @ start[f"{name}.lora_a"]
        assert np.abs(made - whole).max() <= 1e-12 and scale(seed) == 16
        kept = np.linalg.svd(rest[name], compute_uv=False)  # the largest directions are the twin's
        assert np.allclose(kept[: -seed.rank], np.linalg.svd(whole, compute_uv=False)[seed.rank :])
    assert (twin_start(model, TwinConfig(), weights)[0][MASK] == weights["embed.weight"].mean(0, dtype=float)).all()


REFUSED = {
    "twin.alpha=1.0: twin.rank=0": {"alpha": 1.0},
    "twin.vectors=False: twin.rank=0": {"vectors": False},
    "twin.rank=-1": {"rank": -1},
    "twin.block=1: expected at least 2": {"block": 1},
    "twin.block=129: expected at most 128": {"block": 129},
    "twin.full: no layer mixes by 'skc'; this model has attention": {"rank": 2, "full": ("skc",)},
    "twin.rule=end: no layer has a use for it; it needs one of koopman, skc, delta": {"rule": "end"},
    "twin.rank=1000: two factors would be no smaller": {"rank": 1000},
    "twin.alpha=0.0: expected a positive number": {"rank": 1, "alpha": 0.0},
}


@pytest.mark.parametrize("words", REFUSED)
def test_settings_without_a_use_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        twin_rows(config_of("tiny").model, TwinConfig(**REFUSED[words]))
    with pytest.raises(ConfigError, match="attention=causal: no layer has attention"):
        TwinConfig(attention="causal").check(changed(config_of("tiny").model, {"blocks": ("koopman",)}))


def test_anchors_stand_where_a_block_fits() -> None:
    rows = np.array([[1, 5, 6, 7, 8, 9, 5, 6, 1, 7, 8, 9, 5, 6, 7, 8]])
    places = anchor_places(rows, 1, 4)
    assert np.flatnonzero(places[0]).tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11]
    drawn = draw_anchors(rows, 1, 4, 5, 0, "x")
    assert len(set(drawn[0])) == 5 and places[0, drawn[0]].all() and (np.diff(drawn[0]) > 0).all()
    assert (drawn == draw_anchors(rows, 1, 4, 5, 0, "x")).all() and (drawn != draw_anchors(rows, 1, 4, 5, 1, "x")).any()
    many = draw_anchors(rows, 1, 4, 20, 0, "x")
    assert set(many[0]) == set(np.flatnonzero(places[0])) and many.shape == (1, 20)
    assert (draw_anchors(np.ones((1, 9), int), 1, 4, 3, 0, "x") < 5).all()
    with pytest.raises(ValueError, match="more than a block of 4"):
        draw_anchors(rows[:, :4], 1, 4, 1, 0, "x")
    twin = made("tiny", "cuda").twin(TwinConfig(block=BLOCK))
    for anchors in (np.array([[26], [0]]), np.array([[-1], [0]]), np.array([[0]]), np.zeros((2, 0), int)):
        with pytest.raises(ValueError, match="a token follows every place"):
            twin.gradients(text("tiny"), anchors, WEIGHTS)
    for weights in (np.array([1.0, 0, 0, 0]), np.ones(3), -WEIGHTS):
        with pytest.raises(ValueError, match="weights of places"):
            twin.gradients(text("tiny"), np.array([[0], [0]]), weights)
