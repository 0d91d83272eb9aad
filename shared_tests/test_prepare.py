"""Text to shards: inputs read or refused by line, splits disjoint, folders whole or absent. Budget: 15 s."""

import gzip
import json
import lzma
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import core.corpus
import core.prepare
import core.shards
from core.bundled import BUNDLED
from core.corpus import read_documents
from core.data import DataError, Dataset, open_dataset
from core.prepare import prepare
from core.tokenizer import TokenizerError
from shared_tests.harness import tiny_tokenizer

MODEL = str(BUNDLED / "tokenizer.model")
ROOT = Path(__file__).parent.parent


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def words(start: int, stop: int) -> list[str]:
    return [f"This is document number {i}, and it says {i * i}." for i in range(start, stop)]


def documents(dataset: Dataset, name: str) -> list[str]:
    split = dataset.train if name == "train" else dataset.val
    starts = [*split.document_starts.tolist(), len(split)]
    return [dataset.tokenizer.decode(split.read(a, b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]


def test_every_kind_of_file(tmp_path: Path) -> None:
    lines = b'{"text": "caf\\u00e9", "id": 1}\n\n{"text": "two\\nlines"}\n'
    text = "first\fsecond é\f\fthird".encode()
    for name, content in (("a.jsonl", lines), ("b.txt", text)):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        (tmp_path / f"{name}.xz").write_bytes(lzma.compress(content))
    for suffix in ("", ".gz", ".xz"):
        seen: list[tuple[int, int]] = []
        paths = [str(tmp_path / f"a.jsonl{suffix}"), str(tmp_path / f"b.txt{suffix}")]
        read = list(read_documents(paths, lambda done, total: seen.append((done, total))))  # noqa: B023
        assert read == ["café", "two\nlines", "first", "second é", "", "third"]
        total = sum(Path(path).stat().st_size for path in paths)
        assert seen[-1] == (total, total) and all(0 <= done <= total for done, _ in seen)


def test_text_documents_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("é".join(map(str, range(200))) + "\fend", encoding="utf-8")
    monkeypatch.setattr(core.corpus, "CHUNK", 7)
    assert list(read_documents([str(path)])) == ["é".join(map(str, range(200))), "end"]


BAD_INPUTS = {
    "a.jsonl:2: not JSON": ("a.jsonl", b'{"text": "x"}\n{"text": \n'),
    "a.jsonl:1: not JSON: 'utf-8' codec": ("a.jsonl", b'{"text": "\xff"}\n'),
    "a.jsonl:3: expected an object with a string": ("a.jsonl", b'{"text": "x"}\n\n["text"]\n'),
    "a.jsonl:1: expected an object with a string": ("a.jsonl", b'{"text": 5}\n'),
    "a.jsonl:1: text: not valid Unicode": ("a.jsonl", b'{"text": "\\ud800"}\n'),
    "a.jsonl:2: line over 40 bytes": ("a.jsonl", b'{"text": "x"}\n{"text": "' + b"x" * 40 + b'"}\n'),
    "a.jsonl:1: not JSON: maximum recursion": ("a.jsonl", b"[" * 200_000),
    "a.txt: document 2: not UTF-8": ("a.txt", b"good\f\xff"),
    "a.txt: document 2 is over 40 bytes": ("a.txt", b"x\f" + b"y" * 60),
    "a.txt.gz: damaged compressed file": ("a.txt.gz", gzip.compress(b"hello" * 100)[:-9]),
    "a.txt.gz: damaged compressed file .Not a gz": ("a.txt.gz", b"hello"),
    "a.txt.xz: damaged compressed file": ("a.txt.xz", lzma.compress(b"hello" * 100)[:-9]),
    "a.txt.xz: damaged compressed file .Input": ("a.txt.xz", b"hello"),
    "a.csv: unknown kind of file": ("a.csv", b"hello"),
    "b.txt: no such file": ("a.txt", b"hello"),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    name, content = BAD_INPUTS[message]
    if "40 bytes" in message:
        monkeypatch.setattr(core.corpus, "MAX_DOCUMENT", 40)
    (tmp_path / name).write_bytes(content)
    given = tmp_path / ("b.txt" if message.startswith("b.txt") else name)
    with pytest.raises(DataError, match=message) as caught:
        prepare([str(given)], str(tmp_path / "out"), tokenizer=MODEL)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [name], "something half-made was left"


def test_given_val_is_kept_out_of_train(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "t.jsonl", [*words(0, 6), "", "  \n", *words(2, 4), *words(100, 102)])
    val = jsonl(tmp_path / "v.jsonl", [*words(2, 4), *words(50, 52), " "])
    manifest = prepare([train], str(tmp_path / "out"), val=[val], tokenizer=MODEL)
    dataset = open_dataset(str(tmp_path / "out"))
    assert documents(dataset, "train") == [*words(0, 2), *words(4, 6), *words(100, 102)]
    assert documents(dataset, "val") == [*words(2, 4), *words(50, 52)]
    assert manifest["disjoint"]["dropped_from_train"] == 4
    assert manifest["empty_documents"] == 3
    assert dataset.manifest == manifest


def test_split_by_hash_keeps_duplicates_together(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "t.jsonl", [*words(0, 300), *words(0, 300), ""])
    manifest = prepare([source], str(tmp_path / "out"), val_share=0.2, tokenizer=MODEL)
    dataset = open_dataset(str(tmp_path / "out"))
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(words(0, 300) * 2)
    assert 60 <= len(val) <= 180, "about a fifth of 600"
    assert manifest["empty_documents"] == 1 and manifest["disjoint"]["dropped_from_train"] == 0


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_both_splits_get_a_document(tmp_path: Path, share: float) -> None:
    source = jsonl(tmp_path / "t.jsonl", [*words(0, 2), " "])
    manifest = prepare([source], str(tmp_path / "out"), val_share=share, tokenizer=MODEL)
    assert [manifest["splits"][name]["documents"] for name in ("train", "val")] == [1, 1]


@pytest.mark.parametrize("texts", [[], ["", " "], ["same", "same"]])
def test_too_few_documents_to_split(tmp_path: Path, texts: list[str]) -> None:
    source = jsonl(tmp_path / "t.jsonl", texts)
    with pytest.raises(DataError, match="fewer than two different documents"):
        prepare([source], str(tmp_path / "out"), tokenizer=MODEL)


def test_nothing_left_for_train(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "t.jsonl", words(0, 2))
    with pytest.raises(DataError, match="train: no document with text is left"):
        prepare([source], str(tmp_path / "out"), val=[source], tokenizer=MODEL)


def test_small_shards_hold_the_same_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "t.jsonl", words(0, 40))
    whole = prepare([source], str(tmp_path / "whole"), tokenizer=MODEL)
    monkeypatch.setattr(core.shards, "ENCODE_BYTES", 100)
    cut = prepare([source], str(tmp_path / "cut"), tokenizer=MODEL, shard_tokens=97, threads=1)
    one, many = open_dataset(str(tmp_path / "whole")).train, open_dataset(str(tmp_path / "cut")).train
    np.testing.assert_array_equal(one.read(0, len(one)), many.read(0, len(many)))
    np.testing.assert_array_equal(one.document_starts, many.document_starts)
    files = cut["splits"]["train"]["files"]
    assert len(files) == -(-len(one) // 97) > 2 and {file["tokens"] for file in files[:-1]} == {97}
    ignored = {"files"}
    for name in ("train", "val"):
        a, b = whole["splits"][name], cut["splits"][name]
        assert {k: v for k, v in a.items() if k not in ignored} == {k: v for k, v in b.items() if k not in ignored}
    for file in files:
        assert core.shards.file_sha256(str(tmp_path / "cut" / file["file"])) == file["sha256"]
        assert (tmp_path / "cut" / file["file"]).stat().st_size == file["size"]


def test_a_tokenizer_is_trained_on_train_only(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "t.jsonl", words(0, 60))
    val = jsonl(tmp_path / "v.jsonl", ["zebra zebra zebra zebra"] * 20)
    prepare([train], str(tmp_path / "out"), val=[val], vocab=320)
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.tokenizer.vocab == 320 and dataset.tokenizer.byte_pieces
    assert dataset.tokenizer.decode(dataset.tokenizer.encode("is document")[-1:]) == "document"
    assert len(dataset.tokenizer.encode("zebra")) == 5
    assert documents(dataset, "val") == ["zebra zebra zebra zebra"] * 20


def test_training_sample_is_bounded_by_hash(tmp_path: Path) -> None:
    texts = words(0, 2000)
    size = sum(len(text.encode()) for text in texts)
    survey = core.prepare._Survey(0, 0, size * core.prepare.TRAINING_BYTES // (size // 4))
    kept = list(core.prepare._training_sample(iter(texts), lambda text: False, survey))
    assert 400 <= len(kept) <= 600, "about a quarter"
    assert kept == list(core.prepare._training_sample(iter(texts), lambda text: False, survey))


def test_impossible_vocabulary_leaves_nothing(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "t.jsonl", words(0, 3))
    with pytest.raises(TokenizerError, match="vocab=30000"):
        prepare([source], str(tmp_path / "out"), vocab=30_000)
    assert [file.name for file in tmp_path.iterdir()] == ["t.jsonl"]


def test_unknown_tokens_and_both_byte_counts(tmp_path: Path) -> None:
    """Without byte pieces the table falls short of the text: the manifest must say so."""
    (tmp_path / "plain.model").write_bytes(tiny_tokenizer())
    source = jsonl(tmp_path / "t.jsonl", ["the ☃ sea", "the old sea", "a café"])
    val = jsonl(tmp_path / "v.jsonl", ["the town"])
    manifest = prepare([source], str(tmp_path / "out"), val=[val], tokenizer=str(tmp_path / "plain.model"))
    train = manifest["splits"]["train"]
    assert manifest["tokenizer"]["byte_pieces"] is False
    assert train["unknown_tokens"] == open_dataset(str(tmp_path / "out")).train.unknown_tokens == 1
    assert train["raw_bytes"] == 11 + 11 + 7
    assert train["table_bytes"] == train["raw_bytes"] - 4


def test_an_existing_folder(tmp_path: Path) -> None:
    one, two = jsonl(tmp_path / "a.jsonl", words(0, 9)), jsonl(tmp_path / "b.jsonl", words(5, 19))
    out = str(tmp_path / "out")
    first = prepare([one], out, tokenizer=MODEL)
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert prepare([one], out, tokenizer=MODEL) == first
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp, "made again"
    for changed in (
        lambda: prepare([two], out, tokenizer=MODEL),
        lambda: prepare([one], out, tokenizer=MODEL, val_share=0.3),
        lambda: prepare([one], out, tokenizer=MODEL, shard_tokens=50),
        lambda: prepare([one], out, vocab=270),
    ):
        with pytest.raises(DataError, match="out: holds data made from other inputs") as caught:
            changed()
        assert "\n" not in str(caught.value)
    assert open_dataset(out).manifest == first
    second = prepare([two], out, tokenizer=MODEL, overwrite=True)
    assert open_dataset(out).manifest == second != first
    (tmp_path / "out" / "train_000000.bin").write_bytes(b"")
    with pytest.raises(DataError, match="or damaged"):
        prepare([two], out, tokenizer=MODEL)
    assert prepare([two], out, tokenizer=MODEL, overwrite=True) == second == open_dataset(out).manifest
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "t.jsonl", words(0, 9))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="exists and holds no prepared data"):
        prepare([source], str(tmp_path / "out"), tokenizer=MODEL, overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


KILLED = """
import os, signal, sys
from core.prepare import prepare
def die(stage, done, total):
    if stage == sys.argv[4]:
        os.kill(os.getpid(), signal.SIGKILL)
prepare([sys.argv[1]], sys.argv[2], tokenizer=sys.argv[3], overwrite=True, progress=die)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_leaves_nothing_half_made(tmp_path: Path, existing: bool) -> None:
    source = jsonl(tmp_path / "t.jsonl", words(0, 200))
    out = tmp_path / "out"
    before = prepare([jsonl(tmp_path / "o.jsonl", words(0, 9))], str(out), tokenizer=MODEL) if existing else None
    killed = subprocess.run([sys.executable, "-c", KILLED, source, str(out), MODEL, "tokenising val"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert [file for file in tmp_path.iterdir() if file.name.endswith(".part")], "killed before it wrote anything"
    if before is None:
        assert not out.exists()
    else:
        assert open_dataset(str(out)).manifest == before
    after = prepare([source], str(out), tokenizer=MODEL, overwrite=True)
    assert open_dataset(str(out)).manifest == after


def test_a_second_process_that_finishes_first_wins(tmp_path: Path) -> None:
    source, out = jsonl(tmp_path / "t.jsonl", words(0, 20)), str(tmp_path / "out")
    nested: list[dict] = []

    def other(stage: str, done: int, total: int) -> None:
        if stage == "tokenising val" and not nested:
            nested.append({})
            nested.append(prepare([source], out, tokenizer=MODEL))

    assert prepare([source], out, tokenizer=MODEL, progress=other) == nested[1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "t.jsonl"]


BAD_OPTIONS: dict[str, Callable[[str, str], dict]] = {
    "no input files": lambda source, out: prepare([], out),
    "no input files: ": lambda source, out: prepare([source], out, val=[]),
    "val_share=0": lambda source, out: prepare([source], out, val_share=0),
    "val_share=1": lambda source, out: prepare([source], out, val_share=1),
    "shard_tokens=0": lambda source, out: prepare([source], out, shard_tokens=0),
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_bad_options(tmp_path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        BAD_OPTIONS[message](jsonl(tmp_path / "t.jsonl", words(0, 3)), str(tmp_path / "out"))
