"""Settings of a run out of a file: a TOML file that changes a preset, or the config.json that a run folder holds."""

import os
from collections.abc import Mapping
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
    preset = typed(value, "preset", str, path)
    for key in value:
        if key.partition(".")[0] not in SECTIONS and key not in ("preset", "seed"):
            expected = f"known: preset, seed, {', '.join(SECTIONS)}"
            raise ConfigError(f"{path}: unknown key {in_words(key)}; {closest(key, SECTIONS, expected)}")
    return changed_preset(preset, flat({key: inner for key, inner in value.items() if key != "preset"}, path), path)


def changed_preset(preset: str, settings: Mapping[str, Any], where: str) -> RunConfig:
    """Return a preset with other values of fields, `train.steps` or `seed`; ConfigError names `where` and the field."""
    values = to_json(presets.get(preset).config)
    for field, value in settings.items():
        if field == "seed":
            values[field] = value
        else:
            put(values, field, value, where, decided=())
    try:
        return from_json(RunConfig, values, "config")
    except ConfigError as error:
        raise ConfigError(f"{where}: {str(error).replace('config.', '', 1)}") from error
