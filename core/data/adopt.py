"""Official shards that came without a manifest: checked, counted, and given one."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core.data import published
from core.data.dataset import SCAN, Split
from core.data.making import write_manifest
from core.data.manifest import MANIFEST, SCHEMA
from core.data.prepare import Progress, silent, tokenizer_record
from core.data.shards import DataError, open_shard, shard_record
from core.data.tokenizer import Tokenizer, token_bytes
from core.files import replace_file

COUNTED = ("documents", "tokens", "table_bytes")


def adopt_shards(
    folder: str,
    tokenizer: str,
    *,
    name: str | None = None,
    made_from: dict[str, Any] | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the manifest that downloaded official shards lack, so that `open_dataset` opens `folder`; return it.

    The shards are the folder's `*_train_*.bin` and `*_val_*.bin`; raw bytes stay unknown; `made_from` is where they
    came from. `published` of the manifest says whether validation is the published one. DataError if shards are
    missing or damaged, do not fit the tokenizer or cannot be scored, or if the folder has a manifest already, unless
    it is made `again`.
    """
    if not again and os.path.lexists(os.path.join(folder, MANIFEST)):
        raise DataError(f"{folder}: has a manifest.json already; move it away to make a new one")
    model = Tokenizer.load(tokenizer)
    splits = {}
    for split in ("train", "val"):
        paths = sorted(map(str, Path(folder).glob(f"*_{split}_*.bin")))
        if not paths:
            raise DataError(f"{folder}: no *_{split}_*.bin here; expected official shards of both splits")
        shards = [open_shard(path) for path in paths]
        stream = Split(shards, model, os.path.join(folder, split))
        if stream.read(0, 1)[0] != model.bos:
            raise DataError(f"{paths[0]}: does not start with BOS (id {model.bos}), so its documents are unknown")
        counts = _counts(stream, model, functools.partial(progress or silent, f"counting {split}"))
        if counts["tokens"] <= counts["documents"]:
            raise DataError(f"{paths[0]}: {split}: {counts['tokens']} tokens, none of which is text; give more shards")
        splits[split] = {
            "files": [shard_record(path, len(shard)) for path, shard in zip(paths, shards, strict=True)],
            **counts,
            "raw_bytes": None,
            "bytes_per_token": None,
            "document_bytes": None,
        }
    replace_file(os.path.join(folder, "tokenizer.model"), model.model)
    manifest = {
        "schema": SCHEMA,
        "name": name or os.path.basename(os.path.abspath(folder)),
        "made_from": made_from,
        "tokenizer": tokenizer_record(model),
        "splits": splits,
        "published": published.compare_published(model.vocab, *(splits["val"][key] for key in COUNTED)),
        "disjoint": None,
        "empty_documents": None,
    }
    write_manifest(folder, manifest)
    return manifest


def _counts(split: Split, tokenizer: Tokenizer, report: Callable[[int, int], None]) -> dict[str, int]:
    documents = table_bytes = unknown = 0
    for start in range(0, len(split), SCAN):
        stop = min(start + SCAN, len(split))
        stream = split.read(max(start - 1, 0), stop)
        fresh = stream[1:] if start else stream
        documents += int(np.count_nonzero(fresh == tokenizer.bos))
        unknown += int(np.count_nonzero(fresh == tokenizer.unknown))
        table_bytes += int(token_bytes(tokenizer.table, stream[:-1], stream[1:]).sum(dtype=np.int64))
        report(stop, len(split))
    return {"documents": documents, "tokens": len(split), "table_bytes": table_bytes, "unknown_tokens": unknown}
