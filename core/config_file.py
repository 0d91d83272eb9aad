"""Settings of a run out of a file: a TOML file that changes a preset, or the config.json that a run folder holds."""

import os
from pathlib import Path
from typing import Any

from core import presets
from core.ablation.fields import closest, flat, put, typed
from core.checks import in_words
from core.config import ConfigError, RunConfig, from_json, to_json
from core.formats.toml import read_toml
from core.training.records import read_object

SECTIONS = ("model", "data", "train", "eval", "export")


def settings_of_file(path: str) -> RunConfig:
    """Return the settings that a file brings; ConfigError, FileError or RunError names it and what is wrong, OSError.

    A folder is a run's. A TOML file has `preset`, perhaps `seed`, and settings in tables, as ablation files have them.
    """
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    if not path.endswith(".toml"):
        return from_json(RunConfig, read_object(Path(path)), path)
    value, _ = read_toml(path)
    values = to_json(presets.get(typed(value, "preset", str, path)).config)
    for key in value:
        if key.partition(".")[0] not in SECTIONS and key not in ("preset", "seed"):
            expected = f"known: preset, seed, {', '.join(SECTIONS)}"
            raise ConfigError(f"{path}: unknown key {in_words(key)}; {closest(key, SECTIONS, expected)}")
    settings: dict[str, Any] = {key: inner for key, inner in value.items() if key not in ("preset", "seed")}
    for field, one in flat(settings, path).items():
        put(values, field, one, path, budget=False)
    values["seed"] = value.get("seed", values["seed"])
    try:
        return from_json(RunConfig, values, "config")
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).replace('config.', '', 1)}") from error
