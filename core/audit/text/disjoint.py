"""Rule D6: is validation text in the training text, as whole documents or as passages?"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from core.audit.rules import Finding, Progress
from core.data.dataset import Dataset, Split

CHUNK = 1 << 16
"""Tokens of a stream in memory at once: few enough for a processor's cache, which makes hashing twice as fast."""
PASSAGE = 64
"""Tokens of a passage."""
FEW_TOKENS = 8
"""A passage with fewer distinct tokens is filler (a run of spaces), which says nothing about where it came from."""
FEW_PASSAGES = 100
"""Fewer sampled passages than this decide nothing."""
SHARED_TOKENS, SHARED_PASSAGES = 0.001, 0.05
"""Shares of validation tokens in whole documents, and of passages, that may be in training too: people repeat texts."""


def check_disjoint(dataset: Dataset, progress: Progress | None) -> Finding:
    """Rule D6: look for validation text in the training text, as whole documents and as passages of 64 tokens.

    Passages are sampled by their content, 1 in 64, and found wherever they stand, in documents cut differently too.
    FAIL if over 0.1 % of the tokens or over 5 % of the passages are in both. Memory does not grow with training.
    """
    val, train, bos = dataset.val, dataset.train, dataset.tokenizer.bos
    if not len(val) or not len(train):
        return Finding("D6", "NOT CHECKED", f"data {dataset.name}: {len(val)} validation, {len(train)} training tokens")
    total = len(val) + len(train)
    documents, tokens, samples = Counter[bytes](), Counter[bytes](), [np.empty(0, np.uint64)]
    for done, piece in _pieces(val, bos):
        for digest, size in piece.documents:
            documents[digest] += 1
            tokens[digest] += size
        samples.append(piece.hashes[_telling(piece.stream, piece.starts, bos)])
        if progress:
            progress(done, total)
    passages, counts = np.unique(np.concatenate(samples), return_counts=True)
    copied: set[bytes] = set()
    in_training = np.zeros(len(passages), bool)
    for done, piece in _pieces(train, bos):
        copied.update(digest for digest, _ in piece.documents if digest in documents)
        if len(passages):
            at = np.minimum(np.searchsorted(passages, piece.hashes), len(passages) - 1)
            in_training[at[passages[at] == piece.hashes]] = True
        if progress:
            progress(len(val) + done, total)
    sampled, copied_passages = int(counts.sum()), int(counts[in_training].sum())
    details = {
        "documents": documents.total(),
        "copied_documents": sum(documents[digest] for digest in copied),
        "tokens": tokens.total(),
        "copied_tokens": sum(tokens[digest] for digest in copied),
        "passages": sampled,
        "copied_passages": copied_passages,
    }
    share, passage_share = details["copied_tokens"] / max(tokens.total(), 1), copied_passages / max(sampled, 1)
    enough = sampled >= FEW_PASSAGES
    evidence = (
        f"{details['copied_documents']} of {documents.total()} validation documents are also whole training documents: "
        f"{details['copied_tokens']} of {tokens.total()} tokens, {share:.3%} (natural repeats: up to "
        f"{SHARED_TOKENS:.1%}); of {sampled} sampled passages of {PASSAGE} tokens {copied_passages} are in training, "
        f"{passage_share:.2%} "
        + (f"(up to {SHARED_PASSAGES:.0%})" if enough else f"(under {FEW_PASSAGES} passages: not judged)")
        + f"; searched: {len(train)} training tokens of data {dataset.name}"
    )
    fails = share > SHARED_TOKENS or (enough and passage_share > SHARED_PASSAGES)
    unsure = not enough and passage_share > SHARED_PASSAGES
    return Finding("D6", "FAIL" if fails else "NOT CHECKED" if unsure else "PASS", evidence, details)


class _Piece(NamedTuple):
    """A chunk of a stream."""

    documents: list[tuple[bytes, int]]
    """(digest, tokens) of the documents that end here, without BOS; none of the empty ones."""
    stream: np.ndarray  # the chunk and what its passages need of the chunk before
    starts: np.ndarray  # (sampled,) first tokens of passages in `stream`
    hashes: np.ndarray  # (sampled,) uint64


def _pieces(split: Split, bos: int) -> Iterator[tuple[int, _Piece]]:
    """Yield (tokens done, chunk) over a whole split; every document and every passage comes once, however it is cut."""
    tail, digest, size = np.empty(0, np.int32), hashlib.blake2b(digest_size=16), 0
    for start in range(0, len(split), CHUNK):
        tokens = split.read(start, min(start + CHUNK, len(split)))
        done = start + len(tokens)
        data, begin, documents = memoryview(tokens.astype("<i4").tobytes()), 0, []
        ends = np.flatnonzero(tokens == bos).tolist()
        for end in [*ends, len(tokens)]:
            digest.update(data[4 * begin : 4 * end])
            size += end - begin
            if end == len(tokens) and done < len(split):
                break  # goes on in the next chunk
            if size:
                documents.append((digest.digest(), size))
            digest, size, begin = hashlib.blake2b(digest_size=16), 0, end + 1
        stream = np.concatenate([tail, tokens])
        tail = stream[max(len(stream) - PASSAGE + 1, 0) :]
        yield done, _Piece(documents, stream, *_sample(stream))


def _sample(stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (starts, hashes) of the passages of a stream whose hash says that they are in the sample, 1 in 64."""
    if len(stream) < PASSAGE:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    values, powers, inverses = _constants(len(stream))
    sums = values[stream]  # in place from here on, modulo 2^64
    sums *= powers
    np.cumsum(sums, out=sums)
    hashes = sums[PASSAGE - 1 :].copy()
    hashes[1:] -= sums[:-PASSAGE]
    hashes *= inverses[: len(hashes)]  # sum of values[t_i] * base^i, i from 0, wherever the passage stands
    starts = _select(hashes)
    return starts, hashes[starts]


def _select(hashes: np.ndarray) -> np.ndarray:
    """Return which hashes are in the sample, 1 in 64; their high bits are the well mixed ones."""
    return np.flatnonzero(hashes >> np.uint64(58) == 0)


@functools.lru_cache(4)
def _constants(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a random uint64 for every token id, and the powers of an odd base and of its inverse modulo 2^64."""
    values = np.frombuffer(hashlib.shake_128(b"passages").digest(8 << 16), "<u8").astype(np.uint64)
    base = 0x9E3779B97F4A7C15
    rows = [np.full(length, factor, np.uint64) for factor in (base, pow(base, -1, 1 << 64))]
    for row in rows:
        row[0] = 1
    return values, np.cumprod(rows[0]), np.cumprod(rows[1])


def _telling(stream: np.ndarray, starts: np.ndarray, bos: int) -> np.ndarray:
    """Return which passages lie in one document and are no filler, (starts,) bool."""
    passages = np.sort(stream[starts[:, None] + np.arange(PASSAGE)], axis=1)
    distinct = 1 + np.count_nonzero(np.diff(passages), axis=1)
    return (distinct >= FEW_TOKENS) & ~(passages == bos).any(1)
