"""Prepared folders: the bundled sample there and back, damage named, official shards adopted. Budget: 10 s."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import core.data.adopt
import core.data.dataset
from core.data.adopt import adopt_shards
from core.data.batches import batch
from core.data.bundled import BUNDLED, open_data, prepare_sample, sample_folder
from core.data.corpus import read_documents
from core.data.dataset import DataError, open_dataset, write_shard
from core.data.tokenizer import Tokenizer, token_bytes

TOKENIZER = Tokenizer.load(str(BUNDLED / "tokenizer.model"))
BOS = TOKENIZER.bos


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("data") / "sample")
    prepare_sample(path)
    return path


def test_sample_round_trip(sample: str) -> None:
    """Text to shards and back: every document's tokens decode to its normalised text, its raw bytes are recorded."""
    dataset = open_dataset(sample)
    assert dataset.tokenizer.byte_pieces and dataset.name == "sample"
    texts = {name: list(read_documents([str(BUNDLED / f"{name}.jsonl.xz")])) for name in ("train", "val")}
    assert not set(texts["train"]) & set(texts["val"])
    for split, originals in ((dataset.train, texts["train"]), (dataset.val, texts["val"])):
        starts = [*split.document_starts.tolist(), len(split)]
        assert split.document_bytes is not None and split.unknown_tokens == 0
        assert split.document_bytes.tolist() == [len(text.encode()) for text in originals]
        for text, start, stop in zip(originals, starts[:-1], starts[1:], strict=True):
            assert dataset.tokenizer.decode(split.read(start, stop)) == " ".join(text.split())


def test_sample_manifest_counts(sample: str) -> None:
    dataset = open_dataset(sample)
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        entry = dataset.manifest["splits"][name]
        stream = split.read(0, len(split))
        table_bytes = token_bytes(dataset.tokenizer.table, stream[:-1], stream[1:]).sum()
        assert (entry["documents"], entry["tokens"]) == (len(split.document_starts), len(split))
        assert split.document_bytes is not None
        assert entry["table_bytes"] == table_bytes and entry["raw_bytes"] == split.document_bytes.sum()
        assert entry["bytes_per_token"] == entry["raw_bytes"] / entry["tokens"]
    assert dataset.manifest["disjoint"]["dropped_from_train"] == 0


def test_sample_is_prepared_on_first_use_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not into the folder that one happens to be in; a shard that was damaged there is made again."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, folder = open_data("sample"), tmp_path / "cache" / "skc" / "sample"
    assert first.path == str(folder) and (folder / "manifest.json").is_file()
    written = (folder / "train_000000.bin").stat().st_mtime_ns
    output = capsys.readouterr()
    assert f"preparing the bundled text in {folder}" in output.err and output.out == ""
    assert open_data("sample").manifest == first.manifest
    assert (folder / "train_000000.bin").stat().st_mtime_ns == written
    assert capsys.readouterr().err == "" and not list((tmp_path / "here").iterdir())
    data = bytearray((folder / "train_000000.bin").read_bytes())
    data[5000] ^= 1
    (folder / "train_000000.bin").write_bytes(data)
    assert open_data("sample").manifest == first.manifest
    assert (folder / "train_000000.bin").read_bytes() != bytes(data)
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        monkeypatch.setenv("HOME", str(tmp_path))
        for platform, where in (("darwin", "Library/Caches"), ("linux", ".cache")):
            monkeypatch.setattr(sys, "platform", platform)
            assert sample_folder() == str(tmp_path / where / "skc" / "sample")


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def flip_npy(folder: Path, content: bytes) -> None:
    (folder / "val_document_bytes.npy").write_bytes(content)


def array_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


