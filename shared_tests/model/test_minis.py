"""What the short run may leave out: minis that have no option of their own. Budget: 1 s."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from core.config import changed
from shared_tests.support.harness import SIBLINGS, mini, minis

TESTS = Path(__file__).parents[1]
OWN_FILES = {
    ".mtp_heads": "model/test_further_heads.py", ".quantise_soft": "model/test_soft_rounding.py",
    ".snapshot_every": "model/test_snapshots.py", ".average_from": "model/test_snapshots.py",
    ".bank.at": "model/test_parts.py", ".bank.gate": "model/test_parts.py",
    ".embedding.storage": "model/test_storage.py", ".experts.start": "model/test_experts.py",
}  # fmt: skip
"""Option that only minis of SIBLINGS have -> the file that holds it to the oracle on both backends."""


def options(settings: Any, name: str = "") -> set[tuple[str, Any]]:
    """Return what settings choose: words and switches as they are, of numbers and lists only whether there are any."""
    found: set[tuple[str, Any]] = set()
    for field in dataclasses.fields(settings):
        value, full = getattr(settings, field.name), f"{name}.{field.name}"
        if dataclasses.is_dataclass(value):
            found |= options(value, full)
        elif isinstance(value, tuple) and all(isinstance(part, str) for part in value):
            found |= {(full, part) for part in value}
        else:
            found.add((full, value if value is None or isinstance(value, bool | str) else bool(value)))
    return found


@pytest.mark.parametrize("name", SIBLINGS)
def test_a_sibling_has_no_option_of_its_own(name: str) -> None:
    others = [mini(other) for other in minis() if other not in SIBLINGS]
    for side in ("model", "train"):
        known = set().union(*(options(getattr(other, side)) for other in others))
        own = {option for option, _ in options(getattr(mini(name), side)) - known}
        assert own <= OWN_FILES.keys() and all((TESTS / OWN_FILES[option]).is_file() for option in own)


def test_an_option_that_only_one_mini_has_is_seen() -> None:
    plain = mini("tiny").model
    other = changed(plain, {"documents": "packed", "attention.q_gain": 0.0})
    assert {option for option, _ in options(other) - options(plain)} == {".documents", ".attention.q_gain"}
