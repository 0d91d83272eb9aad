"""Rules about the text, checked on the data itself: is it the whole set, reversible, and are its bytes right."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from core.audit.rules import Finding, Progress
from core.data import published
from core.data.dataset import Dataset
from core.data.tokenizer import SPACE
from core.data.transform import TransformError

REPLACED = "\ufffd"
"""What decoding gives for bytes that are no UTF-8."""


def check_bytes(
    dataset: Dataset,
    claimed: Literal["table", "raw"] | None,
    limit: int | None,
    progress: Progress | None,
    scored: int | None = None,
) -> Finding:
    """Rule D13: decode validation documents and hold the byte table, under which a score claims its bytes, to the text.

    `claimed` is the score's byte rule; raw bytes cannot be recounted from tokens, so they are declared, NOT CHECKED.
    `limit`: decode at most so many tokens, whole documents from the start; None: all. `scored`: the bytes that the
    score of all documents was divided by.
    """
    tokenizer, recorded = dataset.tokenizer, dataset.val.document_bytes is not None
    source = "table" if dataset.val.sidecar is None else "sidecar"
    count, wrong = _recount(dataset, limit, progress)
    details: dict[str, Any] = {"claimed": claimed, **{name: int(value) for name, value in count.items()}}
    sums = f"{_extent(dataset, count['documents'], limit)}: {count['table_bytes']} bytes by the {source}, "
    sums += f"{count['decoded_bytes']} decoded"
    if recorded and count["decoded_bytes"]:
        details["raw_per_decoded"] = count["raw_bytes"] / count["decoded_bytes"]
        sums += f", {count['raw_bytes']} raw ({details['raw_per_decoded']:.6f} of decoded: normalisation changes text)"
    if claimed != "table":
        why = f" ({tokenizer.table_fault})" if tokenizer.table_fault else ""
        what = f"bits per raw byte declared{why}" if claimed else "the score names no byte rule"
        return Finding("D13", "NOT CHECKED", f"{what}; {sums}", details)
    problems = []
    unknown = max(count["unknown"], dataset.val.unknown_tokens or 0)
    if not tokenizer.byte_pieces:
        problems.append("the tokenizer lacks byte pieces: what it does not know costs 0 bytes")
    if unknown:
        by = f" ({count['missed']} bytes of text missed in their documents)" if recorded else ""
        problems.append(f"{unknown} unknown tokens were charged 0 bytes each{by}")
    if tokenizer.spaced and not (tokenizer.table.leading & (tokenizer.table.base == 0)).any():
        problems.append(
            f"no piece for a space alone: {count['spaces']} spaces were charged 3 bytes each, "
            f"{2 * count['spaces']} too many"
        )
    if wrong:
        problems.append(f"{count['differ']} documents differ, {count['surplus']:+d} bytes in the {source} ({wrong})")
    if scored is not None and limit is None and scored != count["table_bytes"]:
        problems.append(f"the score was divided by {scored} bytes")
    if problems:
        return Finding("D13", "FAIL", f"{'; '.join(problems)}; {sums}", details)
    aside = f", {count['broken']} set aside: their tokens hold broken UTF-8, 1 byte a token" if count["broken"] else ""
    evidence = f"{count['agreed']} documents decode to the bytes that the {source} charges{aside}; {sums}"
    return Finding("D13", "PASS" if count["agreed"] else "NOT CHECKED", evidence, details)


def check_reversible(dataset: Dataset, limit: int | None, progress: Progress | None) -> Finding:
    """Rule D14: decode validation documents, encode the text and decode again; `limit` as in `check_bytes`.

    A document that does not come back proves no wrong, its original text being unknown: NOT CHECKED, with the count.
    """
    tokenizer = dataset.tokenizer
    count, first = Counter[str](), ""
    for number, _, ids in _documents(dataset, limit, progress):
        try:
            text = tokenizer.decode(ids, strict=True)
        except TransformError as error:
            count.update(documents=1)
            first = first or f"; the first is document {number}: {error}"
            continue
        again = tokenizer.encode(text)
        same = np.array_equal(ids, again)
        # Unknown tokens and broken bytes become signs that are text themselves and come back, but the text is lost.
        lossy = tokenizer.unknown in ids or (REPLACED in text and not same)
        whole = not lossy and (same or tokenizer.decode(again) == text)
        count.update(documents=1, returned=int(whole), same_tokens=int(same))
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
    does = "no transform but" if tokenizer.transform == "none" else f"transform {tokenizer.transform}, undone, and"
    evidence = (
        f"{does} the tokenizer's own normalisation; {extent}: decode(encode(text)) gives the text again, "
        f"{count['same_tokens']} of them by the same tokens"
    )
    return Finding("D14", "PASS", evidence, details)


def check_official(dataset: Dataset, documents: int, targets: int, byte_count: int) -> Finding:
    """Rule D5, second half: is what was scored the full public validation text? By its known constants.

    `targets` are those of the whole stream, tokens - 1, untruncated; `byte_count` is theirs by the table.
    """
    known = published.BYTES_PER_TOKEN.get((dataset.tokenizer.vocab, dataset.tokenizer.transform))
    ratio = byte_count / max(targets, 1)
    low, high = published.BYTES
    details = {"documents": documents, "targets": targets, "bytes": byte_count, "vocab": dataset.tokenizer.vocab}
    measured = f"{documents} documents, {targets} targets, {byte_count} bytes, {ratio:.5f} bytes per token"
    if documents != published.DOCUMENTS or abs(byte_count / low - 1) > 0.5:
        return Finding("D5", "NOT CHECKED", f"not the official set: {measured}", details)
    if not low <= byte_count <= high:
        return Finding("D5", "FAIL", f"{measured}: expected {low} to {high} bytes in {documents} documents", details)
    if known is None:
        what = (
            f"{measured}: documents and bytes fit, bytes per token are not known for {dataset.tokenizer.vocab} pieces"
        )
        return Finding("D5", "NOT CHECKED", what, details)
    expected = f"expected {' or '.join(map(str, known))} bytes per token, within {published.TOLERANCE}"
    fits = any(abs(ratio - value) <= published.TOLERANCE for value in known)
    own = "" if fits else "; documents and bytes fit, so perhaps another tokenizer of as many pieces"
    return Finding("D5", "PASS" if fits else "NOT CHECKED", f"{measured}: {expected}{own}", details)


def _documents(dataset: Dataset, limit: int | None, progress: Progress | None) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (number, place of the first id, ids without BOS) of the documents that end within `limit` tokens."""
    starts = dataset.val.document_starts
    ends = np.append(starts[1:], len(dataset.val))
    total = len(dataset.val) if limit is None else min(limit, len(dataset.val))
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        if end > total:
            return
        yield number, start + 1, dataset.val.read(start + 1, end)
        if progress:
            progress(end, total)


def _recount(dataset: Dataset, limit: int | None, progress: Progress | None) -> tuple[Counter[str], str]:
    """Return what decoding counts, and the first document where the table and the text differ."""
    tokenizer, recorded = dataset.tokenizer, dataset.val.document_bytes
    count, wrong = Counter[str](), ""
    for number, begin, ids in _documents(dataset, limit, progress):
        text = tokenizer.decode(ids)
        charged = int(dataset.val.costs(begin, begin + len(ids)).sum(dtype=np.int64))
        decoded = len(text.encode())
        unknown = int(np.count_nonzero(ids == tokenizer.unknown))
        count.update(documents=1, tokens=1 + len(ids), table_bytes=charged, decoded_bytes=decoded)
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
            wrong = wrong or f"document {number}: {charged} charged, {decoded} in the text"
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