DAMAGE = {
    "no manifest.json": lambda f: (f / "manifest.json").unlink(),
    "manifest.json: not JSON": lambda f: replace(f / "manifest.json", "{", "{{"),
    "manifest.json: schema: 2, expected 1": lambda f: replace(f / "manifest.json", '"schema": 1', '"schema": 2'),
    "manifest.json: tokenizer: sha256: 5, expected a text": lambda f: replace(
        f / "manifest.json", f'"sha256": "{TOKENIZER.sha256}",\n  "vocab"', '"sha256": 5,\n  "vocab"'
    ),
    "manifest.json: splits: val: missing": lambda f: replace(f / "manifest.json", '"val": {', '"vol": {'),
    "val_000000.bin: missing": lambda f: (f / "val_000000.bin").unlink(),
    "val_000000.bin: count: 3 tokens, the manifest says 40433": lambda f: write_shard(
        str(f / "val_000000.bin"), np.array([1, 2, 3])
    ),
    "tokenizer.model: sha256": lambda f: replace(
        f / "manifest.json", f'"sha256": "{TOKENIZER.sha256}",', '"sha256": "0",'
    ),
    "document_bytes: not a .npy array of version 1.0": lambda f: flip_npy(f, b"junk"),
    "document_bytes: 191 bytes, expected 192 for 8 documents": lambda f: flip_npy(f, array_file(np.arange(8))[:-1]),
    "document_bytes: expected one row of int64, got <f8": lambda f: flip_npy(f, array_file(np.arange(8.0))),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damaged_folder(sample: str, tmp_path: Path, message: str) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in Path(sample).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert open_dataset(str(folder)).val.document_bytes is not None
    DAMAGE[message](folder)
    with pytest.raises(DataError, match=message.replace(".", r"\.")) as caught:
        open_dataset(str(folder))
    assert "\n" not in str(caught.value)


def official_folder(folder: Path, val: list[int]) -> str:
    write_shard(str(folder / "fineweb_train_000000.bin"), np.array([BOS, 5, 6, BOS]))
    write_shard(str(folder / "fineweb_train_000001.bin"), np.array([7, 3, 8]))
    write_shard(str(folder / "fineweb_val_000000.bin"), np.array(val))
    return str(folder)


def test_official_shards_get_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.data.adopt, "SCAN", 2)
    text = TOKENIZER.encode("It is a truth")
    folder = official_folder(tmp_path, [BOS, *text, BOS, *text])
    with pytest.raises(DataError, match="no manifest.json here"):
        open_dataset(folder)
    manifest = adopt_shards(folder, str(BUNDLED / "tokenizer.model"))
    dataset = open_dataset(folder)
    assert dataset.train.read(0, 7).tolist() == [BOS, 5, 6, BOS, 7, 3, 8]
    assert dataset.train.document_starts.tolist() == [0, 3] and dataset.train.document_bytes is None
    assert dataset.train.unknown_tokens == 1
    assert manifest["splits"]["val"]["table_bytes"] == 2 * len("It is a truth")
    assert manifest["splits"]["val"]["documents"] == 2
    with pytest.raises(DataError, match="has a manifest"):
        adopt_shards(folder, str(BUNDLED / "tokenizer.model"))


REFUSED = {
    "val: token id 5000 is outside the vocabulary": [BOS, 5000],
    "fineweb_val_000000.bin: does not start with BOS": [5, 6, BOS],
    "fineweb_val_000000.bin: val: 2 tokens, none of which is text": [BOS, BOS],
    "fineweb_val_000000.bin: val: 1 tokens, none of which is text": [BOS],
}


@pytest.mark.parametrize("message", REFUSED)
def test_official_shards_that_cannot_be_used(tmp_path: Path, message: str) -> None:
    """Of another tokenizer, without documents, or without anything to score: said before a manifest is written."""
    folder = official_folder(tmp_path, REFUSED[message])
    with pytest.raises(DataError, match=message):
        adopt_shards(folder, str(BUNDLED / "tokenizer.model"))
    assert not (tmp_path / "manifest.json").exists()


def set_value(manifest: Any, where: str, value: Any) -> None:
    *path, last = [int(key) if key.isdecimal() else key for key in where.split(".")]
    for key in path:
        manifest = manifest[key]
    manifest[last] = value


