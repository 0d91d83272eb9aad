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
from core.data.shards import DataError, open_shard, shard_record, shard_type
from core.data.tokenizer import MARKER_BYTES, Tokenizer
from core.data.transform import MARKERS, Transform
from core.files import replace_file

COUNTED = ("documents", "tokens", "table_bytes")
RAW_SHARE = 1e-3
"""By how much of the bytes a sidecar may depart from them: it counts text as it was before normalisation."""


def adopt_shards(
    folder: str,
    tokenizer: str,
    *,
    transform: Transform = "none",
    name: str | None = None,
    made_from: dict[str, Any] | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the manifest that downloaded official shards lack, so that `open_dataset` opens `folder`; return it.

    The shards are the folder's `*_train_*.bin` and `*_val_*.bin`; raw bytes stay unknown; `made_from` is where they
    came from, `transform` what was done to their text. `*_val_bytes_*.bin` are sidecars (`check_sidecar`). `published`
    of the manifest says whether validation is the published one. DataError if shards are missing or damaged, do not fit
    the tokenizer or cannot be scored, or if the folder has a manifest already, unless it is made `again`.
    """
    if not again and os.path.lexists(os.path.join(folder, MANIFEST)):
        raise DataError(f"{folder}: has a manifest.json already; move it away to make a new one")
    model = Tokenizer.load(tokenizer).transformed(transform, tokenizer)
    if transform == "none" and len(set(model.encode("".join(MARKERS)).tolist()) - {model.unknown}) == len(MARKERS):
        raise DataError(
            f"{tokenizer}: has pieces for case markers, so the text of these shards is transformed: give --transform "
            "caseops (published shards), or case"
        )
    splits, notes = {}, []
    for split in ("train", "val"):
        sidecars = sorted(map(str, Path(folder).glob(f"*_{split}_bytes_*.bin")))
        paths = sorted({str(path) for path in Path(folder).glob(f"*_{split}_*.bin")} - set(sidecars))
        if not paths:
            raise DataError(f"{folder}: no *_{split}_*.bin here; expected official shards of both splits")
        shards = [open_shard(path, dtype=shard_type(model.vocab)) for path in paths]
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
        if sidecars and (note := check_sidecar(stream, sidecars, [len(shard) for shard in shards])):
            notes.append(note)
        elif sidecars:
            splits[split]["token_bytes"] = [
                shard_record(path, len(shard)) for path, shard in zip(sidecars, shards, strict=True)
            ]
    replace_file(os.path.join(folder, "tokenizer.model"), model.model)
    manifest = {
        "schema": SCHEMA,
        "name": name or os.path.basename(os.path.abspath(folder)),
        "made_from": made_from,
        **tokenizer_record(model),
        "splits": splits,
        "published": published.compare_published(
            model.vocab, *(splits["val"][key] for key in COUNTED), transform=model.transform
        ),
        "disjoint": None,
        "empty_documents": None,
        **({"notes": notes} if notes else {}),
    }
    write_manifest(folder, manifest)
    return manifest


def _counts(split: Split, tokenizer: Tokenizer, report: Callable[[int, int], None]) -> dict[str, int]:
    documents = table_bytes = unknown = 0
    for start in range(0, len(split), SCAN):
        stop = min(start + SCAN, len(split))
        fresh = split.read(start, stop)
        documents += int(np.count_nonzero(fresh == tokenizer.bos))
        unknown += int(np.count_nonzero(fresh == tokenizer.unknown))
        table_bytes += int(split.costs(start, stop).sum(dtype=np.int64))
        report(stop, len(split))
    return {"documents": documents, "tokens": len(split), "table_bytes": table_bytes, "unknown_tokens": unknown}


def check_sidecar(split: Split, paths: list[str], lengths: list[int]) -> str | None:
    """Hold the sidecars of a split to its tokens; return what to know of ones that a score must not use; None: nothing.

    `lengths`: tokens of each shard. BOS and markers cost nothing, unless they are escaped, and each document as much as
    its text. Published sidecars count the text before normalisation, so up to RAW_SHARE of the bytes may differ: then
    the tokens' own bytes count. DataError names what is wrong.
    """
    cure = "scores by it would be wrong; move it away, and the tokens' own bytes count"
    sizes = [open_shard(path) for path in paths]
    if [len(size) for size in sizes] != lengths:
        what = f"{len(paths)} files of {sum(map(len, sizes))} numbers, the shards are {len(lengths)} of {sum(lengths)}"
        raise DataError(f"{paths[0]}: {what}; {cure}")
    sidecar, table = Split(sizes, split.tokenizer, "sidecar"), split.tokenizer.table
    surplus = np.zeros(len(split.document_starts))
    markers = boundaries = total = own = 0
    for start in range(0, len(split), SCAN):
        stop = min(start + SCAN, len(split))
        tokens, costs, claimed = split.read(start, stop), split.costs(start, stop), sidecar.unchecked(start, stop)
        charged = claimed > costs
        markers += int(np.count_nonzero(charged & np.isin(tokens, table.markers)))
        boundaries += int(np.count_nonzero(charged & table.boundary[tokens]))
        document = np.searchsorted(split.document_starts, np.arange(start, stop), "right") - 1
        surplus += np.bincount(document, claimed.astype(np.int64) - costs, len(surplus))
        total, own = total + int(claimed.sum(dtype=np.int64)), own + int(costs.sum(dtype=np.int64))
    sums = f"{total:,} bytes where the text has {own:,}"
    if markers:
        what = f"charges {markers:,} case markers that are no text (up to {MARKER_BYTES} bytes each)"
        raise DataError(f"{paths[0]}: {what}, {sums}: bits per byte would be too low; {cure}")
    if boundaries:
        raise DataError(f"{paths[0]}: charges {boundaries:,} control tokens, which are no text; {sums}; {cure}")
    differ, bytes_apart = int(np.count_nonzero(surplus)), int(np.abs(surplus).sum())
    if bytes_apart > RAW_SHARE * own:
        raise DataError(f"{paths[0]}: {differ:,} documents have other bytes than their text; {sums}; {cure}")
    if differ:
        return f"the byte sidecar is not used: {sums}, as normalisation left it ({differ:,} documents differ)"
    return None
