"""Short forms of the settings that people change most: `--steps 200` for `--train.steps 200`.

They are rewritten before the command line is read, so that a run, its checks and its records know the settings alone.
`skc ablate`, which has no settings of its own, has options of these names (docs/command_line.md).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from core.command_line.options import hyphened
from core.config import MOST_STEPS, ConfigError, RunConfig

RATES = ("lr_embed", "lr_matrix", "lr_vector", "lr_hash")
CONFIG = "--config"
HELP_ALL = "--help-all"


class Short(NamedTuple):
    """What a short form stands for."""

    settings: tuple[str, ...]
    """Options by their long names."""
    verbs: tuple[str, ...]
    """Verbs in which it is rewritten."""
    kind: str
    """Its value, as help shows it."""
    purpose: str
    default: Callable[[RunConfig], Any]
    """What it has where it is not given."""


SHORT = {
    "--steps": Short(("--train.steps",), ("train",), "INT", "Steps of training.", lambda c: c.train.steps),
    "--seconds": Short(
        ("--train.seconds",), ("train",), "FLOAT",
        "Seconds of training, however many steps that is; with --steps whichever comes first.",
        lambda c: c.train.seconds,
    ),
    "--batch": Short(
        ("--train.batch",), ("train", "bench", "parity"), "INT", "Rows of a step.", lambda c: c.train.batch
    ),
    "--seq": Short(
        ("--train.seq",), ("train", "info", "bench", "parity"), "INT",
        "Tokens of a row in training; scores keep --eval.seq, so that they can be compared.", lambda c: c.train.seq,
    ),
    "--data": Short(
        ("--data.path",), ("train", "info", "parity"), "PATH",
        "Text (a file, a folder, a pattern in quotes), or a prepared folder.", lambda c: c.data.path,
    ),
    "--lr": Short(
        tuple(f"--train.{name}".replace("_", "-") for name in RATES), ("train", "parity"), "FACTOR",
        "All learning rates times this.", lambda c: 1,
    ),
    "--storage": Short(
        ("--model.matrix-storage",), ("train", "info", "bench", "parity"), "STR",
        "How matrices are stored: ternary, int4/row to int8/row, fp8, float16.", lambda c: c.model.matrix_storage,
    ),
    "--blocks": Short(
        ("--model.blocks",), ("train", "info", "bench", "parity"), "STR ...",
        "Kinds of layers, one or more, repeated in this order.", lambda c: " ".join(c.model.blocks),
    ),
}  # fmt: skip
OWN = ("--out", "--seed", "--backend")
"""Short forms that are options of the verbs themselves."""
SHORTENED = ("train", "info", "bench", "parity", "ablate")
"""Verbs whose help is short."""


def of_verb(verb: str) -> dict[str, Short]:
    """Return the short forms that are rewritten in a verb."""
    return {name: short for name, short in SHORT.items() if verb in short.verbs}


def lengthened(verb: str, arguments: Sequence[str], base: RunConfig) -> list[str]:
    """Return a command line with settings in place of short forms; ConfigError for a setting that is given twice.

    `base` has the learning rates that --lr multiplies.
    """
    mine, there = of_verb(verb), {hyphened(word.partition("=")[0]) for word in arguments if word.startswith("--")}
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        short = mine.get(hyphened(name)) if name.startswith("--") else None
        if short is None:
            words.append(word)
            continue
        twice = next((setting for setting in short.settings if setting in there), None)
        if twice:
            raise ConfigError(f"{name} and {twice} are two values of one setting: give one")
        if hyphened(name) == "--lr":
            words += _multiplied(value if equals else next(rest, ""), base)
            continue
        words.append(f"{short.settings[0]}{equals}{value}")
        if hyphened(name) == "--seconds" and not {"--steps", "--train.steps"} & there:
            words[-1:-1] = ["--train.steps", str(MOST_STEPS)]
    return words


def _multiplied(factor: str, base: RunConfig) -> Iterator[str]:
    """Yield the options of all learning rates, a factor larger than they are."""
    by = read_factor(factor)
    for name in RATES:
        yield from (f"--train.{name}".replace("_", "-"), repr(by * getattr(base.train, name)))


def read_factor(factor: str | float) -> float:
    """Return the factor of --lr; ConfigError for what is none."""
    try:
        by = float(factor)
    except ValueError:
        by = math.nan
    if not (math.isfinite(by) and by >= 0):
        raise ConfigError(f"{f'--lr {factor}'.strip()}: expected a factor of all learning rates, as in --lr 0.5")
    return by


def refused(verb: str, arguments: Sequence[str], known: Sequence[str]) -> str:
    """Return what to say of the first short form that a verb has no use for, or nothing."""
    for word in arguments:
        name = hyphened(word.partition("=")[0]) if word.startswith("--") else ""
        if verb in SHORTENED and name in (*SHORT, *OWN) and name not in (*known, *of_verb(verb)):
            return f"unknown option {name}: it has no meaning in skc {verb}{HINTS.get((verb, name), '')}"
    return ""


HINTS = {
    ("ablate", "--seed"): "; the file's seeds say it",
    ("ablate", "--out"): "; the folder of runs is --store",
    ("bench", "--steps"): "; it times rounds of --seconds",
    ("bench", "--data"): "; it times random tokens",
    ("bench", "--lr"): "; no learning rate changes the speed",
    ("bench", "--backend"): "; --variants says what is timed",
    ("parity", "--backend"): "; it holds both to each other",
    ("parity", "--seconds"): "; it takes --steps",
}
