"""Text to token shards: `prepare` writes a folder that `core.data.open_dataset` opens.

A folder holds train_%06d.bin and val_%06d.bin (official shards), tokenizer.model, manifest.json and, per split, the raw
bytes of each document (<split>_document_bytes.npy).
"""

import functools
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import published
from core.corpus import check_inputs, document_hash, read_documents
from core.data import SCAN, Split
from core.files import replace_file
from core.manifest import SCHEMA, read_manifest
from core.shards import DataError, file_sha256, open_shard, shard_record, write_split
from core.tokenizer import Tokenizer, token_bytes, train_tokenizer

Progress = Callable[[str, int, int], None]
"""Called with the stage, and the bytes of input read and in all."""
TRAINING_BYTES = 1 << 27
"""About the most text that a tokenizer is trained on: a sample of the documents, chosen by hash."""
COUNTED = ("documents", "tokens", "table_bytes")


def prepare(
    inputs: Sequence[str],
    out: str,
    *,
    val: Sequence[str] | None = None,
    val_share: float = 0.05,
    tokenizer: str | None = None,
    vocab: int = 1024,
    shard_tokens: int = 100_000_000,
    name: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenise text files into the folder `out` and return its manifest.

    Without `val`, about `val_share` of the documents (at least one) become validation, chosen by the hash of their
    text, so that duplicates land on one side; with it, training documents that are also in validation are dropped.
    Without `tokenizer`, one of `vocab` pieces is trained on the training text. A folder made from the same inputs is
    kept; one made from others is replaced only with `overwrite`. The folder appears complete or not at all.
    DataError or TokenizerError says what is wrong with the input.
    """
    if not inputs or (val is not None and not val):
        raise DataError("no input files: give at least one .txt, .jsonl (also .gz, .xz, .zst) or .parquet file")
    if not 0 < val_share < 1:
        raise DataError(f"val_share={val_share}: expected a share between 0 and 1")
    if not 1 <= shard_tokens < 2**31:
        raise DataError(f"shard_tokens={shard_tokens}: expected from 1 to 2^31 - 1")
    check_inputs([*inputs, *(val or [])])
    given = Tokenizer.load(tokenizer) if tokenizer is not None else None
    out = os.path.normpath(out)
    made_from = {
        "name": name or os.path.basename(out),
        "inputs": [_identity(path) for path in inputs],
        "val": {"share": val_share} if val is None else [_identity(path) for path in val],
        "tokenizer": {"trained": vocab} if given is None else {"sha256": given.sha256},
        "shard_tokens": shard_tokens,
    }
    existing = _existing(out, made_from, overwrite)
    if existing is not None:
        return existing
    temporary = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.{secrets.token_hex(4)}.part")
    os.makedirs(temporary)
    try:
        sources = _Sources(inputs, val, val_share, given, vocab, progress or _silent)
        manifest = {"schema": SCHEMA, "name": made_from["name"], "made_from": made_from}
        manifest |= _fill(temporary, sources, shard_tokens, threads or os.cpu_count() or 1)
        replace_file(os.path.join(temporary, "manifest.json"), json.dumps(manifest, indent=1).encode())
        return _install(temporary, out, manifest, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def adopt_shards(
    folder: str,
    tokenizer: str,
    *,
    name: str | None = None,
    made_from: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the manifest that downloaded official shards lack, so that `open_dataset` opens `folder`; return it.

    The shards are the folder's `*_train_*.bin` and `*_val_*.bin`; raw bytes stay unknown; `made_from` is where they
    came from. `published` of the manifest says whether validation is the published one. DataError if shards are
    missing or damaged, do not fit the tokenizer, or the folder has a manifest already.
    """
    if os.path.lexists(os.path.join(folder, "manifest.json")):
        raise DataError(f"{folder}: has a manifest.json already; move it away to make a new one")
    model = Tokenizer.load(tokenizer)
    splits = {}
    for split in ("train", "val"):
        paths = sorted(map(str, Path(folder).glob(f"*_{split}_*.bin")))
        if not paths:
            raise DataError(f"{folder}: no *_{split}_*.bin here; expected official shards of both splits")
        shards = [open_shard(path) for path in paths]
        report = functools.partial(progress or _silent, f"counting {split}")
        splits[split] = {
            "files": [shard_record(path, len(shard)) for path, shard in zip(paths, shards, strict=True)],
            **_counts(Split(shards, model, os.path.join(folder, split)), model, report),
            "raw_bytes": None,
            "bytes_per_token": None,
            "document_bytes": None,
        }
    replace_file(os.path.join(folder, "tokenizer.model"), model.model)
    manifest = {
        "schema": SCHEMA,
        "name": name or os.path.basename(os.path.abspath(folder)),
        "made_from": made_from,
        "tokenizer": _tokenizer_record(model),
        "splits": splits,
        "published": published.compare(model.vocab, *(splits["val"][key] for key in COUNTED)),
        "disjoint": None,
        "empty_documents": None,
    }
    replace_file(os.path.join(folder, "manifest.json"), json.dumps(manifest, indent=1).encode())
    return manifest


def _silent(stage: str, done: int, total: int) -> None:
    pass


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


def _tokenizer_record(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "file": "tokenizer.model",
        "sha256": tokenizer.sha256,
        "vocab": tokenizer.vocab,
        "bos": tokenizer.bos,
        "unknown": tokenizer.unknown,
        "byte_pieces": tokenizer.byte_pieces,
    }


class _Sources(NamedTuple):
    inputs: Sequence[str]
    val: Sequence[str] | None
    val_share: float
    tokenizer: Tokenizer | None
    vocab: int
    progress: Progress

    def read(self, paths: Sequence[str], stage: str) -> Iterator[str]:
        """Yield the documents of `paths`, reporting progress as `stage`."""
        return read_documents(paths, lambda done, total: self.progress(stage, done, total))


class _Survey(NamedTuple):
    lowest: int
    highest: int
    size: int


def _identity(path: str) -> dict[str, Any]:
    return {"file": os.path.basename(path), "size": os.path.getsize(path), "sha256": file_sha256(path)}


def _existing(out: str, made_from: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """Return the manifest of a folder that is already what is asked for; DataError if something else is in the way."""
    if not os.path.lexists(out) or (os.path.isdir(out) and not os.listdir(out)):
        return None
    try:
        manifest = read_manifest(out)
    except DataError as error:
        raise DataError(f"{out}: exists and holds no prepared data; choose another folder") from error
    if manifest.get("made_from") == made_from and _intact(out, manifest):
        return manifest
    if not overwrite or manifest.get("made_from") is None:
        raise DataError(f"{out}: holds data made from other inputs, or damaged; choose another folder, or overwrite it")
    return None


def _intact(out: str, manifest: dict[str, Any]) -> bool:
    """Return whether every shard of a manifest of ours has its size."""
    files = [record for split in manifest["splits"].values() for record in split["files"]]
    paths = [os.path.join(out, record["file"]) for record in files]
    return all(os.path.isfile(p) and os.path.getsize(p) == r["size"] for p, r in zip(paths, files, strict=True))


def _install(temporary: str, out: str, manifest: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """Put a finished folder in place of `out`, unless another process was first with the same; return its manifest."""
    existing = _existing(out, manifest["made_from"], overwrite)
    if existing is not None:
        return existing
    swap_folder(temporary, out)
    return manifest


def swap_folder(temporary: str, out: str) -> None:
    """Put a folder in place of `out`; a kill in between leaves the old folder, or none."""
    old = f"{temporary}.old"
    shutil.rmtree(old, ignore_errors=True)  # of a process that was killed below
    if os.path.lexists(out):
        os.rename(out, old)
    os.rename(temporary, out)
    shutil.rmtree(old, ignore_errors=True)


def _fill(folder: str, sources: _Sources, shard_tokens: int, threads: int) -> dict[str, Any]:
    """Write everything but the manifest into `folder` and return what the manifest says about it."""
    survey = _Survey(0, 0, 0)
    if sources.val is None or sources.tokenizer is None:
        survey = _survey(sources.read(sources.inputs, "reading"))
    in_val = _given_rule(sources) if sources.val is not None else _share_rule(sources, survey)
    tokenizer = sources.tokenizer
    if tokenizer is None:
        sample = _training_sample(sources.read(sources.inputs, "training the tokenizer"), in_val, survey)
        tokenizer = Tokenizer(train_tokenizer(sample, sources.vocab))
    replace_file(os.path.join(folder, "tokenizer.model"), tokenizer.model)
    train_texts = sources.read(sources.inputs, "tokenising train")
    val_texts = sources.read(sources.val or sources.inputs, "tokenising val")
    train = write_split(folder, "train", train_texts, lambda text: not in_val(text), tokenizer, shard_tokens, threads)
    val = write_split(folder, "val", val_texts, in_val, tokenizer, shard_tokens, threads)
    return {
        "tokenizer": _tokenizer_record(tokenizer),
        "splits": {"train": train.record, "val": val.record},
        "disjoint": {
            "compared": "blake2b-128 of each document's text",
            "rule": "split by hash" if sources.val is None else "training documents that are in validation are dropped",
            "dropped_from_train": 0 if sources.val is None else train.left_out,
        },
        "empty_documents": train.empty + (0 if sources.val is None else val.empty),
    }


def _survey(texts: Iterator[str]) -> _Survey:
    """Return the lowest and highest split value of the non-empty documents, and their bytes."""
    lowest, highest, size = 2**64, -1, 0
    for text in texts:
        if text.strip():
            value = _split_value(text)
            lowest, highest, size = min(lowest, value), max(highest, value), size + len(text.encode())
    return _Survey(lowest, highest, size)


def _split_value(text: str) -> int:
    return int.from_bytes(document_hash(text)[:8], "little")


def _share_rule(sources: _Sources, survey: _Survey) -> Callable[[str], bool]:
    """Validation is what hashes below the share, moved so that neither side is empty."""
    if survey.lowest >= survey.highest:
        raise DataError(f"{sources.inputs[0]}: fewer than two different documents; give a file for val, or more text")
    threshold = min(max(survey.lowest, int(sources.val_share * 2**64)), survey.highest - 1)
    return lambda text: _split_value(text) <= threshold


def _given_rule(sources: _Sources) -> Callable[[str], bool]:
    hashes = {document_hash(text) for text in sources.read(sources.val or [], "reading val")}
    return lambda text: document_hash(text) in hashes


def _training_sample(texts: Iterator[str], in_val: Callable[[str], bool], survey: _Survey) -> Iterator[str]:
    """Yield the training documents, thinned by hash to about TRAINING_BYTES."""
    limit = 2**64 * TRAINING_BYTES // max(survey.size, 1)
    for text in texts:
        if not in_val(text) and int.from_bytes(document_hash(text)[8:], "little") < limit:
            yield text
