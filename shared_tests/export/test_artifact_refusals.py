"""Whatever bytes an artifact file holds, reading is refused by name, in bounded time and memory. Budget: 20 s."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.config import changed
from core.export import artifact
from core.export.artifact import MAX_FILE, MAX_HEADER, PREFIX, ArtifactError, read_artifact
from core.model.params import MOST_VALUES
from core.model.storage import STORAGES, group_size
from shared_tests.support.artifacts import MODEL, TOKENIZER, Refused, join, parts, refusing, repaired, write
from shared_tests.support.hostile import put


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    write(tmp_path / "good.skc")
    return (tmp_path / "good.skc").read_bytes()


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    return refusing(tmp_path / "bad.skc")


def test_framing(good: bytes, refused: Refused) -> None:
    header, payload = parts(good)
    for data, field in (
        (b"", "magic"),
        (b"SKC", "magic"),
        (join(header, payload, b"SKCMODEM"), "magic"),
        (good[:10], "header"),
        (good[:8] + (MAX_HEADER + 1).to_bytes(4, "little") + good[12:], "header length"),
        (good[:8] + b"\xff\xff\xff\xff" + good[12:], "header length"),
        (good[: PREFIX + 20], "header length"),
        (good[:-1], "payload_bytes"),
        (good + b"\0", "payload_bytes"),
    ):
        refused(data, field)


def test_missing_file(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "none.skc", "cannot be read")):
        with pytest.raises(ArtifactError, match=words):
            read_artifact(path)


def test_too_large_a_file(tmp_path: Path) -> None:
    path = tmp_path / "large.skc"
    with open(path, "wb") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(ArtifactError, match="size"):
        read_artifact(path)


def test_a_file_of_an_earlier_schema(good: bytes, refused: Refused) -> None:
    header, payload = parts(good)
    again = "this version reads 3: write it again from its run: skc export RUN"
    for schema in (1, 2):
        refused(join(header | {"schema": schema}, payload), f"schema: {schema}; {again}")


def test_header_text(good: bytes, refused: Refused) -> None:
    header, payload = parts(good)
    text = join(header, b"")[PREFIX:]
    spaced = json.dumps(header, sort_keys=True).encode()
    for bad in (
        b"",
        b"null",
        b"[]",
        b"[" * 500_000,
        b'{"a":' * 100_000,
        text[:-1],
        text + b" ",
        spaced,
        json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode(),
        text.replace(b'"schema":3', b'"schema":3,"schema":3'),
        text.replace(b'"seed":1337', b'"seed":NaN'),
        text.replace(b'"seed":1337', b'"seed":1e999'),
        text.replace(b'"seed":1337', b'"seed":-Infinity'),
        text.replace(b'"seed":1337', b'"seed":' + b"1" * 5000),
        text.replace(b'"seed"', "\u00e9".encode().join([b'"', b'"'])),
        text.replace(b'"seed"', b'"se\\u0065d"'),
    ):
        assert bad != text
        refused(join(bad, payload), "header")


def test_header_fields(good: bytes, refused: Refused) -> None:
    header, payload = parts(good)
    size, sha256 = header["payload_bytes"], header["payload_sha256"]
    bad_values: dict[str, list[Any]] = {
        "schema": [0, 1, 2, 4, -1, "3", True, 3.0, None],
        "tokenizer_sha256": ["", TOKENIZER.upper(), TOKENIZER + "0", 0, None],
        "provenance": [None, [], {"a": {}}, {"a": []}, {"a": None}, {"a": True}, {"a": "\u001b[2J"}, {"\n": 1}],
        "tensors_sha256": [sha256, "", 5, None, header["tensors_sha256"].upper(), []],
        "payload_bytes": [-1, float(size), str(size), True, None, MAX_FILE + 1, 10**30, 10**4300 - 1, size + 1],
        "payload_sha256": ["", 5, None, sha256.upper(), sha256 + "0", "g" * 64],
    }
    for field, values in bad_values.items():
        for value in values:
            refused(join(header | {field: value}, payload), field)
        refused(join({k: v for k, v in header.items() if k != field}, payload), field)
    refused(join(header | {"extra": 1}, payload), "extra")
    refused(join(header | {"\x1b[2J\n" * 1000: 1}, payload), "")


def test_model_fields(good: bytes, refused: Refused) -> None:
    header, payload = parts(good)
    model = header["model"]
    changes: list[tuple[str, Any]] = [
        ("dim", 8.0), ("dim", "8"), ("dim", True), ("dim", -8), ("dim", 0), ("dim", None), ("head.softcap", 0.0),
        ("mlp.activation", ["relu2"]), ("mlp.activation", "gelu"), ("blocks", []), ("blocks", [["attention"]]),
        ("blocks", "attention"), ("blocks", ["x\n\x1b" * 1000]), ("attention.heads", 3), ("attention.rope_dims", 3),
        ("extra", 1), ("k" * 900_000, 1), ("norm_eps", {}), ("bos", 11), ("dim", 10**4300 - 1), ("attention", 3),
        ("attention", None), ("attention.extra", 1), ("attention.heads.extra", 1), ("heads", 2), ("bank", "head"),
        ("matrix_storage", "ternary"), ("matrix_storage", "ternary/32"), ("matrix_storage", None),
        ("embedding.storage", "int6"), ("embedding.storage", "INT6/ROW"), ("embedding.storage", ["int6/row"]),
    ]  # fmt: skip
    changes += [
        ("bos", 1),
        ("attention.rope_base", 10_000),
        ("smear", {}),
        ("smear.on", False),
    ]  # defaults are left out
    for name, value in changes:
        refused(join(header | {"model": put(model, name, value)}, payload), "model")
    for bad in (None, [], "model", 3):
        refused(join(header | {"model": bad}, payload), "model")
    # A model whose table differs from the tensors is as wrong as tensors that differ from the table.
    refused(join(header | {"model": put(model, "mlp.hidden", 67)}, payload), "tensors_sha256")
    refused(join(header | {"model": {k: v for k, v in model.items() if k != "vocab"}}, payload), "tensors_sha256")
    refused(join(header | {"model": model | {"matrix_storage": "ternary/128"}}, payload), "tensors_sha256")
    for storage in STORAGES:  # another model with a right header, but with another number of scales
        if group_size(storage, 66) != 64:
            refused(repaired(changed(MODEL, {"matrix_storage": storage}), payload), "")


def test_a_model_that_memory_cannot_hold(good: bytes, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(artifact.codecs, "unpack", full)
    refused(good, "model: this machine has too little memory")


def test_a_model_of_more_values_than_an_artifact_may_stand_for(good: bytes, refused: Refused) -> None:
    """Models may be larger, as those are that are imported."""
    header, payload = parts(good)
    larger = put(put(header["model"], "vocab", 1 << 20), "embedding.dim", 512)
    assert 1 << 28 < 512 << 20 < MOST_VALUES
    refused(join(header | {"model": larger}, payload), "model: 53")
