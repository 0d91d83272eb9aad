"""Scopes: the words, names and patterns that say which weights learn; what matches nothing is refused. Budget: 3 s."""

import re

import pytest

from core import presets
from core.config import ConfigError, changed
from core.model.params import param_table
from core.model.scopes import SCOPES, loose_names
from core.scoring.evaluation import Evaluation
from shared_tests.support.harness import EVERYTHING, mini


def test_none_is_all_in_the_order_of_the_table() -> None:
    config = mini(EVERYTHING).model
    assert loose_names(config, ()) == loose_names(config, ("all",)) == tuple(param_table(config))
    both = loose_names(config, ("scales", "embed", "blocks.0.*"))
    assert list(both) == [name for name in param_table(config) if name in both], "order of the table"
    parts = [set(loose_names(config, (one,))) for one in ("scales", "embed", "blocks.0.*")]
    assert set(both) == set.union(*parts)


@pytest.mark.parametrize("preset", [EVERYTHING, "skc_mac", "pr1855", "debug"])
def test_scales_are_vectors_and_skc_safe_adds_four_kinds(preset: str) -> None:
    config = mini(preset).model
    table = param_table(config)
    scales, safe = (set(loose_names(config, (scope,))) for scope in ("scales", "skc_safe"))
    assert all(table[name].group == "vector" for name in safe)
    kinds = {"decay_bias", "conv", "bands", "rate"}
    assert {name.rpartition(".")[2] for name in safe - scales} == kinds & {name.rpartition(".")[2] for name in table}
    for name in table:  # every scale, mix, gain and gate of a layer, by its name
        if re.search(r"(mixer_scale|mlp_scale|_mix|gain|gate|\.scale)$", name):
            assert name in scales, name


def test_the_other_words() -> None:
    config = mini(EVERYTHING).model
    table = param_table(config)
    assert loose_names(config, ("embed",)) == ("embed.weight",)
    assert loose_names(config, ("engram",)) == ("engram.table",)
    assert set(loose_names(config, ("bank",))) == {name for name in table if name.startswith("bank_")}
    feedback = set(loose_names(config, ("feedback",)))
    upper = {config.block_of(i) for i in range(config.layers // 2, config.layers)}
    own = {name for name in table if name.startswith("feedback.")}
    scales = {n for n in loose_names(config, ("scales",)) if n.startswith("blocks.") and int(n.split(".")[1]) in upper}
    assert feedback == own | scales and own and scales and len(upper) < (config.shared_blocks or config.layers)


def test_first_layers_are_left_alone() -> None:
    config = mini("ablate_float").model
    shared = changed(config, {"layers": 4, "shared_blocks": 2})
    for given, frozen, left in ((config, 1, {"blocks.0"}), (shared, 1, {"blocks.0"}), (shared, 0, set())):
        names = loose_names(given, (), frozen)
        missing = {".".join(name.split(".")[:2]) for name in param_table(given) if name not in names}
        assert missing == left
    assert "embed.weight" in loose_names(config, (), config.layers)


@pytest.mark.parametrize(
    "params, frozen, message",
    [
        (("skc_saef",), 0, "eval.adapt.params='skc_saef': this model has no such weights; did you mean skc_safe"),
        (("bank",), 0, r"params='bank': .*a pattern such as \*.q.weight, or one of the scopes: scales"),
        (("feedback",), 0, "params='feedback': this model has no such weights"),
        (("embed", "blocks.9.*"), 0, r"params='blocks.9.\*'"),
        (("embed.weigth",), 0, "did you mean embed.weight"),
        (("blocks.0.*",), 1, "eval.adapt.frozen=1 leaves none of eval.adapt.params=blocks.0"),
        ((), 99, "eval.adapt.frozen=99: the model has"),
    ],
)
def test_what_matches_nothing_is_refused(params: tuple[str, ...], frozen: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        loose_names(mini("debug").model, params, frozen)
    assert "\n" not in str(refused.value)
    if "scopes" in message:
        present = str(refused.value).rpartition(": ")[2].split(", ")
        assert set(present) == {scope for scope in SCOPES if scope not in ("bank", "engram", "feedback")}


def test_an_evaluation_knows_which_weights_learn() -> None:
    config = presets.get("debug").config
    sgd = {"eval.adapt.kind": "sgd", "eval.adapt.reset": "never", "eval.adapt.params": ("embed",)}
    lora = {
        "eval.windows": "documents",
        "eval.adapt.kind": "lora",
        "eval.phases.at": (0.5,),
        "eval.phases.params": ("blocks.*",),
    }
    for changes, expected in ((sgd, ("embed",)), (lora, ("blocks.*",)), ({}, None)):
        run = changed(config, changes)
        names = loose_names(run.model, expected) if expected else ()
        assert Evaluation.of(None, run, plugins=True).loose == names  # type: ignore[arg-type]
        assert Evaluation.of(None, run).loose == ()  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"eval.phases.params='x\*': this model has no such weights"):
        Evaluation.of(None, changed(config, {**lora, "eval.phases.params": ("x*",)}), plugins=True)  # type: ignore[arg-type]
