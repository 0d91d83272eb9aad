"""Verb `skc presets`: the named runs and their sizes."""

from dataclasses import dataclass

from core import presets
from core.export.budget import predicted_bytes
from core.model.params import (
    count,
)
from core.verbs.common import Context, Outcome


@dataclass(frozen=True)
class Presets:
    """Options of `skc presets`."""

    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def list_presets(options: Presets, context: Context) -> Outcome:
    """Show every preset with its size."""
    rows = []
    for name, preset in presets.PRESETS.items():
        model = preset.config.model
        rows.append((name, count(model), predicted_bytes(model), preset.purpose))
    context.say.table(("preset", "parameters", "artifact (predicted)", "purpose"), rows)
    keys = ("name", "parameters", "bytes", "purpose")
    return Outcome(True, {"presets": [dict(zip(keys, row, strict=True)) for row in rows]})
