"""The files of a Hugging Face checkpoint: config.json, and safetensors in one file or several, read array by array."""

import os
from contextlib import ExitStack
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from core.checks import in_words
from core.data.manifest import is_name
from core.files import FileError, open_file, read_json
from core.formats.kinds import ANYTHING, Leaf, check_value
from core.formats.tensors import Entry, TensorsHeader, read_array, read_tensors_header

ONE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MAX_CONFIG = 1 << 20
"""Bytes of config.json."""
MAX_FILES = 256
PIECE = 1 << 22
"""Numbers of a large array that are looked at together."""
KINDS = ("BF16", "F16", "F32")
"""Kinds of values that weights may have."""
NAME = Leaf("the name of a file in this folder", is_name)
CURE = "give the folder of a whole checkpoint"


class HFError(ValueError):
    """A checkpoint cannot be imported: the message names the file and what is wrong."""


def fail_hf(where: str | Path, problem: str) -> NoReturn:
    """Raise HFError."""
    raise HFError(f"{where}: {problem}")


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return config.json of a checkpoint; HFError."""
    path = Path(folder, CONFIG)
    try:
        config = read_json(path, MAX_CONFIG)
        check_value(config, {"*": ANYTHING}, str(path), CURE)
    except FileNotFoundError as error:
        what = f"has no {CONFIG}" if os.path.isdir(folder) else "no such folder"
        raise HFError(f"{folder}: {what}; {CURE}") from error
    except (FileError, NotADirectoryError) as error:
        raise HFError(f"{error}") from error
    return config


class Tensors:
    """The arrays of a checkpoint by name, each read when it is asked for; a context manager, which closes the files."""

    entries: dict[str, Entry]

    def __init__(self, folder: str | Path) -> None:
        """Open the files and check what they say of themselves; HFError."""
        self._files: dict[str, tuple[Path, BufferedReader, TensorsHeader]] = {}
        self._where: dict[str, str] = {}
        self.entries, self.folder = {}, Path(folder)
        with ExitStack() as stack:
            for name, listed in _listed(self.folder).items():
                path = self.folder / name
                try:
                    file = stack.enter_context(open_file(path))
                    header = read_tensors_header(path, file)
                except FileNotFoundError as error:
                    raise HFError(f"{path}: no such file; {CURE}") from error
                except FileError as error:
                    raise HFError(str(error)) from error
                self._files[name] = path, file, header
                for tensor in listed:
                    if tensor not in header.entries:
                        fail_hf(path, f"{tensor} is missing, though {INDEX} says that it is here; {CURE}")
                for tensor, entry in header.entries.items():
                    if tensor in self._where:
                        fail_hf(path, f"{tensor} is in {self._where[tensor]} too; {CURE}")
                    self._where[tensor], self.entries[tensor] = name, entry
            self._stack = stack.pop_all()

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def path(self, tensor: str) -> Path:
        """Return the file that holds an array."""
        return self._files[self._where[tensor]][0]

    def read(self, tensor: str) -> np.ndarray:
        """Return an array, bfloat16 as its bits; HFError for another kind than KINDS, and for NaN or infinity."""
        path, file, header = self._files[self._where[tensor]]
        kind = header.entries[tensor].kind
        if kind not in KINDS:
            fail_hf(path, f"{tensor}: dtype {kind}, expected one of {', '.join(KINDS)}")
        try:
            array = read_array(path, file, header, tensor)
        except FileError as error:
            raise HFError(str(error)) from error
        flat = array.reshape(-1)
        for start in range(0, flat.size, PIECE):
            part = flat[start : start + PIECE]
            if not ((part & 0x7F80) != 0x7F80 if kind == "BF16" else np.isfinite(part)).all():
                fail_hf(path, f"{tensor} holds NaN or infinity; {CURE}")
        return array


def _listed(folder: Path) -> dict[str, list[str]]:
    """Return the checkpoint's files, and what its index says is in each."""
    if not os.path.lexists(folder / INDEX):
        return {ONE: []}
    try:
        index = read_json(folder / INDEX)
        check_value(index, {"weight_map": {"*": NAME}, "*": ANYTHING}, str(folder / INDEX), CURE)
    except FileError as error:
        raise HFError(str(error)) from error
    files: dict[str, list[str]] = {}
    for tensor, name in index["weight_map"].items():
        files.setdefault(name, []).append(tensor)
    if not 1 <= len(files) <= MAX_FILES:
        fail_hf(folder / INDEX, f"{in_words(len(files))} files, expected 1 to {MAX_FILES}; {CURE}")
    return files
