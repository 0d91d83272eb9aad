"""Prepared folders: the bundled sample there and back, damage named, official shards adopted. Budget: 10 s."""

import io
from pathlib import Path

import numpy as np
import pytest

import core.prepare
from core.bundled import BUNDLED, open_data, prepare_sample
from core.corpus import read_documents
from core.data import DataError, open_dataset, write_shard
from core.prepare import adopt_shards
from core.tokenizer import Tokenizer, token_bytes

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


def test_sample_is_prepared_on_first_use_under_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = open_data("sample")
    assert (tmp_path / "data" / "sample" / "manifest.json").is_file()
    written = (tmp_path / "data" / "sample" / "train_000000.bin").stat().st_mtime_ns
    output = capsys.readouterr()
    assert "data/sample" in output.err and output.out == ""
    assert open_data("sample").manifest == first.manifest
    assert (tmp_path / "data" / "sample" / "train_000000.bin").stat().st_mtime_ns == written
    assert capsys.readouterr().err == ""


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
    "manifest.json: schema: expected 1, got 2": lambda f: replace(f / "manifest.json", '"schema": 1', '"schema": 2'),
    "manifest.json: tokenizer.sha256: expected text, got 5": lambda f: replace(
        f / "manifest.json", f'"sha256": "{TOKENIZER.sha256}",\n  "vocab"', '"sha256": 5,\n  "vocab"'
    ),
    "manifest.json: splits.val: expected an object, got nothing": lambda f: replace(
        f / "manifest.json", '"val": {', '"vol": {'
    ),
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
    monkeypatch.setattr(core.prepare, "SCAN", 2)
    text = TOKENIZER.encode("It is a truth")
    folder = official_folder(tmp_path, [BOS, *text, BOS, *text])
    with pytest.raises(DataError, match="no manifest"):
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


def test_official_shards_of_another_tokenizer(tmp_path: Path) -> None:
    folder = official_folder(tmp_path, [BOS, 5000])
    with pytest.raises(DataError, match="val: token id 5000 is outside the vocabulary"):
        adopt_shards(folder, str(BUNDLED / "tokenizer.model"))
    assert not (tmp_path / "manifest.json").exists()
