"""Text of the user's own as data: prepared once in the cache folder, and found there again by what it holds."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from core.data.bundled import SAMPLES, sample_folder
from core.data.column import DataError
from core.data.corpus import SUFFIXES, find_inputs
from core.data.making import find_damage
from core.data.manifest import MANIFEST
from core.data.prepare import Progress, named_tokenizer, prepare
from core.data.shards import file_sha256

PREPARATION = 1
"""To be raised when `prepare` makes other tokens of the same text: what is in caches is then left alone."""


class Cutting(NamedTuple):
    """What cuts a text into tokens."""

    tokenizer: str | None = None
    """A file, or `bytes`; None: one that is trained."""
    vocab: int | None = None
    """Pieces of one that is trained; None: 1024, or as many as a small text allows."""


DEFAULT = Cutting()


def is_text(path: str) -> bool:
    """Return whether a data path is text to be prepared: a file, a pattern, or a folder of text without a manifest."""
    if path in SAMPLES:
        return False
    if not os.path.isdir(path):
        return os.path.lexists(path) or path.endswith(SUFFIXES) or glob.has_magic(path)
    if os.path.lexists(os.path.join(path, MANIFEST)):
        return False
    return any(name.endswith(SUFFIXES) for _, _, files in os.walk(path) for name in files)


def prepare_user_text(
    path: str, say: Callable[[str], None], cutting: Cutting = DEFAULT, progress: Progress | None = None
) -> str:
    """Prepare a text in the cache folder, unless the same text lies there, and return the folder.

    `say` gets a line that names the folder, and what a user must know. DataError, TokenizerError, FileError, OSError.
    """
    inputs = find_inputs([path])
    key = content_key(inputs, cutting)
    folder = sample_folder(f"text-{key}")
    if os.path.lexists(os.path.join(folder, MANIFEST)):
        damage = find_damage(folder)
        if damage is None:
            say(f"{path}: was prepared before, in {folder}")
            return folder
        say(f"{path}: prepared again, since {damage}")
    say(f"{path}: is prepared in {folder}, once")
    name = os.path.basename(os.path.abspath(path))
    try:
        manifest = prepare(inputs, folder, **cutting._asdict(), name=name, overwrite=True, progress=progress)
    except DataError as error:
        if str(error).startswith(f"{folder}: "):
            raise DataError(f"{error}; or remove this folder of the cache") from error
        raise
    if content_key(inputs, cutting) != key:
        shutil.rmtree(folder)  # it has the name of another text
        raise DataError(f"{path}: changed while it was prepared; start again")
    for note in manifest["notes"]:
        say(note)
    return folder


def content_key(inputs: Sequence[str], cutting: Cutting) -> str:
    """Return what stands for the content of files, whatever their names are, and for how it is cut, as 16 digits.

    The end of a name counts: it says how documents lie in the file.
    """
    files = [(_kind(path), os.path.getsize(path), file_sha256(path)) for path in inputs]
    cut: Any = cutting.vocab if cutting.tokenizer is None else named_tokenizer(cutting.tokenizer).sha256
    return hashlib.sha256(json.dumps([PREPARATION, files, cut]).encode()).hexdigest()[:16]


def _kind(path: str) -> str:
    return next(suffix for suffix in SUFFIXES if path.endswith(suffix))
