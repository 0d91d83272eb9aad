"""Attention without its own value, and head gates: layers, first tokens, gates by hand, refusals. Budget: 10 s."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from core import presets
from core.check.tolerances import P2_FLOAT64, relative_rms
from core.config import ConfigError, ModelConfig, RunConfig, changed
from core.model.params import param_table
from core.model.shares import shares
from shared_tests import oracle
from shared_tests.support import launches
from shared_tests.support.harness import (
    BACKENDS,
    call,
    draw,
    engine,
    gradients,
    mini,
    module,
    tokens,
    working_weights,
)

BOS, PLACES = 1, (0, 9, 10, 23)
TINY: dict[str, Any] = {
    "vocab": 29, "dim": 32, "layers": 3, "attention.heads": 4, "attention.kv_heads": 2, "attention.rope_dims": 4,
    "mlp.hidden": 20, "koopman.dim": 8,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "projected, the last two": {"attention.xsa": "projected", "attention.xsa_layers": 2},
    "full, with value embeddings": {
        "attention.xsa": "full", "value_embed.dim": 5, "value_embed.layers": (0, 2), "documents": "packed",
    },
    "full, then gated": {"attention.xsa": "full", "attention.head_gate": "sigmoid", "attention.head_gate_width": 5},
    "gates of all channels": {
        "attention.head_gate": "sigmoid", "attention.head_gate_width": 32, "attention.head_gate_scale": 2.0,
        "depth_damping": True, "attention.conv": True,
    },
    "last layers of another kind, shared and repeated": {
        "layers": 6, "blocks": ("attention", "koopman"), "shared_blocks": 2, "repeat_layers": (4, 5),
        "attention.xsa": "projected", "attention.xsa_layers": 2, "attention.head_gate": "double",
    },
}  # fmt: skip
"""The last one: layers 0, 2 and 4 attend by one block, and only layer 4 leaves its values out, in both its passes."""


def of(changes: dict[str, Any]) -> RunConfig:
    """Return a run of the tiny model with other settings."""
    config = presets.mini(presets.get("debug").config)
    return dataclasses.replace(config, model=changed(ModelConfig(), TINY | changes))


def rows_of(name: str) -> np.ndarray:
    """Return two rows of 29 tokens: one with documents that begin in mid-row, one that begins without a BOS."""
    rows = tokens(name, 2, 29, 29, BOS, documents=False)
    rows[0, list(PLACES)] = BOS
    return rows


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_the_right_layers_equal_the_oracle(name: str, backend: str) -> None:
    config = of(CASES[name])
    weights, rows = working_weights(config.model, 5.0), rows_of(name)
    logits = engine(backend, config, weights, dtype="float64").logits(rows)
    assert relative_rms(logits, oracle.model(config.model, weights, rows)) <= P2_FLOAT64
    plain = changed(config.model, {"attention.xsa": "none", "attention.xsa_layers": None})
    if plain != config.model:
        assert relative_rms(logits, oracle.model(plain, weights, rows)) > 1e3 * P2_FLOAT64


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["projected", "full"])
@pytest.mark.parametrize("documents", ["isolated", "packed"])
def test_a_documents_first_token_gets_nothing_from_attention(documents: str, form: str, backend: str) -> None:
    """It sees itself alone, so that y is v: a layer without its MLP adds nothing, not even rounding."""
    settings = {"layers": 1, "value_embed.dim": 5, "value_embed.layers": (0,), "documents": documents}
    config, rows = of(settings | {"attention.xsa": form}), rows_of("first tokens")
    weights = dict(working_weights(config.model, 5.0))
    weights["blocks.0.mlp_scale"] = np.zeros_like(weights["blocks.0.mlp_scale"])
    first = np.zeros(rows.shape, bool)
    first[:, 0] = True
    first[0, list(PLACES)] |= documents == "isolated"
    for options in ({"dtype": "float64"}, {"dtype": "float32", "exact": False}):
        stream = engine(backend, config, weights, **options).activations(rows)
        same = (stream["blocks.0"] == stream["embed"]).all(axis=-1)
        assert np.array_equal(same, first)


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_what_is_left_is_orthogonal_to_the_own_value(dtype: str, backend: str) -> None:
    """To 1e-6 of the lengths of y and v; and it is y - (y . u) u, head by head."""
    exclude = module(backend, "ops").exclude
    y, v, alone = draw("exclusion/y", 2, 9, 4, 8), draw("exclusion/v", 2, 9, 2, 8), np.zeros((2, 9), bool)
    (left,) = call(backend, lambda *given: exclude(*given, True), (y, v, alone), dtype)
    own = np.repeat(v, 2, axis=2)
    unit = own / np.linalg.norm(own, axis=-1, keepdims=True)
    expected = y - (y * unit).sum(-1, keepdims=True) * unit
    lengths = np.linalg.norm(y, axis=-1) + np.linalg.norm(own, axis=-1)
    assert np.abs((left * unit).sum(-1) / lengths).max() <= (1e-12 if dtype == "float64" else 1e-6)
    assert np.abs((left - expected) / lengths[..., None]).max() <= (1e-12 if dtype == "float64" else 1e-6)


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_is_finite_where_the_own_value_vanishes(backend: str) -> None:
    exclude = module(backend, "ops").exclude
    y, v, alone = draw("vanishing/y", 1, 5, 2, 8), draw("vanishing/v", 1, 5, 1, 8), np.zeros((1, 5), bool)
    v *= np.array([0.0, 1e-30, 1e-9, 1e-6, 1.0])[:, None, None]
    for first in (y, np.repeat(v, 2, axis=2)):
        given = (first, v, alone)
        out = call(backend, lambda *given: exclude(*given, True), given, "float32")
        grads = gradients(backend, lambda *given: exclude(*given, True), given, [np.ones_like(y)], "float32")
        assert set(grads) == {"0", "1"} and np.abs(grads["0"][0, 0, 0]).max() > 0
        for value in (*out, *grads.values()):
            assert np.isfinite(value).all()


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_start_at_a_half_and_at_one(backend: str) -> None:
    """A sigmoid gate halves what attention puts out, a double one is not there, until its weights move."""
    base = of({"layers": 1})
    weights, rows = dict(working_weights(base.model, 5.0)), rows_of("gates")
    weights["blocks.0.mlp_scale"] = np.zeros_like(weights["blocks.0.mlp_scale"])
    gate = np.zeros((4, 12))

    def added(changes: dict[str, Any], weights: dict[str, np.ndarray]) -> np.ndarray:
        stream = engine(backend, of({"layers": 1} | changes), weights, dtype="float64").activations(rows)
        return stream["blocks.0"] - stream["embed"]

    plain = added({}, weights)
    for form, start in (("sigmoid", 0.5), ("double", 1.0)):
        gated = added({"attention.head_gate": form}, weights | {"blocks.0.mixer.head_gate": gate})
        assert relative_rms(gated, start * plain) <= 1e-12
    gate[2, 3] = 40.0  # what enters is normalised, so that the third head is all there or all gone
    moved = added({"attention.head_gate": "double"}, weights | {"blocks.0.mixer.head_gate": gate})
    assert relative_rms(moved, plain) > 0.1


def test_a_layer_takes_few_more_launches() -> None:
    """Of a compiled step in bfloat16, there and back: 18 for the projection, 16 for the gate, 2 for all layers."""
    plain, on = mini("debug"), {"attention.xsa": "projected", "attention.head_gate": "sigmoid"}
    steps = [launches.step(dataclasses.replace(plain, model=changed(plain.model, c)))["step"] for c in ({}, on)]
    assert 2 * 20 < steps[1].total() - steps[0].total() <= 2 * 34 + 2


def test_counted_by_hand() -> None:
    base = of({}).model
    model = changed(base, CASES["projected, the last two"] | {"attention.head_gate": "double"})
    row = param_table(model)["blocks.1.mixer.head_gate"]
    assert (row.shape, row.group, row.init.kind, row.init.scale) == ((4, 12), "vector", "constant", 0.0)
    ours, bare = shares(model, 37), shares(base, 37)
    mine, theirs = ours.pop("attention"), bare.pop("attention")
    assert ours == bare and mine.state == theirs.state and mine.parameters - theirs.parameters == 3 * 4 * 12
    assert mine.flops - theirs.flops == 3 * (3 * 2 * 4 * 12 + 2 * 4 * 32)
    assert model.attention.values(model, 37, False) - base.attention.values(base, 37, False) == 2 * 32


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"xsa_layers": 2}, "xsa_layers=2: model.attention.xsa=none leaves nothing out"),
        ({"xsa": "full", "xsa_layers": 4}, "xsa_layers=4: expected 1 to 3, the number of layers"),
        ({"xsa": "full", "xsa_layers": 0}, "xsa_layers=0: expected 1 to 3, the number of layers"),
        ({"blocks": ("attention", "koopman", "koopman"), "xsa": "full", "xsa_layers": 2},
         "xsa=full: none of the last 2 layers has attention"),
        ({"blocks": ("koopman",), "xsa": "projected"}, "xsa=projected: no layer has attention"),
        ({"blocks": ("koopman",), "head_gate": "double"}, "head_gate=double: no layer has a use for it"),
        ({"head_gate": "double", "head_gate_width": 33}, "head_gate_width=33: expected 1 to 32, the width"),
        ({"head_gate": "double", "head_gate_width": 0}, "head_gate_width=0: expected 1 to 32"),
        ({"head_gate": "double", "head_gate_scale": 0.0}, "head_gate_scale=0.0: expected a positive number"),
        ({"head_gate_width": 8}, "head_gate_width=8: model.attention.head_gate=none has no use for it"),
        ({"head_gate_scale": 0.5}, "head_gate_scale=0.5: model.attention.head_gate=none has no use for it"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.attention.{words}"):
        of({key if key == "blocks" else f"attention.{key}": value for key, value in changes.items()})


def test_a_mini_leaves_out_where_its_layers_can() -> None:
    deep: dict[str, Any] = {"dim": 64, "layers": 9, "attention.head_gate": "double", "attention.head_gate_width": 64}
    for blocks, last, kept in (
        (("attention",), None, None),
        (("attention",), 7, 4),
        (("attention", "koopman", "koopman"), 3, 3),
        (("koopman", "attention", "koopman"), 2, 3),
        (("koopman", "koopman", "koopman", "koopman", "attention"), 5, None),
    ):
        config = of(deep | {"blocks": blocks, "attention.xsa": "full", "attention.xsa_layers": last})
        small = presets.mini(dataclasses.replace(config, model=changed(config.model, {"attention.heads": 2}))).model
        has = small.mixes("attention")
        assert (small.attention.xsa, small.attention.xsa_layers) == (("full", kept) if has else ("none", None))
        assert (small.attention.head_gate, small.attention.head_gate_width) == (("double", 32) if has else ("none", 12))
