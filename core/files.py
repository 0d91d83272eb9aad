"""The one way in which a file is replaced, the one way in which inputs are opened, and the name of a failed write."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

OPENED: list[str] = []
"""Real paths that this process opened through `open_input`, each once: what an audited evaluation declares."""


def open_input(path: str | Path) -> BinaryIO:
    """Open a file that an evaluation reads (artifact, tokenizer, shards, manifest) and note it in OPENED; OSError."""
    file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    real = os.path.realpath(path)
    if real not in OPENED:
        OPENED.append(real)
    return file


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let every OSError of the block name `path`: those of writes and fsyncs (a full disk) name no file at all."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def replace_file(path: str | Path, *parts: Any) -> None:
    """Write byte `parts` to a temporary name beside `path`, fsync, rename: a kill leaves the old file or the new."""
    temporary = f"{path}.tmp"
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
