"""What a check of a submission folder is asked about, and how it answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from core.audit.rules import Verdict
from core.console import printable, shorten
from core.submission.folder import SubmissionFolder

MOST_SHOWN = 8
EVIDENCE = 4000
"""Letters of the longest evidence."""


class Checked(NamedTuple):
    """What is checked: a folder, and what was given beside it."""

    folder: SubmissionFolder
    artifact: Path | None = None
    reference: dict[str, float] | None = None
    """Label of a run of the reference -> its score, in the unit that `unit` names."""
    unit: str = "bpb"
    """bpb, or loss: nats per token."""


@dataclass(frozen=True)
class Answer:
    """What a check found: FAIL if there are problems, NOT CHECKED if it could not look, else PASS."""

    evidence: str
    problems: Sequence[str] = ()
    unchecked: str = ""
    """Why it could not look."""

    @property
    def verdict(self) -> Verdict:
        """Return the verdict."""
        return "FAIL" if self.problems else "NOT CHECKED" if self.unchecked else "PASS"

    def words(self) -> str:
        """Return the evidence: of problems the first MOST_SHOWN, then what else was seen."""
        more = len(self.problems) - MOST_SHOWN
        parts = [*self.problems[:MOST_SHOWN], f"and {more} more" if more > 0 else "", self.unchecked, self.evidence]
        return shorten(printable("; ".join(part for part in parts if part)), EVIDENCE)


class SubmissionCheck(NamedTuple):
    """One of the fourteen checks, done."""

    number: int
    asks: str
    verdict: Verdict
    evidence: str

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain JSON values."""
        return self._asdict()


def claimed_number(value: Any) -> float | None:
    """Return a finite number from 0 up out of someone's JSON file, or None for anything else."""
    if type(value) not in (int, float) or not 0 <= value <= 1e15:  # NaN is in no range
        return None
    return float(value)


def digits(value: float) -> int:
    """Return how many digits behind the point a number was written with, as far as can be told."""
    text = repr(value)
    return len(text.partition(".")[2]) if "e" not in text else 8


def agrees(claimed: float, found: float, at_least: int = 0) -> bool:
    """Return whether a claimed number is a found one, rounded to the digits that it was written with.

    `at_least`: digits that it must agree in, although zeros at the end are never seen.
    """
    places = min(8, max(at_least, digits(claimed)))
    return math.isfinite(claimed) and abs(claimed - found) <= 0.5 * 10.0**-places + 1e-9
