"""Feedback: where a repeat begins, what it starts as, and planted leaks of what corrects it. Budget: 10 s."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core import presets
from core.check.tolerances import CAUSAL
from core.config import ConfigError, ModelConfig, RunConfig, changed
from core.model.params import param_table, start_values
from core.model.shares import decoding_state, shares
from core.training import schedule
from shared_tests.support.harness import BACKENDS, batches, engine, mini, module, to_device, tokens, working_weights

TINY: dict[str, Any] = {
    "vocab": 29, "dim": 16, "layers": 4, "blocks": ("attention", "koopman"), "attention.heads": 2,
    "attention.kv_heads": 1, "attention.rope_dims": 4, "mlp.hidden": 12, "koopman.dim": 8, "repeat_layers": (2, 3),
    "feedback.width": 3,
}  # fmt: skip
SEQ, BOS, BLOCK = 40, 1, 8


def of(changes: dict[str, Any] | None = None) -> RunConfig:
    """Return a run of the tiny model with other settings."""
    config = presets.mini(presets.get("debug").config)
    model = changed(ModelConfig(), TINY | (changes or {}))
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, batch=2, seq=SEQ))


# Leaks: what corrects a token is mixed over time by a matrix (T, T).


def mean_of_the_row(seq: int) -> np.ndarray:
    return np.full((seq, seq), 1 / seq)


def mean_of_the_open_block(seq: int) -> np.ndarray:
    same = np.arange(seq)[:, None] // BLOCK == np.arange(seq) // BLOCK
    return same / same.sum(1, keepdims=True)


def mean_of_finished_quarters(seq: int) -> np.ndarray:
    """Nothing of a later token, but where a quarter ends depends on the length of the row."""
    part = seq // 4
    done = (np.arange(seq) // part * part)[:, None]
    return (np.arange(seq) < done) / np.maximum(done, 1)


def token_before(seq: int) -> np.ndarray:
    """Nothing of a later token, and no document rule."""
    return np.eye(seq, k=-1)


def plant(mix: Callable[[int], np.ndarray], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what corrects a token be a mean over others."""
    part = module(backend, "parts.feedback").Feedback
    honest = part.read

    def leaky(self: Any, x: Any) -> Any:
        z = honest(self, x)
        return to_device(backend, mix(z.shape[1]), "float64") @ z

    monkeypatch.setattr(part, "read", leaky)


