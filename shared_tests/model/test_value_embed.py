"""Value embeddings of several layers: oracle, gains, counts by hand, start, and what is refused. Budget: 5 s."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from core import presets
from core.check.tolerances import P2_FLOAT64, relative_rms
from core.config import ConfigError, ModelConfig, RunConfig, changed
from core.model.params import count, param_table
from core.model.shares import Share, shares
from shared_tests import oracle
from shared_tests.support.harness import BACKENDS, engine, tokens, working_weights
from shared_tests.support.one_layer import run_of

TINY: dict[str, Any] = {
    "vocab": 29, "dim": 32, "layers": 4, "attention.heads": 4, "attention.kv_heads": 2, "attention.rope_dims": 4,
    "mlp.hidden": 20, "koopman.dim": 8, "value_embed.dim": 5,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "three": {"value_embed.layers": (0, 2, 3)},
    "beside recurrent layers": {"blocks": ("koopman", "attention"), "value_embed.layers": (1, 3)},
    "shared and repeated": {"shared_blocks": 2, "repeat_layers": (1, 2), "value_embed.layers": (1, 3)},
}
"""Blocks that are shared: layers 0 and 2, and layers 1 and 3; layer 1 passes twice with one gain."""


def of(changes: dict[str, Any]) -> RunConfig:
    """Return a run of the tiny model with value embeddings."""
    return run_of(TINY | changes)


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_every_chosen_layer_adds_its_own(name: str, backend: str) -> None:
    """As the oracle does, and every gain counts."""
    config = of(CASES[name])
    weights, rows = dict(working_weights(config.model, 5.0)), tokens("value_embed", 2, 29, 29, 1)
    made = engine(backend, config, weights, dtype="float64")
    before = made.logits(rows)
    assert relative_rms(before, oracle.model(config.model, weights, rows)) <= P2_FLOAT64
    for i in range(len(config.model.value_embed.layers)):
        gains = weights["value_embed.gains"].copy()
        gains[i] += 0.5
        other = weights | {"value_embed.gains": gains}
        made.load_params(other)
        found = made.logits(rows)
        assert relative_rms(found, oracle.model(config.model, other, rows)) <= P2_FLOAT64
        assert relative_rms(found, before) > 1e3 * P2_FLOAT64, i


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fresh_model_is_the_one_without(backend: str) -> None:
    """No factor of it starts at 0, but the output projection of attention does."""
    config, rows = of(CASES["three"]), tokens("value_embed", 2, 29, 29, 1)
    bare = of({"value_embed.dim": 0})
    ours, theirs = (engine(backend, c, dtype="float64").logits(rows) for c in (config, bare))
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_are_read_by_their_ids_alone(backend: str) -> None:
    """Other numbers for the same tokens, in the text and in the tables, are the same model."""
    config, rows = of(CASES["three"] | {"attention.xsa": "full"}), tokens("value_embed", 2, 29, 29, 1)
    weights, other = dict(working_weights(config.model, 5.0)), np.roll(np.arange(29), 7)
    other[[1, 8]] = other[[8, 1]]  # a BOS stays one
    assert other[1] == 1 and sorted(other) == list(range(29))
    moved = weights | {name: weights[name][np.argsort(other)] for name in ("embed.weight", "value_embed.table")}
    before, after = (
        engine(backend, config, w, dtype="float64").logits(r) for w, r in ((weights, rows), (moved, other[rows]))
    )
    assert relative_rms(after[..., other], before) <= P2_FLOAT64


def test_counted_by_hand() -> None:
    """One table and one projection for all layers; looking up takes no products."""
    model = of(CASES["three"]).model
    ours, bare = shares(model, 37), shares(of({"value_embed.dim": 0}).model, 37)
    table, proj, vectors = 29 * 5, 16 * 5, 1 + 3
    assert ours.pop("value_embed") == Share(table + proj + vectors, 2 * (table + proj + vectors), 3 * 2 * proj)
    assert ours == bare
    rows = {name: row for name, row in param_table(model).items() if name.startswith("value_embed.")}
    assert {name.removeprefix("value_embed."): (row.shape, row.group) for name, row in rows.items()} == {
        "table": ((29, 5), "embed"), "proj.weight": ((16, 5), "matrix"), "scale": ((1,), "vector"),
        "gains": ((3,), "vector"),
    }  # fmt: skip


def test_a_record_with_value_embeddings_has_its_logged_count() -> None:
    """27,067,484 of pull request 1019, 163,843 of them here."""
    model = changed(ModelConfig(), {
        "vocab": 1024, "dim": 512, "layers": 11, "residual_mix": True, "attention.heads": 8, "attention.kv_heads": 4,
        "mlp.hidden": 1536, "skips.on": True, "bigram.buckets": 3072, "bigram.dim": 112, "bigram.scale": 0.05,
        "smear.on": True, "value_embed.dim": 128, "value_embed.layers": (9, 10), "attention.xsa": "projected",
    })  # fmt: skip
    assert count(model) == 27_067_484
    rows = {name: row for name, row in param_table(model).items() if name.startswith("value_embed.")}
    assert sum(row.size for row in rows.values()) == 1024 * 128 + 256 * 128 + 1 + 2
    starts = {name.removeprefix("value_embed."): (row.init.kind, row.init.scale) for name, row in rows.items()}
    assert starts == {
        "table": ("normal", 0.01), "proj.weight": ("normal", 0.02), "scale": ("constant", 0.1),
        "gains": ("constant", 1.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"value_embed.layers": ()}, "dim=5: no layer reads the table"),
        ({"value_embed.dim": 0, "value_embed.layers": (1,)}, r"layers=\(1,\): set model.value_embed.dim"),
        ({"value_embed.dim": -1, "value_embed.layers": (1,)}, "dim=-1: expected a number from 0 up"),
        ({"value_embed.layers": (1, 4)}, r"layers=\(1, 4\): expected layers from 0 to 3"),
        ({"value_embed.layers": (-1,)}, r"layers=\(-1,\): expected layers from 0 to 3"),
        ({"value_embed.layers": (2, 1)}, r"layers=\(2, 1\): expected rising numbers, each layer once"),
        ({"value_embed.layers": (2, 2)}, r"layers=\(2, 2\): expected rising numbers, each layer once"),
        (
            {"blocks": ("attention", "skc_parallel"), "value_embed.layers": (0, 1)},
            r"layers=\(0, 1\): layer 1 is of kind skc_parallel, expected attention layers",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.value_embed.{words}"):
        of(changes)


def test_a_mini_keeps_what_its_layers_can_use() -> None:
    deep = {"dim": 64, "layers": 9, "value_embed.dim": 24}
    for blocks, layers, kept in (
        (("attention",), (6, 7, 8), (0, 1, 2)),
        (("koopman", "attention"), (1, 3, 5, 7), (1, 3)),
        (("koopman", "skc", "skc", "koopman", "attention"), (4,), ()),
    ):
        config = of(deep | {"blocks": blocks, "value_embed.layers": layers})
        small = presets.mini(dataclasses.replace(config, model=changed(config.model, {"attention.heads": 2}))).model
        assert small.value_embed.layers == kept and small.value_embed.dim == (12 if kept else 0)
