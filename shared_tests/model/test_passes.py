"""Which passes a model makes, what its skips pair, and what its trunk counts: tables by hand. Budget: 2 s."""

import dataclasses
from collections import Counter
from typing import Any

import pytest

from core import presets
from core.config import ConfigError, ModelConfig, RunConfig, changed
from core.model.params import count, param_table
from core.model.shares import decoding_state, flops_per_token
from core.model.table import Init, vector

RECORD: dict[str, Any] = {
    "vocab": 8192, "dim": 512, "layers": 11, "attention.heads": 8, "attention.kv_heads": 4, "mlp.hidden": 2048,
    "residual_mix": True, "depth_damping": True, "skips.on": True, "head.bias": False,
}  # fmt: skip
"""What the records have in common."""
LOOP: dict[str, Any] = {"repeat_layers": (3, 4, 5), "repeat_times": 2, "repeat_scales": "shared"}
OVER: dict[str, Any] = {"skips.gates": True, "skips.over": "passes"}
AT_ONCE: dict[str, Any] = {"repeat_layers": (3, 4, 5), "repeat_order": "at_once", "repeat_scales": "shared"}
GATED = ("attention",) * 7 + ("attention_gated",) * 4


def of(*changes: dict[str, Any]) -> ModelConfig:
    """Return the records' common model with some changes."""
    model = changed(ModelConfig(), RECORD)
    for change in changes:
        model = changed(model, change)
    return model


def order(model: ModelConfig, repeat: bool) -> list[int]:
    """Return the layers in the order in which they run."""
    return [stage.layer for stage in model.stages(repeat) if stage.part == "layer"]


def pairs(model: ModelConfig, repeat: bool) -> dict[int, tuple[int, int]]:
    """Return row -> the passes (from 0) behind which a skip is pushed, and in front of which it is added."""
    done, stack, found = 0, [], {}
    for stage in model.stages(repeat):
        done += stage.part == "layer"
        if stage.part == "skips" and stage.row < 0:
            stack.append(done - 1)
        elif stage.part == "skips":
            assert stage.row not in found
            found[stage.row] = (stack.pop(), done)
    assert not stack, "what is pushed is added"
    return found


