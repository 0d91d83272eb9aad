"""The text that the project ships, and the one way in to data: `open_data` knows it by the name `sample`."""

import os
import sys
from pathlib import Path
from typing import Any

from core.data import Dataset, open_dataset
from core.prepare import Progress, prepare

BUNDLED = Path(__file__).parent


def open_data(path: str, train: bool = True) -> Dataset:
    """Open a folder that `skc data` wrote; `sample` is the bundled text, prepared under data/sample on first use.

    `train` is that of `open_dataset`.
    """
    if path != "sample":
        return open_dataset(path, train)
    folder = os.path.join("data", "sample")
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
