"""The text that the project ships, and the one way in to data: `open_data` knows it by the names of SAMPLES."""

import os
import sys
from pathlib import Path
from typing import Any

from core.data.column import DataError
from core.data.dataset import Dataset, open_dataset
from core.data.prepare import Progress, prepare
from core.data.transform import Transform

BUNDLED = Path(__file__).parent
SAMPLES: dict[str, Transform] = {"sample": "none", "sample-case": "case"}
"""Names that mean the bundled text, and what is done to it before it becomes tokens."""
TOKENIZERS = {"sample": "tokenizer.model", "sample-case": "tokenizer_case.model"}


def sample_folder(name: str = "sample") -> str:
    """Return where text of a name is prepared on first use: in the user's cache folder, as the platform has it."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):  # what the XDG specification says of other values: ignore them
        caches = os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    if not os.path.isabs(caches):
        raise DataError("no home folder to prepare text in: set XDG_CACHE_HOME, or HOME")
    return os.path.join(caches, "skc", name)


def open_data(path: str, train: bool = True) -> Dataset:
    """Open a folder that `skc data` wrote; a name of SAMPLES is the bundled text, prepared on first use.

    `train` is that of `open_dataset`.
    """
    if path not in SAMPLES:
        return open_dataset(path, train)
    folder = sample_folder(path)
    if not os.path.isfile(os.path.join(folder, "manifest.json")):
        print(f"preparing the bundled text in {folder}", file=sys.stderr)
    prepare_sample(folder, name=path)
    return open_dataset(folder, train)


def prepare_sample(out: str, progress: Progress | None = None, name: str = "sample") -> dict[str, Any]:
    """Prepare the bundled text of a name in `out` (kept if it is there already) and return its manifest."""
    return prepare(
        [str(BUNDLED / "train.jsonl.xz")],
        out,
        val=[str(BUNDLED / "val.jsonl.xz")],
        tokenizer=str(BUNDLED / TOKENIZERS[name]),
        transform=SAMPLES[name],
        name=name,
        overwrite=True,
        progress=progress,
    )