def test_passes_stand_in_the_order_of_the_records() -> None:
    looped = [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert order(of(LOOP), True) == looped and len(looped) == 17
    assert order(of(LOOP, {"repeat_layers": (4, 5)}), True) == [0, 1, 2, 3, 4, 5, 4, 5, 4, 5, 6, 7, 8, 9, 10]
    assert order(of(AT_ONCE), True) == [0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9, 10]
    assert order(of(AT_ONCE, {"repeat_times": 2}), True) == [0, 1, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 7, 8, 9, 10]
    for changes in (LOOP, AT_ONCE):
        assert order(of(changes), False) == list(range(11))


@pytest.mark.parametrize(
    "again, before, after",
    [
        # 17 passes: 8 push and 9 take, of which the last takes nothing.
        ((3, 4, 5), 5, [(7, 8), (6, 9), (5, 10), (4, 11), (3, 12), (2, 13), (1, 14), (0, 15)]),
        # 15 passes: 7 and 8.
        ((4, 5), 5, [(6, 7), (5, 8), (4, 9), (3, 10), (2, 11), (1, 12), (0, 13)]),
    ],
)
def test_skips_over_passes_pair_passes(again: tuple[int, ...], before: int, after: list[tuple[int, int]]) -> None:
    """Row 0 always pairs neighbours; while repeats are off the rows are the first ones, over layers alone."""
    model = of(LOOP, OVER, {"repeat_layers": again})
    assert pairs(model, True) == dict(enumerate(after))
    assert pairs(model, False) == dict(enumerate([(4, 5), (3, 6), (2, 7), (1, 8), (0, 9)]))
    assert param_table(model)["skips.weight"].shape == param_table(model)["skips.gate"].shape == (len(after), 512)
    if again == (3, 4, 5):  # rows 0 and 1 pair the same layers before and after
        layers = order(model, True)
        assert [tuple(layers[p] for p in after[row]) for row in (0, 1)] == [(4, 5), (3, 3)]


def test_skips_over_layers_know_no_repeats() -> None:
    """A layer that is repeated behind others pushes behind its first pass, one repeated at once behind its last."""
    assert pairs(of(), True) == pairs(of(LOOP), False) == dict(enumerate([(4, 5), (3, 6), (2, 7), (1, 8), (0, 9)]))
    assert pairs(of(LOOP), True) == dict(enumerate([(4, 5), (3, 12), (2, 13), (1, 14), (0, 15)]))
    assert pairs(of(AT_ONCE), True) == dict(enumerate([(6, 7), (4, 9), (2, 10), (1, 11), (0, 12)]))
    assert pairs(of({"layers": 4}), True) == {0: (1, 2), 1: (0, 3)}
    assert pairs(of({"layers": 1}), True) == {}


def test_every_pass_has_its_label_and_its_rows() -> None:
    """Own scales: rows of a block's layers, then of its repeats in their order; shared ones: those of the layer."""
    loop: dict[str, Any] = {"layers": 5, "shared_blocks": 3, "repeat_layers": (0, 1, 2, 3), "repeat_times": 2}
    for scales in ("own", "shared"):
        model = of(loop, OVER, {"repeat_scales": scales, "repeat_blend": True})
        stages = model.stages(True)
        assert max(Counter(stage.label for stage in stages).values()) == 1
        block = [stage for stage in stages if stage.name == "blocks.0"]
        assert [stage.layer for stage in block] == [0, 3, 0, 3, 0, 3]
        assert [stage.row for stage in block] == ([0, 1, 2, 3, 4, 5] if scales == "own" else [0, 1, 0, 1, 0, 1])
        assert [stage.repeat for stage in block] == [-1, -1, 0, 1, 2, 3]
        table = param_table(model)
        assert table["blocks.0.blend"] == vector(4, init=0.5) and table["blocks.2.blend"] == vector(2, init=0.5)
        rows, first = (6, 512) if scales == "own" else (2, 512), Init("rows", 1.0, 2)
        assert table["blocks.0.mixer_scale"] == table["blocks.0.mlp_scale"] == vector(*rows, init=first)
    labels = [stage.label for stage in of(LOOP).stages(True) if stage.layer == 4]
    assert labels == ["blocks.4", "skips.4", "blocks.4.again", "blocks.4.again.again"]


def test_lanes_begin_in_front_of_the_skip_and_end_behind_the_last_layer() -> None:
    stages = of(LOOP, OVER, {"lanes.start": 8}).stages(True)
    assert [stage.label for stage in stages[-10:]] == [
        "blocks.7", "lanes", "skips.8", "blocks.8", "lanes.8", "skips.9", "blocks.9", "lanes.9", "blocks.10",
        "lanes.10",
    ]  # fmt: skip
    assert [stage.row for stage in stages if stage.part == "lanes"] == [-1, 8, 9, 10]
    stages = of({"layers": 2, "lanes.start": 0}).stages(True)  # what a layer pushes has its branches in it
    labels = ["lanes", "blocks.0", "lanes.0", "skips.0", "skips.1", "blocks.1", "lanes.1"]
    assert [stage.label for stage in stages] == labels


@pytest.mark.parametrize(
    "parameters, changes",
    [
        (35_943_512, {**LOOP, **OVER, "repeat_layers": (4, 5)}),
        (35_944_536, {**LOOP, **OVER, "blocks": ("attention",) * 7 + ("attention_parallel",) * 4}),
        (
            35_989_658,
            {**LOOP, **OVER, "lanes.start": 8, "attention.head_gate": "sigmoid", "attention.head_gate_width": 512},
        ),
        (34_401_371, {"vocab": 4096, "skips.gates": True, "value_embed.dim": 128, "value_embed.layers": (9, 10)}),
    ],
)
def test_the_records_counts(parameters: int, changes: dict[str, Any]) -> None:
    """Counts that the records' logs give."""
    assert count(of(changes)) == parameters


def test_what_each_form_adds() -> None:
    """To the count, by hand; 66 values of lanes for 11 layers, whichever they begin at."""
    base = count(of())
    assert count(of({"lanes.start": 8})) - base == 66
    table = param_table(of({"lanes.start": 8}))
    assert (table["lanes.write"], table["lanes.keep"]) == (vector(11, 2, 2, init=1.0), vector(11, 2, init=1.1))
    assert count(of({"blocks": GATED})) - base == 4
    assert count(of(AT_ONCE, {"repeat_blend": True})) - base == 3
    assert count(of(AT_ONCE)) == count(of({"blocks": ("attention_parallel",)})) == base
    assert count(of(LOOP)) == base and count(of(LOOP, {"repeat_scales": "own"})) - base == 6 * 4 * 512
    assert count(of({"skips.gates": True})) - base == 5 * 512
    assert count(of(LOOP, OVER)) - base == (2 * 8 - 5) * 512


def test_every_pass_is_counted_in_flops_and_state() -> None:
    once, looped = of(), of(LOOP, OVER)
    layer = once.attention.flops(once, 64) + 2 * (2 * 512 * 512 + 2 * 512 * 256 + 2 * 512 * 2048)
    assert flops_per_token(looped, 64) - flops_per_token(once, 64) == 3 * 6 * layer
    assert decoding_state(looped).per_token * 11 == decoding_state(once).per_token * 17


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"repeat_times": 2}, "repeat_times=2: name layers to repeat in model.repeat_layers"),
        ({"repeat_scales": "shared"}, "repeat_scales=shared: name layers to repeat"),
        ({"repeat_order": "at_once"}, "repeat_order=at_once: name layers to repeat"),
        ({"repeat_blend": True}, "repeat_blend=True: name layers to repeat"),
        ({**LOOP, "repeat_times": 0}, "repeat_times=0: expected at least 1"),
        ({**LOOP, "repeat_times": 17}, "repeat_times=17: expected at most 16"),
        ({"skips.on": False, "skips.gates": True}, "skips.gates=True: set model.skips.on too"),
        ({**LOOP, "skips.on": False, "skips.over": "passes"}, "skips.over=passes: set model.skips.on too"),
        ({"skips.over": "passes"}, "skips.over=passes: model.repeat_layers names none"),
        ({"lanes.start": 11}, "lanes.start=11: expected a layer from 0 to 10"),
        ({"lanes.start": -1}, "lanes.start=-1: expected a layer from 0 to 10"),
        ({"lanes.start": 8, "shared_blocks": 11}, "lanes.start=8: .* leave out model.shared_blocks=11"),
        (
            {"lanes.start": 6, "blocks": GATED},
            "lanes.start=6: layer 7 is of kind attention_gated, expected attention layers from there on",
        ),
        ({**LOOP, "lanes.start": 5}, r"lanes.start=5: model.repeat_layers=\(3, 4, 5\) must end before it"),
        ({**LOOP, "lanes.start": 2}, r"lanes.start=2: model.repeat_layers=\(3, 4, 5\) must end before it"),
        ({"lanes.start": 8, "engram.orders": 1, "engram.layer": 8, "engram.buckets": 9000}, "lanes.start=8: .*engram"),
        ({"lanes.start": 5, "bank.at": "both"}, "lanes.start=5: model.bank.at=both would add to one lane only"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^model.{words}"):
        of(changes)


def test_what_can_be_built_is_not_refused() -> None:
    """The bounds from the other side, and minis of all of it."""
    base = presets.get("debug").config
    for changes in (
        {**LOOP, **OVER, "lanes.start": 6},
        {"lanes.start": 0},
        {"lanes.start": 10, "engram.orders": 1, "engram.layer": 9, "engram.buckets": 9000, "bank.at": "both"},
        {"lanes.start": 7, "blocks": ("attention",) * 10 + ("koopman",), "layers": 10},
        {**AT_ONCE, "repeat_blend": True, "blocks": GATED},
        {**LOOP, "repeat_times": 16, "repeat_layers": tuple(range(11)), "lanes.start": None},
    ):
        model = of(changes)
        small = presets.mini(dataclasses.replace(base, model=model)).model
        assert isinstance(RunConfig(model=small), RunConfig) and small.layers == 4
        start = small.lanes.start
        assert (start is None) == (model.lanes.start is None)
        assert start is None or (start <= 3 and all(i < start for i in small.repeat_layers))
