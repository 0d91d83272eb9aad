"""Finds seeds that were added after a report had shown figures: their number was not fixed beforehand."""

import json
from collections.abc import Sequence
from pathlib import Path

from core.ablation.folders import finished
from core.ablation.records import read_shown
from core.ablation.store import Place
from core.files import replace_file


def looked(folder: Path, places: Sequence[Place]) -> tuple[int, ...]:
    """Note which runs a report is about to show, and return the seeds added to a variant after its first report.

    A variant is noted with all its seeds by the first report that has a figure of it. What cannot be read counts as no
    report.
    """
    file = folder / "looked.json"
    shown = read_shown(file)
    groups: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        groups.setdefault((place.job.variant, place.job.backend), []).append(place)
    added: set[int] = set()
    for of in groups.values():
        if any(place.key in shown for place in of):
            added |= {place.job.seed for place in of if place.key not in shown}
        elif any(finished(place.folder) for place in of):
            shown |= {place.key for place in of}
    replace_file(file, json.dumps({"shown": sorted(shown)}).encode())
    return tuple(sorted(added))
