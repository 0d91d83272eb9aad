"""docs/presets.md says what the presets of pull requests are: every setting that is not at its default. Budget: 1 s."""

import re
from pathlib import Path
from typing import Any

from core import presets
from core.config import POLAR_EXPRESS, RunConfig, to_json
from core.plain import flattened
from core.presets import records

PAGE = Path(__file__).parents[2] / "docs/presets.md"
DEFAULTS = flattened(to_json(RunConfig()))


def table() -> dict[str, list[str]]:
    """Return the rows of the page whose first cell is a name, without it; the first of all is the presets'."""
    rows = (line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| "))
    return {row[0].strip("`"): [cell.strip() for cell in row[1:]] for row in rows}


def shown(value: Any) -> str:
    """Return a setting as the page has it."""
    if isinstance(value, tuple):
        return "Polar Express" if value == POLAR_EXPRESS else " ".join(map(shown, runs(value))) or "-"
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def runs(values: tuple[Any, ...]) -> list[Any]:
    """Return a list with what stands in it several times on end counted: attention, attention becomes 2 attention."""
    if len(set(values)) == len(values):
        return list(values)
    return [f"{values.count(value)} {value}" for value in dict.fromkeys(values)]


def test_every_setting_stands_on_the_page_as_it_is() -> None:
    page = table()
    names = page["setting"]
    assert sorted(names) == sorted(name for name in records.PRESETS if not name.endswith("_mac"))
    settings = {name: flattened(to_json(presets.get(name).config)) for name in names}
    for field, default in DEFAULTS.items():
        values = [settings[name][field] for name in names]
        if field != "preset" and any(value != default for value in values):
            ours = [re.split("→ ?", cell)[-1] for cell in page[field]]
            assert ours == [shown(value) for value in values], field


def test_the_counts_stand_on_the_page() -> None:
    page = table()
    assert page["parameters"] == [f"{presets.get(name).params:,}" for name in page["setting"]]


def test_what_a_system_lacks_is_said() -> None:
    lacking = {name for name, preset in presets.PRESETS.items() if preset.lacks}
    assert lacking == {"pr1619", "pr1619_mac"}
