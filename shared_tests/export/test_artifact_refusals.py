"""Whatever bytes an artifact file holds, reading is refused by name, in bounded time and memory. Budget: 20 s."""

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import brotli
import pytest

from core.export import artifact, codecs
from core.export.artifact import MAX_FILE, MAX_HEADER, PREFIX, ArtifactError, read_artifact
from core.model.storage import STORAGES
from shared_tests.support.artifacts import TOKENIZER, Refused, join, parts, refusing, write


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


def test_a_file_of_schema_0(good: bytes, refused: Refused) -> None:
    """What the last version wrote: one stream, its numbers beside the model's."""
    header, _ = parts(good)
    old_model = {k: v for k, v in header["model"].items() if k not in ("matrix_storage", "table_storage")}
    payload = brotli.compress(bytes(100), quality=5)
    old = {
        "schema": 0,
        "model": old_model,
        "tokenizer_sha256": TOKENIZER,
        "tensors": [[name, "float16", shape] for name, _, shape in header["tensors"]],
        "raw_bytes": 100,
        "payload_bytes": len(payload),
        "sha256": hashlib.sha256(bytes(100)).hexdigest(),
        "provenance": {"seed": 1},
    }
    refused(join(old, payload), "schema: 0; this reader knows 1: export it again")


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
        text.replace(b'"schema":1', b'"schema":1,"schema":1'),
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
        "schema": [0, 2, -1, "1", True, 1.0, None],
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
    changes: list[Any] = [
        {"dim": 8.0}, {"dim": "8"}, {"dim": True}, {"dim": -8}, {"dim": 0}, {"dim": None}, {"softcap": 0.0},
        {"activation": ["relu2"]}, {"activation": "gelu"}, {"blocks": []}, {"blocks": [["attention"]]},
        {"blocks": "attention"}, {"blocks": ["x\n\x1b" * 1000]}, {"heads": 3}, {"rope_dims": 3}, {"extra": 1},
        {"k" * 900_000: 1}, {"norm_eps": {}}, {"bos": 11}, {"rope_base": 10_000}, {"dim": 10**4300 - 1},
        {"matrix_storage": "ternary"}, {"matrix_storage": "ternary/32"}, {"matrix_storage": None},
        {"table_storage": "int6"}, {"table_storage": "INT6/ROW"}, {"table_storage": ["int6/row"]},
    ]  # fmt: skip
    for change in changes:
        refused(join(header | {"model": model | change}, payload), "model")
    refused(join(header | {"model": {k: v for k, v in model.items() if k != "bos"}}, payload), "model")
    for bad in (None, [], "model", 3):
        refused(join(header | {"model": bad}, payload), "model")
    # A model whose table differs from the tensors is as wrong as tensors that differ from the table.
    refused(join(header | {"model": model | {"mlp_hidden": 67}}, payload), "tensors")
    refused(join(header | {"model": model | {"matrix_storage": "ternary/128"}}, payload), "tensors")
    for storage in STORAGES:  # other streams
        if storage != "ternary/128" and storage != "ternary/64":
            refused(join(header | {"model": model | {"matrix_storage": storage}}, payload), "")


HUGE = [
    {"layers": 10**9},
    {"layers": 1024, "dim": 1 << 20, "mlp_hidden": 1 << 20},
    {"vocab": 2**40},
    {"vocab": 10**4000},
    {"dim": 2**40, "heads": 1, "kv_heads": 1},
    {"dim": 2**20, "heads": 2**20, "kv_heads": 2**20, "rope_dims": 0},
    {"embed_dim": 2**60},
    {"mlp_hidden": 2**63},
    {"vocab": 2**20, "embed_dim": 257},
    {"blocks": ["attention"] * 60_000, "layers": 60_000},
    {"layers": 2**40, "shared_blocks": 2**39},
    {"repeat_layers": [0, 2**60], "layers": 2**61},
    {"capsule_block": 2**40},
    {"blocks": ["koopman"], "mixer_dim": 2**40},
    {"blocks": ["skc"], "capsules": 2**40},
    {"blocks": ["skc"], "capsules": 2**62, "capsule_heads": 4},
    {"engram_orders": 3, "engram_dim": 12 * 2**40},
    {"bigram_buckets": 65_521, "bigram_dim": 2**60},
    {"bank": "both", "bank_heads": 1, "bank_capsules": 2**50},
]


@pytest.mark.parametrize("sizes", HUGE)
def test_huge_sizes_cost_nothing(good: bytes, refused: Refused, sizes: dict[str, Any]) -> None:
    header, payload = parts(good)
    data = join(header | {"model": header["model"] | sizes}, payload)
    tracemalloc.start()
    refused(data, "model")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def test_a_model_that_memory_cannot_hold(good: bytes, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(artifact.codecs, "unpack", full)
    refused(good, "model: this machine has too little memory")
