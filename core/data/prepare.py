"""Text to token shards: `prepare` writes a folder that `core.data.dataset.open_dataset` opens.

A folder holds train_%06d.bin and val_%06d.bin (official shards), tokenizer.model, manifest.json and, per split, the raw
bytes of each document (<split>_document_bytes.npy).
"""

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.data.corpus import PLAIN, Format, find_inputs, read_documents
from core.data.making import check_writable, find_damage, find_manifest, install, making
from core.data.manifest import SCHEMA
from core.data.shards import DataError, SplitWriter, file_sha256, grouped
from core.data.tokenizer import Tokenizer
from core.data.tokenizer_training import VocabularyError, train_tokenizer, trained_identity
from core.data.transform import Transform
from core.files import replace_file

Progress = Callable[[str, int, int], None]
"""Called with the stage, and the bytes of input read and in all."""
TRAINING_BYTES = 1 << 27
"""About the most text that a tokenizer is trained on: a sample of the documents, chosen by hash."""
VOCAB = 1024
"""Pieces of a trained tokenizer where nothing else is asked for, if the text allows so many."""
BYTES = "bytes"
"""The name, in place of a file's, of the tokenizer whose every token is one byte."""
BREAKS = (r"\n[ \t\r]*\n\s*", r"\n\s*", r"\s+")
"""Where one text may be cut in two, the best first."""


