"""manifest.json of a prepared folder: the one reader, which types every value that anybody uses.

People edit these files and fetch them from others, so every value is checked before it is used, and a name stays a
name in the folder.
"""

import os
from typing import Any, get_args

from core.data.column import DataError
from core.data.transform import Transform
from core.files import FileError, read_json
from core.formats.kinds import ANYTHING, COUNT, FLAG, NUMBER, Leaf, among, check_value, text, whole

SCHEMA = 1
MANIFEST = "manifest.json"
CURE = "prepare the data again"
MAX_MANIFEST = 1 << 24
MAX_SHARDS = 100_000
"""Of a split."""


def is_name(value: Any) -> bool:
    """Return whether a value is the name of a file in a folder: no path, and nothing that no file can be called."""
    return (
        isinstance(value, str) and 0 < len(value) <= 255 and value not in (".", "..") and "/" not in value
        and value.isprintable()
    )  # fmt: skip


TEXT = text(10_000)
NAME = Leaf("the name of a file in this folder", is_name)
TOKENIZER = {
    "file": NAME, "sha256": TEXT, "vocab??": COUNT, "bos??": COUNT, "unknown??": COUNT, "byte_pieces??": FLAG,
    "*": ANYTHING,
}  # fmt: skip
FILES = [{"file": NAME, "tokens": COUNT, "size??": COUNT, "sha256??": TEXT, "*": ANYTHING}]
SPLIT = {
    "files": FILES, "token_bytes??": FILES,
    "documents": COUNT, "tokens": COUNT, "raw_bytes??": COUNT, "table_bytes??": COUNT, "unknown_tokens??": COUNT,
    "bytes_per_token??": NUMBER, "document_bytes??": NAME, "*": ANYTHING,
}  # fmt: skip
ORIGIN = {
    "train_shards??": {"taken": COUNT, "published": COUNT, "*": ANYTHING}, "val_tokens_listed??": COUNT,
    "manifest_sha256??": TEXT, "*": ANYTHING,
}  # fmt: skip
WHOLE = {
    "schema": whole(f"{SCHEMA}", SCHEMA, SCHEMA),
    "name": TEXT,
    "tokenizer": TOKENIZER,
    "transform??": among(*get_args(Transform)),
    "splits": {"train": SPLIT, "val": SPLIT, "*": ANYTHING},
    "made_from??": ORIGIN,
    "published??": {"same??": FLAG, "documents": COUNT, "bytes_per_token": NUMBER, "differs": [TEXT], "*": ANYTHING},
    "notes??": [TEXT],
    "*": ANYTHING,
}
"""Every key that is read, and what its value must be."""


def read_manifest(path: str) -> dict[str, Any]:
    """Return the manifest of a prepared folder; DataError if there is none or it is not one of ours."""
    file = os.path.join(path, MANIFEST)
    try:
        manifest = read_json(file, MAX_MANIFEST)
        check_value(manifest, WHOLE, file, CURE)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "no manifest.json here" if os.path.isdir(path) else "no such folder"
        raise DataError(f"{path}: {what}; make the folder with `skc data prepare`") from error
    except FileError as error:
        raise DataError(str(error) if str(error).endswith(CURE) else f"{error}; {CURE}") from error
    return manifest
