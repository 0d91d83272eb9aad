"""Text to shards: inputs read or refused by line, splits disjoint, folders whole or absent. Budget: 15 s."""

import gzip
import json
import lzma
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import core.data.corpus
import core.data.prepare
import core.data.shards
from core.cli import main
from core.data.corpus import PLAIN, Format, find_inputs, read_documents
from core.data.dataset import DataError, open_dataset
from core.data.prepare import prepare
from core.data.tokenizer import TokenizerError
from shared_tests.support.harness import tiny_tokenizer
from shared_tests.support.texts import MODEL, documents, jsonl, words


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
    monkeypatch.setattr(core.data.corpus, "CHUNK", 7)
    assert list(read_documents([str(path)])) == ["é".join(map(str, range(200))), "end"]


BAD_INPUTS = {
    "a.jsonl:2: not JSON": ("a.jsonl", b'{"text": "x"}\n{"text": \n'),
    "a.jsonl:1: not JSON: 'utf-8' codec": ("a.jsonl", b'{"text": "\xff"}\n'),
    "a.jsonl:3: expected an object with a string text or content or raw_content, got list": (
        "a.jsonl", b'{"text": "x"}\n\n["text"]\n',
    ),
    r"a.jsonl:1: expected an object with a string text .*, got \['text', 'body'\]; name another": (
        "a.jsonl", b'{"text": 5, "body": "x"}\n',
    ),
    "a.jsonl:1: text: not valid Unicode": ("a.jsonl", b'{"text": "\\ud800"}\n'),
    "a.jsonl:2: line over 40 bytes": ("a.jsonl", b'{"text": "x"}\n{"text": "' + b"x" * 40 + b'"}\n'),
    "a.jsonl:1: not JSON: maximum recursion": ("a.jsonl", b"[" * 200_000),
    "a.txt: document 2: not UTF-8: invalid start byte at byte 0: save it": ("a.txt", b"good\f\xff"),
    "a.txt: is UTF-16, expected UTF-8": ("a.txt", "Two bytes each".encode("utf-16")),
    "a.txt: is UTF-32, expected UTF-8": ("a.txt", "Four bytes each".encode("utf-32")),
    "a.txt: seems to be UTF-16 without a mark": ("a.txt", "Two bytes each, é too".encode("utf-16-be")),
    "a.txt: seems to be UTF-32 without a mark": ("a.txt", "Four bytes each".encode("utf-32-le")),
    "a.jsonl: is UTF-16, expected UTF-8": ("a.jsonl", '{"text": "x"}\n'.encode("utf-16")),
    "a.jsonl: seems to be UTF-16 without a mark": ("a.jsonl", '{"text": "x"}\n'.encode("utf-16-le")),
    "a.txt.gz: is UTF-16, expected UTF-8": ("a.txt.gz", gzip.compress("Two bytes each".encode("utf-16"))),
    "a.txt: document 2 is over 40 bytes": ("a.txt", b"x\f" + b"y" * 60),
    "a.txt.gz: damaged compressed file": ("a.txt.gz", gzip.compress(b"hello" * 100)[:-9]),
    "a.txt.gz: damaged compressed file .Not a gz": ("a.txt.gz", b"hello"),
    "a.txt.xz: damaged compressed file": ("a.txt.xz", lzma.compress(b"hello" * 100)[:-9]),
    "a.txt.xz: damaged compressed file .Input": ("a.txt.xz", b"hello"),
    "a.csv: unknown kind of file": ("a.csv", b"hello"),
    "b.txt: no such file": ("a.txt", b"hello"),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    name, content = BAD_INPUTS[message]
    if "40 bytes" in message:
        monkeypatch.setattr(core.data.corpus, "MAX_DOCUMENT", 40)
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
    with pytest.raises(DataError, match="no document with text|documents that are all alike|too short to be split"):
        prepare([source], str(tmp_path / "out"), tokenizer=MODEL)
    assert [file.name for file in tmp_path.iterdir()] == ["t.jsonl"]


@pytest.mark.parametrize("model", [MODEL, None])
def test_validation_that_is_all_or_nothing(tmp_path: Path, model: str | None) -> None:
    """Said at once, with the file: before a tokenizer is trained and before anything is tokenised."""
    source, empty = jsonl(tmp_path / "t.jsonl", words(0, 2)), jsonl(tmp_path / "e.jsonl", ["", " \n"])
    seen: list[str] = []

    def report(stage: str, done: int, total: int) -> None:
        seen.append(stage)

    out = str(tmp_path / "out")
    with pytest.raises(DataError, match=r"t\.jsonl: every document of it is also in --val, so nothing is left"):
        prepare([source], out, val=[source], tokenizer=model, progress=report)
    with pytest.raises(DataError, match=r"e\.jsonl: no document with text, so there is nothing to validate on"):
        prepare([source], out, val=[empty], tokenizer=model, progress=report)
    with pytest.raises(DataError, match=r"e\.jsonl: no document with text, so there is nothing to train on"):
        prepare([empty], out, val=[source], tokenizer=model, progress=report)
    assert set(seen) <= {"reading", "reading val"} and not (tmp_path / "out").exists()


def test_small_shards_hold_the_same_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "t.jsonl", words(0, 40))
    whole = prepare([source], str(tmp_path / "whole"), tokenizer=MODEL)
    monkeypatch.setattr(core.data.shards, "ENCODE_BYTES", 100)
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
        assert core.data.shards.file_sha256(str(tmp_path / "cut" / file["file"])) == file["sha256"]
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
    sources = core.data.prepare._Sources([], None, 0.05, None, None, "none", PLAIN, lambda *_: None)
    rule, claimed = core.data.prepare._Rule(frozenset()), size * core.data.prepare.TRAINING_BYTES // (size // 4)
    kept = list(core.data.prepare._training_sample(sources, texts, rule, claimed))
    assert 400 <= len(kept) <= 600, "about a quarter"
    assert kept == list(core.data.prepare._training_sample(sources, texts, rule, claimed))


