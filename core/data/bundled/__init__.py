"""The text that the project ships, and the one way in to data: `open_data` knows it by the name `sample`."""

import os
import sys
from pathlib import Path
from typing import Any

from core.data.column import DataError
from core.data.dataset import Dataset, open_dataset
from core.data.prepare import Progress, prepare

BUNDLED = Path(__file__).parent


def sample_folder() -> str:
    """Return where the bundled text is prepared on first use: in the user's cache folder, as the platform has it."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # what the XDG specification says of other values: ignore them
        caches = os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    if not os.path.isabs(caches):
        raise DataError("no home folder to prepare the bundled text in: set XDG_CACHE_HOME, or HOME")
    return os.path.join(caches, "skc", "sample")


def open_data(path: str, train: bool = True) -> Dataset:
    """Open a folder that `skc data` wrote; `sample` is the bundled text, prepared in `sample_folder` on first use.

    `train` is that of `open_dataset`.
    """
    if path != "sample":
        return open_dataset(path, train)
    folder = sample_folder()
    if not os.path.isfile(os.path.join(folder, "manifest.json")):
        print(f"preparing the bundled text in {folder}", file=sys.stderr)
    prepare_sample(folder)
    return open_dataset(folder, train)


def prepare_sample(out: str, progress: Progress | None = None) -> dict[str, Any]:
    """Prepare the bundled text in `out` (kept if it is there already) and return its manifest."""
    return prepare(
        [str(BUNDLED / "train.jsonl.xz")],
        out,
        val=[str(BUNDLED / "val.jsonl.xz")],
        tokenizer=str(BUNDLED / "tokenizer.model"),
        name="sample",
        overwrite=True,
        progress=progress,
    )
