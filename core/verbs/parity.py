"""Verb `skc parity PRESET`: the two backends held to each other."""

from dataclasses import dataclass
from typing import Literal

from core.check.parity import run_parity
from core.verbs.common import (
    Context,
    Outcome,
    PresetOptions,
    with_text,
)


@dataclass(frozen=True)
class Parity(PresetOptions):
    """Options of `skc parity`."""

    steps: int = 10
    """Training steps to compare."""
    dtype: Literal["float32", "float64"] = "float32"
    """Compute type of both backends."""
    mini: bool = False
    """Shrink the preset: same options, dim <= 64, at most 4 layers."""


def parity(options: Parity, context: Context) -> Outcome:
    """Compare the backends; not ok beyond tolerance."""
    report = run_parity(
        with_text(options.config(), context.say),
        steps=options.steps,
        dtype=options.dtype,
        mini=options.mini,
        report=context.say,
    )
    for line in report.lines():
        context.say(line)
    return Outcome(report.ok, report.to_json())
