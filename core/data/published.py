"""The published validation text, known by its constants (docs/challenge.md, 4): checked, never trusted."""

from typing import Any

from core.data.transform import Transform

DOCUMENTS = 50_000
BYTES = (151_073_000, 151_081_000)
"""By the byte table, whichever tokenizer."""
TARGETS = {
    (1024, "none"): (62_021_632,), (4096, "none"): (45_508_608, 45_514_752), (8192, "none"): (40_540_160,),
    (8192, "caseops"): (47_851_520,),
}  # fmt: skip
"""Vocabulary, transform -> targets as published logs count them: cut to whole rows of at most ROW tokens."""
ROW = 2048
BYTES_PER_TOKEN = {
    (1024, "none"): (2.43592,), (4096, "none"): (3.3197, 3.31925), (8192, "none"): (3.72663,),
    (8192, "caseops"): (3.15715,),
}  # fmt: skip
TOLERANCE = 2e-4
TRAIN_SHARDS = 80
"""Training shards that the challenge's own downloader takes."""


def compare_published(
    vocab: int, documents: int, tokens: int, table_bytes: int, transform: Transform = "none"
) -> dict[str, Any]:
    """Hold a whole validation split to the constants: figures, and in `differs` a line for whatever is not so.

    `same` is None where all that is known fits, but a vocabulary of that size was never published.
    """
    targets, (low, high) = tokens - 1, BYTES
    ratio = table_bytes / max(targets, 1)
    differs = []
    if documents != DOCUMENTS:
        differs.append(f"documents {documents:,} (published: {DOCUMENTS:,})")
    counts = TARGETS.get((vocab, transform))
    if counts and not any(0 <= targets - known < ROW for known in counts):
        known = " or ".join(f"{known:,}" for known in counts)
        differs.append(f"tokens {tokens:,} (published: {known}, and less than a row)")
    if not low <= table_bytes <= high:
        differs.append(f"bytes {table_bytes:,} (published: {low:,} to {high:,})")
    known = BYTES_PER_TOKEN.get((vocab, transform), ())
    if known and not any(abs(ratio - value) <= TOLERANCE for value in known):
        differs.append(f"bytes per token {ratio:.5f} (published: {' or '.join(map(str, known))})")
    same = False if differs else True if known else None
    return {"same": same, "documents": documents, "bytes_per_token": ratio, "differs": differs}


def line(comparison: dict[str, Any]) -> str:
    """Return what `compare_published` found as a line for people."""
    if comparison["differs"]:
        return f"WARNING: NOT the published validation text: {'; '.join(comparison['differs'])}"
    if comparison["same"] is None:
        return f"validation text: documents {comparison['documents']:,} and bytes as published; no such vocabulary was"
    ratio = f"{comparison['bytes_per_token']:.5f} bytes per token"
    return f"validation text: documents {comparison['documents']:,}, tokens, bytes, {ratio}: as published"
