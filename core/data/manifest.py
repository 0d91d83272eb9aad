"""manifest.json of a prepared folder: the one reader, which types every value that anybody uses.

People edit these files and fetch them from others, so every value is checked before it is used, and a name stays a
name in the folder.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from core.data.column import DataError
from core.files import FileError, read_json

SCHEMA = 1
MANIFEST = "manifest.json"
MAX_MANIFEST = 1 << 24
MAX_SHARDS = 100_000
"""Of a split."""


class Leaf(NamedTuple):
    """A kind of value."""

    what: str
    fits: Callable[[Any], bool]


def is_name(value: Any) -> bool:
    """Return whether a value is the name of a file in a folder: no path, and nothing that no file can be called."""
    return (
        isinstance(value, str) and 0 < len(value) <= 255 and value not in (".", "..") and "/" not in value
        and value.isprintable()
    )  # fmt: skip


TEXT = Leaf("text", lambda value: isinstance(value, str) and len(value) <= 10_000)
NAME = Leaf("the name of a file in this folder", is_name)
COUNT = Leaf("a count", lambda value: type(value) is int and 0 <= value < 2**62)
NUMBER = Leaf("a number", lambda value: type(value) in (int, float) and abs(value) < 2**62)
FLAG = Leaf("true or false", lambda value: type(value) is bool)
TOKENIZER = {
    "file": NAME, "sha256": TEXT, "vocab?": COUNT, "bos?": COUNT, "unknown?": COUNT, "byte_pieces?": FLAG,
}  # fmt: skip
SPLIT = {
    "files": [{"file": NAME, "tokens": COUNT, "size?": COUNT, "sha256?": TEXT}],
    "documents": COUNT, "tokens": COUNT, "raw_bytes?": COUNT, "table_bytes?": COUNT, "unknown_tokens?": COUNT,
    "bytes_per_token?": NUMBER, "document_bytes?": NAME,
}  # fmt: skip
ORIGIN = {
    "train_shards?": {"taken": COUNT, "published": COUNT}, "val_tokens_listed?": COUNT, "manifest_sha256?": TEXT,
}  # fmt: skip
WHOLE = {
    "name": TEXT,
    "tokenizer": TOKENIZER,
    "splits": {"train": SPLIT, "val": SPLIT},
    "made_from?": ORIGIN,
    "published?": {"same?": FLAG, "documents": COUNT, "bytes_per_token": NUMBER, "differs": [TEXT]},
    "notes?": [TEXT],
}
"""Every key that is read, and what its value must be; of keys with a question mark, null and nothing are as good."""


def read_manifest(path: str) -> dict[str, Any]:
    """Return the manifest of a prepared folder; DataError if there is none or it is not one of ours."""
    file = os.path.join(path, MANIFEST)
    try:
        manifest = read_json(file, MAX_MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "no manifest.json here" if os.path.isdir(path) else "no such folder"
        raise DataError(f"{path}: {what}; make the folder with `skc data prepare`") from error
    except FileError as error:
        raise DataError(f"{error}; prepare the data again") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if type(schema) is not int or schema != SCHEMA:
        raise DataError(f"{file}: schema: expected {SCHEMA}, got {_shown(schema)}; prepare the data again")
    try:
        check_shape(file, "", manifest, WHOLE)
    except DataError as error:
        raise DataError(f"{error}; prepare the data again") from error
    return manifest


def check_shape(file: str, where: str, value: Any, kind: Any) -> None:
    """Raise DataError, naming the field, unless `value` is of a kind: a Leaf, an object of kinds by key, or a list
    of one kind.
    """
    if isinstance(kind, Leaf):
        if not kind.fits(value):
            _fail(file, where, kind.what, value)
    elif isinstance(kind, dict):
        if not isinstance(value, dict):
            _fail(file, where, "an object", value)
        for key, inner in kind.items():
            name = key.rstrip("?")
            if name == key or value.get(name) is not None:
                check_shape(file, f"{where}.{name}" if where else name, value.get(name), inner)
    else:
        if not isinstance(value, list) or len(value) > MAX_SHARDS:
            _fail(file, where, f"a list of at most {MAX_SHARDS:,}", value)
        for number, inner in enumerate(value):
            check_shape(file, f"{where}[{number}]", inner, kind[0])


def _fail(file: str, where: str, what: str, value: Any) -> None:
    raise DataError(f"{file}: {where}: expected {what}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """Return a value fit for one line: of a container only its kind."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return ascii(value[:60])
    return f"{type(value).__name__}" if isinstance(value, dict | list) else str(value)[:60]