def prepare(
    inputs: Sequence[str],
    out: str,
    *,
    val: Sequence[str] | None = None,
    val_share: float = 0.05,
    tokenizer: str | None = None,
    vocab: int | None = None,
    transform: Transform = "none",
    shard_tokens: int = 100_000_000,
    name: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    form: Format = PLAIN,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenise text files (or those of folders and patterns) into the folder `out` and return its manifest.

    Without `val`, about `val_share` of the documents (at least one) become validation, chosen by a hash of their
    tokens, so that what the model reads alike lands on one side; of a single text its end does. With `val`, training
    documents that are also in validation are dropped. `tokenizer` is a file, or `bytes`; without it, one of `vocab`
    pieces is trained on the training text (None: 1024, or as many as the text allows). `transform` is what is done to
    every document, once it is normalised, before it becomes tokens; a given tokenizer must have pieces for its markers.
    A folder made from the same inputs is kept if it is sound; one made from others is replaced only with `overwrite`.
    `notes` of the manifest are what a user must know. The manifest is written last, into the folder that was named.
    DataError or TokenizerError says what is wrong with the input.
    """
    if not inputs or (val is not None and not val):
        raise DataError("no input files: give at least one .txt, .jsonl (also .gz, .xz, .zst) or .parquet file")
    if not 0 < val_share < 1:
        raise DataError(f"val_share={val_share}: expected a share between 0 and 1")
    if not 1 <= shard_tokens < 2**31:
        raise DataError(f"shard_tokens={shard_tokens}: expected from 1 to 2^31 - 1")
    report = progress or silent
    before = find_manifest(out)
    if before is None:
        check_writable(out)
    inputs = find_inputs(inputs)
    val = None if val is None else find_inputs(val)
    if tokenizer is not None and vocab is not None:
        raise DataError(
            f"--vocab {vocab} is for a tokenizer that is trained: leave it out with --tokenizer {tokenizer}"
        )
    given = named_tokenizer(tokenizer).transformed(transform, tokenizer) if tokenizer is not None else None
    trained = {"trained": vocab} if vocab is not None else {"trained_at_most": VOCAB}
    made_from = {
        "name": name or os.path.basename(os.path.abspath(out)),
        "inputs": [_identity(path) for path in inputs],
        "val": {"share": val_share} if val is None else [_identity(path) for path in val],
        "tokenizer": trained if given is None else {"sha256": given.sha256},
        "shard_tokens": shard_tokens,
        **({"transform": transform} if transform != "none" else {}),
        **{key: value for key, value in form._asdict().items() if value != getattr(PLAIN, key)},
    }
    if _kept(out, before, made_from, overwrite):
        assert before is not None
        return before
    with making(out, lambda: report("waiting for another process that prepares this folder", 0, 1)) as part:
        before = find_manifest(out)  # another process may have been first
        if _kept(out, before, made_from, overwrite):
            assert before is not None
            return before
        sources = _Sources(inputs, val, val_share, given, vocab, transform, form, report)
        manifest = {"schema": SCHEMA, "name": made_from["name"], "made_from": made_from}
        manifest |= _fill(part, sources, shard_tokens, threads or os.cpu_count() or 1)
        install(part, out, manifest, before)
        return manifest


def named_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a file, or the one called `bytes`; TokenizerError, FileError, OSError."""
    if name != BYTES:
        return Tokenizer.load(name)
    module = importlib.import_module("core.data.tokenizer_json")  # by name, as `Tokenizer.of` says
    return Tokenizer.of(module.byte_tokenizer(), BYTES)


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""


def _identity(path: str) -> dict[str, Any]:
    return {"file": os.path.basename(path), "size": os.path.getsize(path), "sha256": file_sha256(path)}


def _kept(out: str, before: dict[str, Any] | None, made_from: dict[str, Any], overwrite: bool) -> bool:
    """Return whether a folder is already what is asked for; DataError if it is something else and must stay."""
    if before is None:
        return False
    other = before.get("made_from") != made_from
    problem = "holds data made from other inputs" if other else find_damage(out)
    if problem is None:
        return True
    if not overwrite or before.get("made_from") is None:
        raise DataError(f"{out}: {problem.removeprefix(f'{out}: ')}; choose another folder, or --overwrite it")
    return False


class _Sources(NamedTuple):
    inputs: Sequence[str]
    val: Sequence[str] | None
    val_share: float
    tokenizer: Tokenizer | None
    vocab: int | None
    transform: Transform
    form: Format
    progress: Progress

    def read(self, paths: Sequence[str], stage: str) -> Iterator[str]:
        """Yield the documents of `paths`, reporting progress as `stage`."""
        return read_documents(paths, lambda done, total: self.progress(stage, done, total), self.form)

    def key(self, text: str) -> bytes:
        """Return 16 bytes that stand for the tokens of a document; none for one without tokens."""
        spelled = b"" if not text.strip() else (self.tokenizer.identity if self.tokenizer else trained_identity)(text)
        return hashlib.blake2b(spelled, digest_size=16).digest() if spelled else b""


class _Survey(NamedTuple):
    documents: int
    """With tokens, and not in the validation that was given."""
    dropped: int
    lowest: int
    highest: int
    """Of the split values."""
    size: int
    """Bytes of the text."""
    only: str
    """The first document."""


class _Rule(NamedTuple):
    """Which documents become validation: those whose key is known, or whose split value is small."""

    keys: frozenset[bytes]
    threshold: int = -1

    def takes(self, key: bytes) -> bool:
        """Return whether the document of a key is validation."""
        return key in self.keys or _split_value(key) <= self.threshold


def _split_value(key: bytes) -> int:
    return int.from_bytes(key[:8], "little")


def _fill(folder: Path, sources: _Sources, shard_tokens: int, threads: int) -> dict[str, Any]:
    """Write everything but the manifest into `folder` and return what the manifest says about it."""
    given = None if sources.val is None else _keys(sources, sources.val)
    survey = _survey(sources, given or frozenset())
    notes, texts, rule, how = [], None, _Rule(given or frozenset()), "training documents in validation are dropped"
    if given is None and survey.documents == 1:
        texts, note = _cut(sources, survey.only)
        notes, rule, how = [note], _Rule(frozenset([sources.key(texts[1])])), "the end of one text"
    elif given is None:
        rule, how = _share_rule(sources, survey), "split by hash"
    tokenizer = sources.tokenizer
    if tokenizer is None:
        stage = "training the tokenizer"
        sample = _training_sample(sources, texts or sources.read(sources.inputs, stage), rule, survey.size)
        tokenizer = Tokenizer(_trained(sample, sources, notes))
    replace_file(folder / "tokenizer.model", tokenizer.model)
    writers = {name: SplitWriter(str(folder), name, tokenizer, shard_tokens) for name in ("train", "val")}
    empty = 0
    if sources.val is not None:
        empty += _write(sources, sources.read(sources.val, "tokenising val"), threads, lambda key: writers["val"])
    drop = given is not None
    other = None if drop else writers["val"]
    read = texts or sources.read(sources.inputs, "tokenising train" if drop else "tokenising")
    empty += _write(sources, read, threads, lambda key: other if rule.takes(key) else writers["train"])
    return {
        **tokenizer_record(tokenizer),
        "splits": {name: writer.close() for name, writer in writers.items()},
        "disjoint": {
            "compared": "blake2b-128 of each document's tokens",
            "rule": how,
            "dropped_from_train": survey.dropped,
        },
        "empty_documents": empty,
        "notes": notes,
    }


def _write(
    sources: _Sources, texts: Iterator[str] | Sequence[str], threads: int, where: Callable[[bytes], SplitWriter | None]
) -> int:
    """Give each document to the writer that its key says, if one does; return how many have no tokens."""
    empty = 0
    for group in grouped(texts):
        parts: dict[int, tuple[SplitWriter, list[str]]] = {}
        for text in group:
            key = sources.key(text)
            writer = where(key) if key else None
            empty += not key
            if writer is not None:
                parts.setdefault(id(writer), (writer, []))[1].append(text)
        for writer, chosen in parts.values():
            writer.add(chosen, threads)
    return empty


def _keys(sources: _Sources, paths: Sequence[str]) -> frozenset[bytes]:
    """Return the keys of the validation documents; DataError if there is none with text."""
    keys = frozenset(map(sources.key, sources.read(paths, "reading val"))) - {b""}
    if not keys:
        raise DataError(f"{paths[0]}: no document with text, so there is nothing to validate on")
    return keys


def _survey(sources: _Sources, given: frozenset[bytes]) -> _Survey:
    """Read the training text once; DataError if nothing is left of it."""
    documents, dropped, lowest, highest, size, only = 0, 0, 2**64, -1, 0, ""
    for text in sources.read(sources.inputs, "reading"):
        key = sources.key(text)
        if not key:
            continue
        if key in given:
            dropped += 1
            continue
        only = only or text
        value = _split_value(key)
        documents, size = documents + 1, size + len(text.encode())
        lowest, highest = min(lowest, value), max(highest, value)
    more = f" and {len(sources.inputs) - 1} more" if sources.inputs[1:] else ""
    if not documents and dropped:
        raise DataError(
            f"{sources.inputs[0]}{more}: every document of it is also in --val, so nothing is left to train on; give "
            "other text for one of them"
        )
    if not documents:
        raise DataError(f"{sources.inputs[0]}{more}: no document with text, so there is nothing to train on")
    return _Survey(documents, dropped, lowest, highest, size, only)


def _share_rule(sources: _Sources, survey: _Survey) -> _Rule:
    """Validation is what hashes below the share, moved so that neither side is empty."""
    if survey.lowest >= survey.highest:
        raise DataError(
            f"{sources.inputs[0]}: {survey.documents} documents that are all alike; give a file for --val, or more text"
        )
    return _Rule(frozenset(), min(max(survey.lowest, int(sources.val_share * 2**64)), survey.highest - 1))


def _cut(sources: _Sources, text: str) -> tuple[list[str], str]:
    """Return the two parts of a single text, the second to be validation, and what to say about it."""
    aim = len(text) * (1 - sources.val_share)
    first, last = int(aim - len(text) * sources.val_share), int(aim + len(text) * sources.val_share / 2)
    first = max(first, 0)
    places = [first + match.end() for match in _breaks(text[first:last])] or [int(aim)]
    place = min(places, key=lambda place: abs(place - aim))
    parts = [text[:place], text[place:]]
    keys = [sources.key(part) for part in parts]
    if not all(keys) or keys[0] == keys[1]:
        raise DataError(f"{sources.inputs[0]}: one document, too short to be split; give a --val, or more text")
    note = (
        f"{sources.inputs[0]}: one text, of which the last {len(parts[1].encode()):,} bytes "
        f"({len(parts[1]) / len(text):.1%}) are validation; skc data prepare --split blank-lines makes "
        "documents of its paragraphs"
    )
    return parts, note


def _breaks(text: str) -> list[re.Match[str]]:
    """Return the ends of paragraphs in a text; where there are none, of lines; where there are none, of words."""
    return next((matches for kind in BREAKS if (matches := list(re.finditer(kind, text)))), [])


def _trained(sample: Iterator[str], sources: _Sources, notes: list[str]) -> bytes:
    """Return a tokenizer of as many pieces as asked for; by default VOCAB or, noted, as many as the text allows."""
    if sources.vocab is not None:
        return train_tokenizer(sample, sources.vocab, sources.transform)
    texts = list(sample)
    try:
        return train_tokenizer(texts, VOCAB, sources.transform)
    except VocabularyError as error:
        notes.append(f"the tokenizer has {error.most} pieces: the text allows no more (the default is {VOCAB})")
        return train_tokenizer(texts, error.most, sources.transform)


def _training_sample(sources: _Sources, texts: Iterator[str] | Sequence[str], rule: _Rule, size: int) -> Iterator[str]:
    """Yield the training documents, thinned by hash to about TRAINING_BYTES of `size`."""
    limit = 2**64 * TRAINING_BYTES // max(size, 1)
    for text in texts:
        key = sources.key(text)
        if key and not rule.takes(key) and int.from_bytes(key[8:], "little") < limit:
            yield text


def tokenizer_record(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the manifest's entries of the tokenizer and, if there is one, of the transform before it."""
    entry = {
        "file": "tokenizer.model",
        "sha256": tokenizer.sha256,
        "vocab": tokenizer.vocab,
        "bos": tokenizer.bos,
        "unknown": tokenizer.unknown if tokenizer.unknown >= 0 else None,
        "byte_pieces": tokenizer.byte_pieces,
    }
    return {"tokenizer": entry, **({"transform": tokenizer.transform} if tokenizer.transform != "none" else {})}
