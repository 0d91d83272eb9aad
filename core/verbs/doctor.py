"""Verb `skc doctor`: this machine is checked."""

from dataclasses import dataclass

from core.check.doctor import examine
from core.verbs.common import Context, Outcome


@dataclass(frozen=True)
class Doctor:
    """Options of `skc doctor`."""

    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def doctor(options: Doctor, context: Context) -> Outcome:
    """Check this machine."""
    value = examine(context.say)
    return Outcome(value.pop("ok"), value)
