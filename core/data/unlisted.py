"""Official shards as the challenge's own scripts read them: a folder without a manifest, and a tokenizer beside it."""

import hashlib
import os
from pathlib import Path
from typing import Any

from core.data.column import DataError
from core.data.dataset import Dataset, Split
from core.data.shards import file_sha256, open_shard
from core.data.tokenizer import MAX_MODEL, Tokenizer
from core.data.transform import MARKERS
from core.files import read_file


def open_unlisted(path: str, tokenizer: str) -> Dataset:
    """Open the shards `*train_*.bin` and `*val_*.bin` of a folder; DataError, OSError. A manifest there is not read.

    A tokenizer with pieces for case markers is one of transformed text. Nothing is counted and nothing written.
    """
    model = Tokenizer(read_file(tokenizer, MAX_MODEL), tokenizer)  # of no other kind: packed programs read no JSON
    if model.transform == "none" and len(set(model.encode("".join(MARKERS)).tolist()) - {model.unknown}) == len(
        MARKERS
    ):
        model = model.transformed("caseops", tokenizer)
    splits: dict[str, Split] = {}
    listed: dict[str, Any] = {}
    for name in ("train", "val"):
        files = [p for p in sorted(Path(path).glob(f"*{name}_*.bin")) if "_bytes_" not in p.name]
        if not files:
            raise DataError(f"{path}: no *{name}_*.bin here; give the folder of the challenge's shards")
        shards = [open_shard(str(file)) for file in files]
        splits[name] = Split(shards, model, os.path.join(path, name))
        listed[name] = {"files": [{"file": f.name, "tokens": len(s)} for f, s in zip(files, shards, strict=True)]}
    manifest = {"tokenizer": {"sha256": model.sha256}, "splits": listed}
    return Dataset(path, os.path.basename(os.path.abspath(path)), model, manifest, splits["train"], splits["val"])


def val_sha256(dataset: Dataset) -> str:
    """Return a hash of the validation shards, of a folder with a manifest or without: the same for the same files."""
    files = [os.path.join(dataset.path, entry["file"]) for entry in dataset.manifest["splits"]["val"]["files"]]
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
