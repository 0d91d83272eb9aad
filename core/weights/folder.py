"""An exported folder: written under another name and renamed, and never over what someone else wrote."""

import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from core.checks import ConfigError
from core.files import FileError, check_name, place_file, read_file, read_json, replace_file, sync_folder

CARD, CONFIG = "README.md", "config.json"
WRITER = "skc export"
"""What config.json says under `written_by`: the folder is ours."""
MAX_CARD = 1 << 20
NAMES = {
    CARD, CONFIG, "model.safetensors", "generation_config.json", "modeling_skc.py", "model.py", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "__pycache__",
}  # fmt: skip
"""What such a folder holds."""


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a folder that was not written by `skc export`, or that holds something else too."""
    check_name(folder)
    if folder.name in ("", ".."):
        raise ConfigError(f"--out {folder}: names no folder that could be written anew; give it by its name")
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; choose another --out")
    names = set(os.listdir(folder))
    if names and _written(folder).get("written_by") != WRITER:
        raise ConfigError(f"{folder}: is there already and was not written by {WRITER}; choose another --out")
    if more := sorted(names - NAMES):
        raise ConfigError(
            f"{folder}: holds {more[0]} too, which {WRITER} did not write; move it, or choose another --out"
        )
    for path in (folder / name for name in sorted(names)):
        if path.is_symlink() or not (path.is_file() or path.name == "__pycache__"):
            raise ConfigError(f"{path}: is no plain file; move it, or choose another --out")


def write_folder(folder: Path, files: dict[str, bytes], config: dict[str, Any]) -> bool:
    """Write a folder of `files` and config.json at once; return False where a card that someone changed was kept.

    ConfigError as `check_folder`, OSError.
    """
    check_folder(folder)
    kept = _changed_card(folder)
    config = {**config, "written_by": WRITER, "card_sha256": hashlib.sha256(files[CARD]).hexdigest()}
    files = {**files, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    if kept is not None:
        files[CARD] = kept
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp") for _ in range(2))
    fresh.mkdir()
    try:
        for name, data in files.items():
            replace_file(fresh / name, data)
        sync_folder(fresh)
        if folder.exists():
            place_file(folder, old)
        place_file(fresh, folder)
    except BaseException:
        if old.exists() and not folder.exists():
            place_file(old, folder)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return kept is None


def _written(folder: Path) -> dict[str, Any]:
    try:
        value = read_json(folder / CONFIG)
    except (FileError, OSError):
        return {}
    return value if isinstance(value, dict) else {}


def _changed_card(folder: Path) -> bytes | None:
    """Return the card in a folder if it is not the one that was written there: a licence may have been added."""
    if not (folder / CARD).is_file():
        return None
    data = read_file(folder / CARD, MAX_CARD)
    return None if hashlib.sha256(data).hexdigest() == _written(folder).get("card_sha256") else data
