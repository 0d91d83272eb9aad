"""Bytes: what nats are divided by, under the official table or under the raw text, and the error of an estimate."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from core.config import ConfigError
from core.data.dataset import Dataset, Split
from core.data.tokenizer import Tokenizer

UNKNOWN = "the text has unknown tokens, which would cost nothing"
CHUNK = 1 << 20
"""Tokens held at once while bytes are counted."""


def bits_per_byte(nats: float, byte_count: int) -> float:
    """Return bits per byte of text that cost `nats` in total: nats / ln 2 / bytes. The one place that does."""
    return nats / math.log(2.0) / byte_count


class Bytes(NamedTuple):
    """Bytes of each scored range, (ranges,) int64, under the rule that applies."""

    rule: Literal["table", "raw"]
    counted: np.ndarray
    """Bytes under `rule`."""
    raw: np.ndarray | None
    """UTF-8 bytes of the original text, where known."""


def count_bytes(split: Split, begins: np.ndarray, ends: np.ndarray, documents: np.ndarray | None) -> Bytes:
    """Count the bytes of the targets begin + 1 .. end of each range, by the table if it holds, else raw.

    `documents` are the documents that the ranges are; None: one range, all of them. The table does not hold where the
    tokenizer spells text in pieces that it does not charge by their own bytes (`Tokenizer.table_fault`), or the text
    has unknown tokens. ConfigError if neither rule can be used.
    """
    raw, tokenizer = split.document_bytes, split.tokenizer
    if raw is not None:
        raw = np.array([np.sum(raw)]) if documents is None else np.asarray(raw)[documents]
    table = _table_bytes(split, begins, ends)
    counted = raw if table is None else table
    if counted is None:
        raise ConfigError(
            f"{split.name}: bits per byte is undefined: {tokenizer.table_fault or UNKNOWN}, and the raw "
            "bytes of its text were not recorded; prepare it again with `skc data prepare`"
        )
    if counted.sum() <= 0:
        raise ConfigError(f"{split.name}: the text has no bytes; prepare it again from non-empty text")
    return Bytes("raw" if table is None else "table", counted, raw)


def training_bytes(dataset: Dataset) -> tuple[Literal["table", "raw"], int] | None:
    """Return (rule, bytes of the training text) by the manifest, under the rule that a score of such text would use."""
    entry = dataset.manifest["splits"]["train"]
    if dataset.tokenizer.table_fault is None and entry.get("unknown_tokens") == 0 and entry.get("table_bytes"):
        return "table", entry["table_bytes"]
    return ("raw", entry["raw_bytes"]) if entry.get("raw_bytes") else None


def byte_note(tokenizer: Tokenizer, val: Mapping[str, Any]) -> str | None:
    """Return what a user must know of how the bytes of a validation text are counted; `val`: its manifest's entry."""
    raw, table, fault = val.get("raw_bytes"), val.get("table_bytes"), tokenizer.table_fault
    if fault is None and val.get("unknown_tokens"):
        fault = UNKNOWN
    if fault is not None:
        return f"bytes are those of the raw text, for the byte table does not hold: {fault}"
    if raw and table and table > raw:
        return (
            f"the byte table counts {table:,} bytes of validation, {table / raw - 1:.1%} more than its raw text has, "
            "for normalisation makes it longer: bits per byte are better than those of the raw text by as much"
        )
    return None


def _table_bytes(split: Split, begins: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """Return bytes by the official table (docs/challenge.md, 2) per range, or None where the table does not hold."""
    tokenizer = split.tokenizer
    if tokenizer.table_fault is not None or split.unknown_tokens:
        return None
    counted = np.zeros(len(begins), np.int64)
    for i, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        for start in range(begin, end, CHUNK):
            stop = min(start + CHUNK, end)
            if (split.read(start + 1, stop + 1) == tokenizer.unknown).any():
                return None
            counted[i] += split.costs(start + 1, stop + 1).sum(dtype=np.int64)
    return counted


def ratio_error(nats: np.ndarray, byte_counts: np.ndarray, population: int) -> float | None:
    """Return the standard error of sum(nats) / sum(bytes) over documents drawn uniformly without replacement.

    Delete-one jackknife with finite-population correction, for k of N documents:
    sqrt((1 - k / N) (k - 1) / k * sum((ratio without i - ratio)^2)). For many documents it equals linearisation
    (Cochran, Sampling Techniques, chapter 6), which for few documents of unequal length is up to 40 % too small.
    None where the draw says nothing about spread: one document of several, or one that holds all the bytes.
    """
    k, total = len(nats), byte_counts.sum()
    if k == population:
        return 0.0
    rest = total - byte_counts
    if k == 1 or rest.min() <= 0:
        return None
    shift = (nats.sum() - nats) / rest - nats.sum() / total
    return math.sqrt((1 - k / population) * (k - 1) / k * float(shift @ shift))