TYPED = {
    "splits.val.table_bytes": ["118495", True, -1, 1.5, 2**70, [], {}],
    "splits.val.documents": ["8", None],
    "splits.train.tokens": ["8", None, True],
    "splits.val.raw_bytes": [-3, 1e300],
    "splits.val.unknown_tokens": ["0"],
    "splits.train.bytes_per_token": ["2", True, [1]],
    "splits.train.files.0.tokens": [True, None],
    "splits.train.files.0.size": ["1"],
    "splits.train.files.0.sha256": [5],
    "splits.train.files": [{}, "train_000000.bin", [5]],
    "splits.train": [[], 7],
    "splits": [[1, 2]],
    "name": [None, 5, "x" * 20_000],
    "tokenizer.vocab": ["1024"],
    "notes": ["text", [5]],
    "transform": ["upper", 5, True],
    "splits.val.token_bytes": [{}, "val_bytes_000000.bin", [5]],
    "published": [5, {"same": 1, "documents": 1, "bytes_per_token": 1, "differs": []}],
    "made_from": ["me", {"train_shards": {"taken": "80", "published": 1}}],
    **{
        where: ["../a", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\ud800", "a\nb", "\x1b[2J", "x" * 300]
        for where in ("tokenizer.file", "splits.val.files.0.file", "splits.val.document_bytes")
    },
}  # fmt: skip


@pytest.mark.parametrize("where", TYPED)
def test_every_value_of_a_manifest_has_its_type(sample: str, tmp_path: Path, where: str) -> None:
    """One reader, one line that names the field; no name leads out of the folder."""
    for file in Path(sample).iterdir():
        os.link(file, tmp_path / file.name)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").unlink()
    for value in TYPED[where]:
        manifest = json.loads(text)
        set_value(manifest, where, value)
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DataError, match=r"manifest\.json: ") as caught:
            open_dataset(str(tmp_path))
        line = str(caught.value)
        assert where.split(".")[-1] in line and "expected" in line and line.isprintable() and len(line) < 400, line


@pytest.mark.parametrize("path", ["a\0b", "a\ud800", "nowhere", "manifest.json/x"])
def test_paths_that_are_none(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError) as caught:
        open_dataset(path)
    assert str(caught.value).isprintable()


def test_raw_bytes_add_up_to_what_the_manifest_says(sample: str, tmp_path: Path) -> None:
    for file in Path(sample).iterdir():
        os.link(file, tmp_path / file.name)
    lengths = np.load(tmp_path / "val_document_bytes.npy")
    lengths[3] += 1
    (tmp_path / "val_document_bytes.npy").unlink()
    np.save(tmp_path / "val_document_bytes.npy", lengths)
    dataset = open_dataset(str(tmp_path))
    with pytest.raises(DataError, match="document_bytes: 118496 in all, the manifest says 118495"):
        _ = dataset.val.document_bytes


def test_training_ends_with_a_word_about_a_shard_that_changed(
    sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared at once where it is small; else aside, and the next batch or the end of training raises it."""
    for file in Path(sample).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((tmp_path / "train_000000.bin").read_bytes())
    data[-2] ^= 1
    (tmp_path / "train_000000.bin").write_bytes(data)
    small, large, closed = (open_dataset(str(tmp_path)).train for _ in range(3))
    with pytest.raises(DataError, match=r"train_000000\.bin: sha256: "):
        small.start_verify()
    monkeypatch.setattr(core.data.dataset, "SMALL", 10)
    large.start_verify()
    assert large._check is not None
    large._check.join()
    with pytest.raises(DataError, match=r"train_000000\.bin: sha256: "):
        batch(large, 0, 1, 8, 0)
    closed.start_verify()
    with pytest.raises(DataError, match=r"train_000000\.bin: sha256: "):
        closed.close("training ended")
    sound = open_dataset(sample).train
    sound.start_verify()
    assert batch(sound, 0, 1, 8, 0).tokens.shape == (1, 8)
    sound.close("training ended")
