"""The one way in which a file is replaced."""

import os
from pathlib import Path
from typing import Any


def replace_file(path: str | Path, *parts: Any) -> None:
    """Write byte `parts` to a temporary name beside `path`, fsync, rename: a kill leaves the old file or the new."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
