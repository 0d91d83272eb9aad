"""Whatever bytes an artifact file holds, reading is refused by name, in bounded time and memory. Budget: 20 s."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.export import artifact, codecs
from core.export.artifact import MAX_FILE, MAX_HEADER, PREFIX, ArtifactError, read_artifact
from core.model.storage import STORAGES
from shared_tests.support.artifacts import TOKENIZER, Refused, join, parts, refusing, write
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
    again = "this version reads 2: write it again from its run: skc export RUN"
    refused(join(header | {"schema": 1}, payload), f"schema: 1; {again}")


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
        text.replace(b'"schema":2', b'"schema":2,"schema":2'),
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
    tensors = header["tensors"]
    swapped = [tensors[1], tensors[0], *tensors[2:]]
    bad_values: dict[str, list[Any]] = {
        "schema": [0, 1, 3, -1, "2", True, 2.0, None],
        "tokenizer_sha256": ["", TOKENIZER.upper(), TOKENIZER + "0", 0, None],
        "provenance": [None, [], {"a": {}}, {"a": []}, {"a": None}, {"a": True}, {"a": "\u001b[2J"}, {"\n": 1}],
        "tensors": [
            [], tensors[:-1], [*tensors, tensors[0]], swapped, {"a": 1}, None,
            [["embed.weights", *tensors[0][1:]], *tensors[1:]],
            [[tensors[0][0], "float32", tensors[0][2]], *tensors[1:]],
            [[tensors[0][0], "int6/64", tensors[0][2]], *tensors[1:]],
            [[*tensors[0][:2], tensors[0][2][::-1]], *tensors[1:]],
            [[*tensors[0][:2], [11.0, 5]], *tensors[1:]],
            [[*tensors[0][:2], [-11, -5]], *tensors[1:]],
        ],
    }  # fmt: skip
    for field, values in bad_values.items():
        for value in values:
            refused(join(header | {field: value}, payload), field)
        refused(join({k: v for k, v in header.items() if k != field}, payload), field)
    refused(join(header | {"extra": 1}, payload), "extra")
    refused(join(header | {"\x1b[2J\n" * 1000: 1}, payload), "")


def test_stream_entries(good: bytes, refused: Refused) -> None:
    header, payload = parts(good)
    entries = header["streams"]
    whole_lists: list[Any] = [
        None, {}, "", [], entries[:-1], [*entries, entries[0]], [entries[1], entries[0], *entries[2:]], entries[::-1],
        [None, *entries[1:]], [[], *entries[1:]], [entries[0] | {"extra": 1}, *entries[1:]],
    ]  # fmt: skip
    for value in whole_lists:
        refused(join(header | {"streams": value}, payload), "streams")
    refused(join({k: v for k, v in header.items() if k != "streams"}, payload), "streams")
    size, raw = entries[1]["payload_bytes"], entries[1]["raw_bytes"]
    bad_values: dict[str, list[Any]] = {
        "name": ["int8", "Scales", "", 1, None, "\x1b[2J"],
        "raw_bytes": [0, raw + 1, raw - 1, -raw, float(raw), str(raw), 2**62, 10**4000, None],
        "window": [0, 10, 15, 17, 24, 25, 16.0, "16", True, None],
        "payload_bytes": [-1, float(size), str(size), True, None, MAX_FILE + 1, 10**30, 10**4300 - 1],
        "sha256": ["", 5, None, entries[1]["sha256"].upper(), entries[1]["sha256"] + "0", "g" * 64],
    }
    for field, values in bad_values.items():
        missing = {k: v for k, v in entries[1].items() if k != field}
        for entry in [*(entries[1] | {field: value} for value in values), missing]:
            refused(join(header | {"streams": [entries[0], entry, *entries[2:]]}, payload), "streams")
    for change in (1, -1):
        entry = entries[1] | {"payload_bytes": size + change}
        refused(join(header | {"streams": [entries[0], entry, *entries[2:]]}, payload), "payload_bytes")
    # One stream's last byte given to the next: the sum is right, the streams are not.
    moved = [entries[0] | {"payload_bytes": entries[0]["payload_bytes"] - 1}, entries[1] | {"payload_bytes": size + 1}]
    moved[1]["window"] = codecs.window_bits(payload[entries[0]["payload_bytes"] - 1 :])
    refused(join(header | {"streams": [*moved, *entries[2:]]}, payload), "float16")


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
    refused(join(header | {"model": put(model, "mlp.hidden", 67)}, payload), "tensors")
    refused(join(header | {"model": {k: v for k, v in model.items() if k != "vocab"}}, payload), "tensors")
    refused(join(header | {"model": model | {"matrix_storage": "ternary/128"}}, payload), "tensors")
    for storage in STORAGES:  # other streams
        if storage != "ternary/128" and storage != "ternary/64":
            refused(join(header | {"model": model | {"matrix_storage": storage}}, payload), "")


def test_a_model_that_memory_cannot_hold(good: bytes, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(artifact.codecs, "unpack", full)
    refused(good, "model: this machine has too little memory")
