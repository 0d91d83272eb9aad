"""Rules about the text, checked on the data itself: is it disjoint, whole, reversible, and are its bytes right."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from core.audit.rules import Finding
from core.data import Dataset, Split
from core.tokenizer import SPACE, token_bytes

Progress = Callable[[int, int], None]
"""Told (tokens done, tokens in all)."""
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
OFFICIAL_DOCUMENTS = 50_000
OFFICIAL_BYTES = (151_073_000, 151_081_000)
OFFICIAL_BYTES_PER_TOKEN = {1024: (2.43592,), 4096: (3.3197, 3.31925), 8192: (3.72663,)}
"""Vocabulary -> bytes per token of the full public validation text (spec/challenge.md D)."""
TOLERANCE = 2e-4
REPLACED = "\ufffd"
"""What decoding gives for bytes that are no UTF-8."""


def check_disjoint(dataset: Dataset, progress: Progress | None) -> Finding:
    """Rule D6: look for validation text in the training text, as whole documents and as passages of 64 tokens.

    Passages are sampled by their content, 1 in 64, and found wherever they stand, in documents cut differently too.
    FAIL if over 0.1 % of the tokens or over 5 % of the passages are in both. Memory does not grow with training.
    """
    val, train, bos = dataset.val, dataset.train, dataset.tokenizer.bos
    if not len(val) or not len(train):
        return Finding("D6", "NOT CHECKED", f"data {dataset.name}: {len(val)} validation, {len(train)} training tokens")
    total = len(val) + len(train)
    documents, tokens, kept = Counter[bytes](), Counter[bytes](), [np.empty(0, np.uint64)]
    for done, piece in _pieces(val, bos):
        for digest, size in piece.documents:
            documents[digest] += 1
            tokens[digest] += size
        kept.append(piece.hashes[_telling(piece.stream, piece.starts, bos)])
        if progress:
            progress(done, total)
    passages, counts = np.unique(np.concatenate(kept), return_counts=True)
    copied: set[bytes] = set()
    found = np.zeros(len(passages), bool)
    for done, piece in _pieces(train, bos):
        copied.update(digest for digest, _ in piece.documents if digest in documents)
        if len(passages):
            at = np.minimum(np.searchsorted(passages, piece.hashes), len(passages) - 1)
            found[at[passages[at] == piece.hashes]] = True
        if progress:
            progress(len(val) + done, total)
    sampled, seen = int(counts.sum()), int(counts[found].sum())
    details = {
        "documents": documents.total(),
        "copied_documents": sum(documents[digest] for digest in copied),
        "tokens": tokens.total(),
        "copied_tokens": sum(tokens[digest] for digest in copied),
        "passages": sampled,
        "copied_passages": seen,
    }
    share, passage_share = details["copied_tokens"] / max(tokens.total(), 1), seen / max(sampled, 1)
    enough = sampled >= FEW_PASSAGES
    evidence = (
        f"{details['copied_documents']} of {documents.total()} validation documents are also whole training documents: "
        f"{details['copied_tokens']} of {tokens.total()} tokens, {share:.3%} (natural repeats: up to "
        f"{SHARED_TOKENS:.1%}); of {sampled} sampled passages of {PASSAGE} tokens {seen} are in training, "
        f"{passage_share:.2%} "
        + (f"(up to {SHARED_PASSAGES:.0%})" if enough else f"(under {FEW_PASSAGES} passages: not judged)")
        + f"; searched: {len(train)} training tokens of data {dataset.name}"
    )
    fails = share > SHARED_TOKENS or (enough and passage_share > SHARED_PASSAGES)
    return Finding("D6", "FAIL" if fails else "PASS", evidence, details)


def check_bytes(
    dataset: Dataset, claimed: Literal["table", "raw"] | None, limit: int | None, progress: Progress | None
) -> Finding:
    """Rule D13: decode validation documents and hold the byte table, under which a score claims its bytes, to the text.

    `claimed` is the score's byte rule; raw bytes cannot be recounted from tokens, so they are declared, NOT CHECKED.
    `limit`: decode at most so many tokens, whole documents from the start; None: all.
    """
    tokenizer, recorded = dataset.tokenizer, dataset.val.document_bytes is not None
    count, wrong = _recount(dataset, limit, progress)
    details: dict[str, Any] = {"claimed": claimed, **{name: int(value) for name, value in count.items()}}
    sums = f"{_extent(dataset, count['documents'], limit)}: {count['table_bytes']} bytes by the table, "
    sums += f"{count['decoded_bytes']} decoded"
    if recorded and count["decoded_bytes"]:
        details["raw_per_decoded"] = count["raw_bytes"] / count["decoded_bytes"]
        sums += f", {count['raw_bytes']} raw ({details['raw_per_decoded']:.6f} of decoded: normalisation changes text)"
    if claimed != "table":
        what = "bits per raw byte declared" if claimed else "the score names no byte rule"
        return Finding("D13", "NOT CHECKED", f"{what}; {sums}", details)
    problems = []
    unknown = max(count["unknown"], dataset.val.unknown_tokens or 0)
    if not tokenizer.byte_pieces:
        problems.append("the tokenizer lacks byte pieces: what it does not know costs 0 bytes")
    if unknown:
        by = f" ({count['missed']} bytes of text missed in their documents)" if recorded else ""
        problems.append(f"{unknown} unknown tokens were charged 0 bytes each{by}")
    if not (tokenizer.table.leading & (tokenizer.table.base == 0)).any():
        problems.append(
            f"no piece for a space alone: {count['spaces']} spaces were charged 3 bytes each, "
            f"{2 * count['spaces']} too many"
        )
    if wrong:
        problems.append(f"{count['differ']} documents differ, {count['surplus']:+d} bytes in the table ({wrong})")
    if problems:
        return Finding("D13", "FAIL", f"{'; '.join(problems)}; {sums}", details)
    aside = f", {count['broken']} set aside: their tokens hold broken UTF-8, 1 byte a token" if count["broken"] else ""
    evidence = f"{count['agreed']} documents decode to the bytes that the table charges{aside}; {sums}"
    return Finding("D13", "PASS" if count["agreed"] else "NOT CHECKED", evidence, details)


def check_reversible(dataset: Dataset, limit: int | None, progress: Progress | None) -> Finding:
    """Rule D14: decode validation documents, encode the text and decode again; `limit` as in `check_bytes`.

    A document that does not come back proves no wrong, its original text being unknown: NOT CHECKED, with the count.
    """
    tokenizer = dataset.tokenizer
    count, first = Counter[str](), ""
    for number, ids in _documents(dataset, limit, progress):
        text = tokenizer.decode(ids)
        again = tokenizer.encode(text)
        same = np.array_equal(ids, again)
        # Unknown tokens and broken bytes become signs that are text themselves and come back, but the text is lost.
        lossy = tokenizer.unknown in ids or (REPLACED in text and not same)
        whole = not lossy and (same or tokenizer.decode(again) == text)
        count.update(documents=1, returned=whole, same_tokens=same)
        if not whole:
            first = first or f"; the first is document {number}"
    extent = _extent(dataset, count["documents"], limit)
    lost = count["documents"] - count["returned"]
    details = {name: int(count[name]) for name in ("documents", "returned", "same_tokens")}
    if lost or not count["documents"]:
        evidence = (
            f"{extent}: {lost} do not come back from decode(encode(text)), by normalisation, unknown tokens or broken "
            f"UTF-8{first}; their original text is not in the tokens, so nothing can be proved"
        )
        return Finding("D14", "NOT CHECKED", evidence, details)
    evidence = (
        f"no transform but the tokenizer's own normalisation; {extent}: decode(encode(text)) gives the text again, "
        f"{count['same_tokens']} of them by the same tokens"
    )
    return Finding("D14", "PASS", evidence, details)


def check_official(dataset: Dataset, documents: int, targets: int, byte_count: int) -> Finding:
    """Rule D5, second half: is what was scored the full public validation text? By its known constants.

    `targets` are those of the whole stream, tokens - 1, untruncated; `byte_count` is theirs by the table.
    """
    known = OFFICIAL_BYTES_PER_TOKEN.get(dataset.tokenizer.vocab)
    ratio = byte_count / max(targets, 1)
    low, high = OFFICIAL_BYTES
    details = {"documents": documents, "targets": targets, "bytes": byte_count, "vocab": dataset.tokenizer.vocab}
    measured = f"{documents} documents, {targets} targets, {byte_count} bytes, {ratio:.5f} bytes per token"
    if documents != OFFICIAL_DOCUMENTS:
        return Finding("D5", "NOT CHECKED", f"not the official set: {measured}", details)
    if not low <= byte_count <= high:
        return Finding("D5", "FAIL", f"{measured}: expected {low} to {high} bytes in {documents} documents", details)
    if known is None:
        what = (
            f"{measured}: documents and bytes fit, bytes per token are not known for {dataset.tokenizer.vocab} pieces"
        )
        return Finding("D5", "NOT CHECKED", what, details)
    expected = f"expected {' or '.join(map(str, known))} bytes per token, within {TOLERANCE}"
    fits = any(abs(ratio - value) <= TOLERANCE for value in known)
    return Finding("D5", "PASS" if fits else "FAIL", f"{measured}: {expected}", details)


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
        data, begin, documents = memoryview(tokens.astype("<u2").tobytes()), 0, []
        ends = np.flatnonzero(tokens == bos).tolist()
        for end in [*ends, len(tokens)]:
            digest.update(data[2 * begin : 2 * end])
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


def _documents(dataset: Dataset, limit: int | None, progress: Progress | None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, ids without BOS) of the validation documents that end within the first `limit` tokens."""
    starts = dataset.val.document_starts
    ends = np.append(starts[1:], len(dataset.val))
    total = len(dataset.val) if limit is None else min(limit, len(dataset.val))
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if end > total:
            return
        yield number, dataset.val.read(start + 1, end)
        if progress:
            progress(end, total)


