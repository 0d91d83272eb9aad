"""How a command that scores a run replaces settings of its score: `--eval.NAME`, as in `skc train`, or a short form."""

import dataclasses
import shlex
import typing
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from tyro.conf import arg

from core.config import ConfigError, EvalConfig, changed
from core.scoring.plugins import foreign

STRIDES = 4
"""Parts of a sliding window, of which the last is scored, where nobody gives a stride."""
SHORT = ("windows", "seq", "stride", "documents", "batch", "plugins")
"""Settings that have a short form: --seq is --eval.seq."""


def unchecked(kind: type) -> type:
    """Return dataclass `kind` without its checks: a command line has a part of the settings, the run has the others."""
    hints, fields = typing.get_type_hints(kind, include_extras=True), []
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            inner = unchecked(hints[f.name])
            fields.append((f.name, inner, dataclasses.field(default_factory=inner)))
        else:
            hint = Annotated[hints[f.name], arg(help_behavior_hint="(default: the run's)")]
            fields.append((f.name, hint, dataclasses.field(default=f.default)))
    namespace = {"__post_init__": lambda self: None, "__doc__": kind.__doc__}
    return dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), namespace=namespace, frozen=True)


if TYPE_CHECKING:
    Unchecked = EvalConfig
else:
    Unchecked = unchecked(EvalConfig)


class Options(Protocol):
    """What a verb's options have for this, beside the short forms."""

    @property
    def eval(self) -> EvalConfig:
        """Settings by their long names; those that are not in `given` say nothing."""
        ...

    @property
    def given(self) -> tuple[str, ...]:
        """Options that the command line has."""
        ...


def judged(base: EvalConfig, options: Options, path: str) -> EvalConfig:
    """Return the settings of a score: those that a file brought (`path`: the run's), less what this command replaces.

    ConfigError where two options give one setting two values, and where the file names plug-ins whose code is not
    ours: it runs only where the command itself names it.
    """
    given = _given(options)
    strangers = foreign(base.plugins)
    if strangers and "plugins" not in given:
        raise ConfigError(
            f"{path}: its config.json names a plug-in that is not ours ({', '.join(strangers)}), whose code runs only "
            f"if you name it: add --plugins {shlex.join(base.plugins)}, or --plugins alone to score without any"
        )
    kind = given.get("adapt.kind", base.adapt.kind)
    if given.get("stride") is not None and kind == "lora":
        raise ConfigError(
            f"eval.stride={given['stride']} changes nothing with eval.adapt.kind=lora, whose windows end with a chunk: "
            "leave it out, or set eval.adapt.chunk"
        )
    if "stride" not in given:
        windows, seq = given.get("windows", base.windows), given.get("seq", base.seq)
        if given.get("windows") in ("plain", "stateful"):
            given["stride"] = None
        elif windows == "sliding" and base.stride is None:
            given["stride"] = max(1, seq // STRIDES)
    return changed(of_kind(base, kind), given)


def of_kind(config: EvalConfig, kind: str) -> EvalConfig:
    """Return settings of which another kind of adaptation can be made: those of the old kind are at their defaults."""
    return config if kind == config.adapt.kind else dataclasses.replace(config.plain(), plugins=config.plugins)


def _given(options: Options) -> dict[str, Any]:
    """Return dotted setting -> value of what the command line gives."""
    given: dict[str, Any] = {}
    for option in options.given:
        if option.startswith("--eval."):
            name = option.removeprefix("--eval.").replace("-", "_")
            given[name] = _value(options.eval, name)
    for name in SHORT:
        value = getattr(options, name, None)
        if value is None:
            continue
        value = None if value == "all" else value
        if given.get(name, value) != value:
            theirs = f"eval.{name}={_words(given[name])}"
            raise ConfigError(f"--{name} {_words(value)} and {theirs} are two values of one setting: give one")
        given[name] = value
    return given


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def _words(value: Any) -> str:
    """Return a value as a command line has it."""
    return shlex.join(map(str, value)) if isinstance(value, tuple) else "all" if value is None else str(value)