def test_impossible_vocabulary_leaves_nothing(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "t.jsonl", words(0, 3))
    with pytest.raises(
        TokenizerError, match=r"vocab=30000: this text gives at most (\d+) pieces; use --vocab"
    ) as caught:
        prepare([source], str(tmp_path / "out"), vocab=30_000)
    with pytest.raises(TokenizerError, match="vocab=260: the letters of this text and the byte pieces alone are"):
        prepare([source], str(tmp_path / "out"), vocab=260)
    assert [file.name for file in tmp_path.iterdir()] == ["t.jsonl"]
    most = int(re.findall(r"--vocab (\d+)", str(caught.value))[0])
    manifest = prepare([source], str(tmp_path / "out"))  # the default is 1024
    assert manifest["tokenizer"]["vocab"] == most < 1024
    assert manifest["notes"] == [f"the tokenizer has {most} pieces: the text allows no more (the default is 1024)"]


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


def copies(text: str) -> list[str]:
    """Return texts that differ from `text` but become the same tokens."""
    return [text.replace("\n", "\r\n"), text.replace(" ", "  "), unicodedata.normalize("NFD", text), f" {text}\n"]


@pytest.mark.parametrize("model", ["bundled", "trained", "plain"])
@pytest.mark.parametrize("given", [True, False])
def test_splits_share_no_document_that_is_read_alike(tmp_path: Path, model: str, given: bool) -> None:
    """Line ends, doubled spaces, Unicode forms; without byte pieces also letters that are unknown alike."""
    texts = [f"the café{' and the' * i} sea,\nthe old town" for i in range(60)]
    if model == "plain":
        (tmp_path / "plain.model").write_bytes(tiny_tokenizer())
        texts += [f"the old {letter} sea" for letter in "☃☄☎☢☣"]
    mixed = [made for text in texts for made in (text, *copies(text))]
    source, held = (
        jsonl(tmp_path / "t.jsonl", mixed),
        jsonl(tmp_path / "v.jsonl", [copies(t)[i % 4] for i, t in enumerate(texts[::7])]),
    )
    path = {"bundled": MODEL, "plain": str(tmp_path / "plain.model"), "trained": None}[model]
    manifest = prepare([source], str(tmp_path / "out"), val=[held] if given else None, val_share=0.2, tokenizer=path)
    dataset = open_dataset(str(tmp_path / "out"))
    sides = []
    for split in (dataset.train, dataset.val):
        starts = [*split.document_starts.tolist(), len(split)]
        sides.append([split.read(a, b).tobytes() for a, b in zip(starts[:-1], starts[1:], strict=True)])
    train, val = map(set, sides)
    assert train and val and not train & val
    if given:
        assert manifest["disjoint"]["dropped_from_train"] == len(mixed) - len(sides[0]) > 0
    else:
        assert len(sides[0]) + len(sides[1]) == len(mixed)