def effects(backend: str) -> dict[str, float]:
    """Return the largest effect of a later token, of the length of the row, and of another document."""
    config = of()
    logits = engine(backend, config, working_weights(config.model, 3.0), dtype="float64").logits
    row = tokens("feedback", 1, SEQ, 29, BOS, documents=False)
    flipped = np.repeat(row, SEQ, axis=0)
    np.fill_diagonal(flipped, (row[0] + 7) % 29)
    whole = logits(np.repeat(row, SEQ, axis=0))
    later = np.tril(np.abs(logits(flipped) - whole).max(-1), -1).max()
    length = max(np.abs(logits(row[:, :k]) - whole[:1, :k]).max() for k in (7, 22, 33))
    row[0, 17] = BOS
    other = row.copy()
    other[0, 3:17] = (other[0, 3:17] + 5) % 27 + 2
    return {"flip": later, "prefix": length, "documents": np.abs(logits(other) - logits(row))[:, 17:].max()}


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "mix, seen",
    [
        (None, ()),
        (mean_of_the_row, ("flip", "prefix", "documents")),
        (mean_of_the_open_block, ("flip", "prefix", "documents")),
        (mean_of_finished_quarters, ("prefix", "documents")),
        (token_before, ("documents",)),
    ],
)
def test_planted_leaks_are_caught(
    mix: Callable | None, seen: tuple[str, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The honest part shows nothing; each leak is seen by the tests that can see it, and by no other."""
    if mix is not None:
        plant(mix, backend, monkeypatch)
    found = effects(backend)
    for test, effect in found.items():
        if test in seen:
            assert effect > 1e-4, test
        else:
            assert effect <= (CAUSAL if test == "prefix" else 0.0), test


@pytest.mark.pair
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_repeat_that_corrects_nothing_yet_is_the_pass_before(backend: str) -> None:
    """With shared scales, to the bit: switched on in the middle of a run it changes nothing at first."""
    config, rows = of({"repeat_scales": "shared"}), tokens("feedback/start", 2, SEQ, 29, BOS)
    weights = dict(working_weights(config.model, 3.0))
    for name in ("feedback.scale.weight", "feedback.shift.weight"):
        weights[name] = np.zeros_like(weights[name])
    stream = engine(backend, config, weights, dtype="float64").activations(rows)
    for layer in (2, 3):
        assert stream[f"blocks.{layer}.again"].tobytes() == stream[f"blocks.{layer}"].tobytes()
    assert stream["feedback.2.again"].tobytes() == stream["blocks.1"].tobytes()
    bare = changed(config.model, {"repeat_layers": (), "repeat_scales": "own", "feedback.width": 0})
    fewer = {name: value for name, value in weights.items() if not name.startswith("feedback")}
    plain = engine(backend, dataclasses.replace(config, model=bare), fewer, dtype="float64")
    assert plain.logits(rows).tobytes() == stream["logits"].tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_of_it_learns_by_the_second_step(backend: str) -> None:
    """Scale and shift are the branch's zero factors: they move in the first step, what they read in the second."""
    config = of()
    weights = start_values(config.model, 0)
    for branch in ("mixer_scale", "mlp_scale"):
        assert all((weights[f"blocks.{i}.{branch}"] == 1).all() for i in range(4)), "a repeat's scales start at 1"
    made, moved = engine(backend, config, weights, dtype="float64"), []
    for step, batch in enumerate(batches(config, 2)):
        before = made.params()
        made.train_step(batch, schedule.plan(step, 0.5, config.train)).result()
        after = made.params()
        moved.append({name for name in before if name.startswith("feedback") and (before[name] != after[name]).any()})
    assert moved[1] == {f"feedback.{name}.weight" for name in ("pool", "scale", "shift")}
    assert {"feedback.scale.weight", "feedback.shift.weight"} <= moved[0]


def test_repeats_come_every_so_often() -> None:
    train = dataclasses.replace(of().train, repeat_from=0.5, repeat_every=3)
    planned = [schedule.plan(step, (step + 1) / 12, train).repeat for step in range(12)]
    assert [step for step, repeat in enumerate(planned) if repeat] == [6, 9]


def test_counted_by_hand() -> None:
    plain, model = of({"feedback.width": 0, "repeat_times": 2}).model, of({"repeat_times": 2}).model
    table, width = param_table(model), {"feedback.pool.weight": (3, 16)}
    width |= {f"feedback.{name}.weight": (16, 3) for name in ("scale", "shift")}
    assert {name: row.shape for name, row in table.items() if name not in param_table(plain)} == width
    ours, theirs = shares(model, 40), shares(plain, 40)
    mine = ours.pop("feedback")
    assert mine.parameters == 3 * 48 and mine.flops == 3 * 2 * 2 * 3 * 48, "two repeats"
    assert ours == theirs and decoding_state(model) == decoding_state(plain)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"repeat_layers": ()}, "feedback.width=3: no pass comes after another; name layers in model.repeat_layers"),
        ({"repeat_order": "at_once"}, "feedback.width=3 corrects a whole pass, with model.repeat_order=at_once"),
        ({"feedback.width": -1}, "feedback.width=-1: expected a number from 0 up"),
        ({"share_order": "mirror"}, "share_order=mirror: expected model.shared_blocks=2 for 4 layers, not None"),
        ({"share_order": "mirror", "shared_blocks": 3}, "share_order=mirror: expected model.shared_blocks=2 for 4"),
        ({"share_order": "mirror", "shared_blocks": 2},
         "share_order=mirror: layers 0 and 3 are of kinds attention and koopman: they share a block"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.{words}"):
        of(changes)


def test_a_run_that_repeats_nothing_is_told_so() -> None:
    for name, value in (("repeat_every", 2), ("untie_from", 0.5)):
        with pytest.raises(ConfigError, match=f"^train.{name}={value}: expected"):
            changed(mini("debug"), {f"train.{name}": value})
    with pytest.raises(ConfigError, match="^train.repeat_every=0: expected at least 1"):
        changed(mini("debug"), {"train.repeat_every": 0})


def test_mirrored_layers_share_blocks_from_both_ends() -> None:
    for layers in (1, 4, 5):
        half = (layers + 1) // 2
        model = changed(ModelConfig(), {"layers": layers, "shared_blocks": half, "share_order": "mirror"})
        blocks = [model.block_of(layer) for layer in range(layers)]
        assert blocks == blocks[::-1] and blocks[:half] == list(range(half))
        assert [model.uses_of(block)[0] for block in range(half)] == [blocks.count(block) for block in range(half)]
    deep = changed(mini("debug"), {"model.layers": 9, "model.shared_blocks": 5, "model.share_order": "mirror"})
    small = presets.mini(deep).model
    assert (small.layers, small.shared_blocks, small.share_order) == (4, 2, "mirror")
