"""Settings of plug-ins: one spelling in config.json, TOML, ledger keys and scores. Budget: 5 s."""

import dataclasses
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from core import presets
from core.ablation.fields import flat, put
from core.cli import _parse
from core.config import ConfigError, EvalConfig, RunConfig, from_json, to_json
from core.scoring.choices import parsed, read_value, spelled_choice, with_setting
from core.scoring.evaluation import Evaluation
from core.scoring.key import evaluation_key
from core.scoring.plugins import Plugin, foreign, load_plugins
from core.scoring.score import score
from shared_tests.support.plugin_examples import Markov

HERE = "shared_tests.scoring.test_choices"


class Sized(Plugin):
    """A plug-in with settings, as a user would write it."""

    @dataclass(frozen=True)
    class Settings:
        size: int = 3
        share: float = 0.5
        name: str = "a"
        on: bool = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings


class Bare(Plugin):
    """A plug-in without."""


@pytest.mark.parametrize("settings", [{}, {"size": 4}, {"share": 1e-3, "on": True, "name": "x y/z.w"}])
def test_what_is_spelled_is_parsed(settings: dict[str, Any]) -> None:
    choice = spelled_choice(f"{HERE}:Sized", settings)
    assert parsed(choice) == (f"{HERE}:Sized", settings)
    (plugin,) = load_plugins([choice])
    assert isinstance(plugin, Sized) and plugin.settings == Sized.Settings(**settings)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("temperature(priro=1)", "eval.plugins.temperature.priro: unknown key; did you mean prior"),
        ("temperature(prior=yes)", "eval.plugins.temperature.prior='yes': expected float"),
        ("temperature(prior=0)", "prior=0.0: expected a number above 0"),
        ("temperature(prior=NaN)", "eval.plugins.temperature.prior=nan: expected a finite number"),
        ("temperature(prior=inf)", "eval.plugins.temperature.prior=inf: expected a finite number"),
        ("temperature(prior=-Infinity)", "eval.plugins.temperature.prior=-inf: expected a finite number"),
        ("temperature(prior=1e999)", "eval.plugins.temperature.prior=inf: expected a finite number"),
        ("temperature(", r"expected NAME, or NAME\(field=value"),
        ("temperature(prior)", r"expected NAME, or NAME\(field=value"),
        ("temperature(prior=1, prior=2)", r"expected NAME, or NAME\(field=value"),
        ("temperature(prior=(1))", r"expected NAME, or NAME\(field=value"),
        ("tempratur(prior=1)", "'tempratur' is not a plug-in; did you mean temperature"),
        (f"{HERE}:Bare(size=1)", "Bare has no settings, but size was given"),
        (f"{HERE}:Sized(size=1.5)", "Sized.size=1.5: expected int, got float"),
    ],
)
def test_a_setting_that_is_not_there_is_refused(choice: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_plugins([choice])


@pytest.mark.parametrize("choices", [("temperature", "temperature"), ("temperature(prior=2)", "temperature")])
def test_a_plug_in_is_named_once(choices: tuple[str, ...]) -> None:
    """On the command line too, where a setting of its own would else join the two."""
    words = "'temperature' is named twice; name it once, with all its settings"
    with pytest.raises(ConfigError, match=words):
        load_plugins(choices)
    with pytest.raises(ConfigError, match=words):
        _parse("train", ["debug", "--eval.plugins", *choices, "--eval.plugins.temperature.prior", "3"])


def test_without_strangers_no_foreign_module_is_imported() -> None:
    assert load_plugins(["no.such.module:Class(size=1)"], strangers=False) == []
    with pytest.raises(ConfigError, match="'tempratur' is not a plug-in"):
        load_plugins(["tempratur"], strangers=False)
    with pytest.raises(ConfigError, match="no.such.module"):
        load_plugins(["no.such.module:Class"])


COMMANDS = [
    (["--eval.plugins.temperature.prior", "512"], ("temperature(prior=512)",)),
    (["--eval.plugins.temperature.prior=1e3", "--seed", "3"], ("temperature(prior=1000.0)",)),
    (["--eval.plugins", "temperature", f"{HERE}:Sized", "--seed", "3", f"--eval.plugins.{HERE}:Sized.size", "4"],
     ("temperature", f"{HERE}:Sized(size=4)")),
    ([f"--eval.plugins.{HERE}:Sized.share", "-1", f"--eval.plugins.{HERE}:Sized.on", "true"],
     (f"{HERE}:Sized(share=-1, on=true)",)),
    (["--eval.plugins", "temperature"], ("temperature",)),
    (["--eval.plugins"], ()),
]  # fmt: skip


@pytest.mark.parametrize(("words", "choices"), COMMANDS)
def test_a_command_line_gives_settings_by_name(words: list[str], choices: tuple[str, ...]) -> None:
    config = _parse("train", ["debug", *words]).config()
    assert config.eval.plugins == choices and config.seed == (3 if "3" in words else 1337)
    assert from_json(RunConfig, json.loads(json.dumps(to_json(config)))) == config
    judged = [word.replace("--eval.plugins", "--plugins").replace("--seed", "--seq") for word in words]
    assert _parse("eval", ["run", *judged]).plugins == choices


def test_a_command_line_without_a_value_is_refused() -> None:
    for words in (["--eval.plugins.temperature.prior"], ["--eval.plugins.temperature.prior", "--seed", "3"]):
        with pytest.raises(ConfigError, match="--eval.plugins.temperature.prior: expected a value"):
            _parse("train", ["debug", *words])
    with pytest.raises(ConfigError, match="eval.plugins.prior: expected eval.plugins.NAME.field"):
        _parse("train", ["debug", "--eval.plugins.prior", "3"])


@pytest.mark.parametrize(
    "settings",
    [
        {"eval.plugins.temperature.prior": 512},
        {"eval": {"plugins": {"temperature": {"prior": 512}}}},
        {"eval.plugins": ["temperature(prior=512)"]},
    ],
)
def test_toml_gives_the_same(settings: dict[str, Any]) -> None:
    values = to_json(presets.get("debug").config)
    for field, value in flat(settings, "file").items():
        put(values, field, value, "file")
    assert from_json(RunConfig, values).eval.plugins == ("temperature(prior=512)",)


def test_toml_with_no_scalar_is_refused() -> None:
    values = to_json(presets.get("debug").config)
    for value in ([1], {"a": 1}, "a,b", None):
        with pytest.raises(ConfigError, match="expected a number, true, false, or text"):
            put(values, "eval.plugins.temperature.prior", value, "file")
    with pytest.raises(ConfigError, match="expected a table of settings"):
        put(values, "eval.plugins", {"temperature": 3}, "file")


def test_a_setting_changes_what_is_predicted() -> None:
    """A strong prior holds the temperature at 1; the score names the settings."""
    engine = Markov(1.5)
    text = engine.text(2000).val
    free, bound = (
        score(engine, Evaluation(text, EvalConfig(seq=16, plugins=(choice,)), plugins=True))
        for choice in ("temperature", "temperature(prior=1000000000)")
    )
    plain = score(engine, Evaluation(text, EvalConfig(seq=16)))
    assert bound.nats == pytest.approx(plain.nats, rel=1e-4) and abs(free.nats - plain.nats) > 1e-3 * plain.nats
    assert bound.plugins == ("temperature(prior=1000000000)",)


def test_the_key_of_an_evaluation_includes_settings() -> None:
    engine: Any = SimpleNamespace(weights=lambda: {"w": np.ones(3)}, backend="mlx", dtype="float32")
    dataset: Any = SimpleNamespace(
        name="d", manifest={"splits": {}}, tokenizer=SimpleNamespace(sha256="0", transform="none")
    )

    def key(*choices: str, plugins: bool = True) -> str:
        config = dataclasses.replace(RunConfig(), eval=EvalConfig(plugins=choices))
        return evaluation_key(engine, dataset, config, plugins)

    names = [(), ("temperature",), ("temperature(prior=512)",), ("temperature(prior=511)",)]
    assert len({key(*choices) for choices in names}) == 4
    assert len({key(*choices, plugins=False) for choices in names}) == 1, "no plug-in has a part in it"


def test_whose_code_it_is_does_not_depend_on_settings() -> None:
    assert foreign(["temperature(prior=2)", "a:B(size=3)"]) == ["a:B(size=3)"]


def test_choices_keep_their_order() -> None:
    choices = with_setting(["a:B", "temperature(prior=1)", "c:D(x=1)"], "temperature.prior", 2)
    assert choices == ["a:B", "temperature(prior=2)", "c:D(x=1)"]
    assert with_setting(choices, "e.f:G.y", True)[-1] == "e.f:G(y=true)"
    assert [read_value(text) for text in ("1", "1e3", "true", "x", "[1]", "-2")] == [1, 1e3, True, "x", "[1]", -2]