def test_one_text_is_cut_at_a_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A book: its last twentieth becomes validation, and that is said; or its paragraphs are documents."""
    paragraphs = [f"This is paragraph {i}.\nIt says that {i} times {i} is {i * i}." for i in range(200)]
    book = tmp_path / "book.txt"
    book.write_text("\n \n".join(paragraphs))
    assert main(["data", "prepare", str(book), "--out", str(tmp_path / "out"), "--tokenizer", MODEL]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"book\.txt: one text, of which the last [\d,]+ bytes \([45]\.\d%\) are validation; skc data prepare --split b",
        said,
    )
    dataset = open_dataset(str(tmp_path / "out"))
    (train,), (val,) = documents(dataset, "train"), documents(dataset, "val")
    assert (
        val.startswith("This is paragraph 19")
        and val.endswith("is 39601.")
        and train.endswith(f"{int(val[18:21]) - 1} is {(int(val[18:21]) - 1) ** 2}.")
    )
    assert main(["data", "prepare", str(book), "--out", str(tmp_path / "many"), "--split", "blank-lines"]) == 0
    manifest = open_dataset(str(tmp_path / "many")).manifest
    assert sum(split["documents"] for split in manifest["splits"].values()) == 200
    assert "pieces: the text allows no more" in capsys.readouterr().out
    for text in ("one line " * 100, "\n".join(["line"] * 100), "x" * 100):  # no paragraphs, lines or words
        book.write_text(text)
        prepare([str(book)], str(tmp_path / str(len(text))), tokenizer=MODEL, val_share=0.3)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_blank_lines_between_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(core.data.corpus, "CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\nline\n\ntwo\r\n \t\r\nthree\n\n\n\nfour\ffive\n")
    read = list(read_documents([str(tmp_path / "a.txt")], form=Format(split="blank-lines")))
    texts = [text.strip() for text in read]
    expected = ["one\nline", "two", "three", "four", "five"]
    assert [text for text in texts if text] == (expected if chunk > 3 else ["\ufeffone\nline", *expected[1:]])


def test_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.txt", "a.jsonl", "deep/c.txt", ".git/d.txt", "deep/.e.txt", "notes.md"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(json.dumps({"text": name}))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_inputs(["in"]) == ["in/a.jsonl", "in/b.txt", "in/deep/c.txt"]
    assert find_inputs(["in/*.txt", "in/**/c.*"]) == ["in/b.txt", "in/deep/c.txt"]
    (tmp_path / "odd[1].txt").write_text("named like a pattern")
    assert find_inputs(["odd[1].txt"]) == ["odd[1].txt"]
    for path, message in (
        ("empty", "empty: no file in this folder has a name that ends in .txt"),
        ("in/*.zip", r"in/\*\.zip: no file fits this pattern"),
        ("in/*.md", r"in/notes\.md: unknown kind of file"),
    ):
        with pytest.raises(DataError, match=message):
            find_inputs([path])
    manifest = prepare(["in"], "out", tokenizer=MODEL)
    assert [entry["file"] for entry in manifest["made_from"]["inputs"]] == ["a.jsonl", "b.txt", "c.txt"]


def test_text_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "one", "raw_content": "no"}\n{"raw_content": "two", "body": "zwei"}\n', "utf-8-sig")
    assert list(read_documents([str(path)])) == ["one", "two"]
    with pytest.raises(DataError, match="a.jsonl:1: expected an object with a string body, got"):
        list(read_documents([str(path)], form=Format("body")))
    path.write_text('{"text": "no", "body": "eins"}\n{"text": "no", "body": "zwei"}\n')
    assert list(read_documents([str(path)], form=Format("body"))) == ["eins", "zwei"]
    first = prepare([str(path)], str(tmp_path / "out"), tokenizer=MODEL, form=Format("body"))
    assert first["made_from"]["column"] == "body"
    with pytest.raises(DataError, match="made from other inputs"):
        prepare([str(path)], str(tmp_path / "out"), tokenizer=MODEL)


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