def _recount(dataset: Dataset, limit: int | None, progress: Progress | None) -> tuple[Counter[str], str]:
    """Return what decoding counts, and the first document where the table and the text differ."""
    tokenizer, recorded = dataset.tokenizer, dataset.val.document_bytes
    count, wrong = Counter[str](), ""
    for number, ids in _documents(dataset, limit, progress):
        stream = np.append(np.int32(tokenizer.bos), ids)
        text = tokenizer.decode(ids)
        charged = int(token_bytes(tokenizer.table, stream[:-1], stream[1:]).sum(dtype=np.int64))
        decoded = len(text.encode())
        unknown = int(np.count_nonzero(ids == tokenizer.unknown))
        count.update(documents=1, tokens=len(stream), table_bytes=charged, decoded_bytes=decoded)
        count.update(unknown=unknown, spaces=text.count(SPACE))
        if recorded is not None:
            count.update(raw_bytes=int(recorded[number]), missed=int(recorded[number]) - charged if unknown else 0)
        if unknown:
            continue  # decoding makes up a sign for it; it is counted as unknown
        if charged == decoded:
            count.update(agreed=1)
        elif _broken(decoded - charged, text):
            count.update(broken=1)
        else:
            wrong = wrong or f"document {number}: {charged} by the table, {decoded} in the text"
            count.update(differ=1, surplus=charged - decoded)
    return count, wrong


def _extent(dataset: Dataset, documents: int, limit: int | None) -> str:
    total = len(dataset.val.document_starts)
    return (
        f"all {total} documents"
        if documents == total
        else f"first {documents} of {total} documents (limit {limit} tokens)"
    )


def _broken(excess: int, text: str) -> bool:
    """Return whether decoding `text` may have made `excess` bytes: 2 for each sign that stands for one broken byte."""
    return excess % 2 == 0 and 0 < excess // 2 <= text.count(REPLACED)
