"""Whatever bytes an artifact file holds, reading is refused by name, in bounded time and memory. Budget: 20 s."""

import dataclasses
import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest

from core.export import artifact, codecs
from core.export.artifact import MAX_FILE, MAX_HEADER, PREFIX, ArtifactError, read_artifact
from core.storage import STORAGES
from shared_tests.test_artifact import MODELS, TOKENIZER, full_range, join, parts, payloads, write

Refused = Callable[[bytes, str], None]


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    write(tmp_path / "good.skc")
    return (tmp_path / "good.skc").read_bytes()


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    def check(data: bytes, field: str) -> None:
        path = tmp_path / "bad.skc"
        path.write_bytes(data)
        with pytest.raises(ArtifactError) as caught:
            read_artifact(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: {field}"), message
        assert message.isprintable() and len(message) < 500

    return check


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
    for path in (tmp_path, tmp_path / "none.skc"):
        with pytest.raises(ArtifactError, match="cannot be read"):
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


def made(tmp_path: Path, name: str) -> tuple[dict[str, Any], dict[str, bytes], dict[str, bytes]]:
    """Header, brotli streams and what they hold of an artifact of one of the models."""
    write(tmp_path / "made.skc", MODELS[name])
    data = (tmp_path / "made.skc").read_bytes()
    packed = payloads(data)
    return parts(data)[0], packed, {key: brotli.decompress(part) for key, part in packed.items()}


def repack(header: dict[str, Any], packed: dict[str, bytes], name: str, payload: bytes, raw: bytes | None) -> bytes:
    """An artifact with one stream in place of another; its size, window and (with `raw`) checksum are put right."""
    streams = []
    for entry in header["streams"]:
        if entry["name"] == name:
            entry = entry | {"payload_bytes": len(payload), "window": codecs.window_bits(payload)}
            entry |= {} if raw is None else {"sha256": hashlib.sha256(raw).hexdigest()}
        streams.append(entry)
    return join(header | {"streams": streams}, b"".join((packed | {name: payload}).values()))


@pytest.mark.parametrize("stream", ["float16", "scales", "ternary", "int6 high", "int6 low"])
def test_a_stream_that_is_not_one(tmp_path: Path, refused: Refused, stream: str) -> None:
    header, packed, held = made(tmp_path, "ternary")
    payload, raw = packed[stream], held[stream]
    for bad in (raw[:-1], raw + b"\0", b"", raw[:1]):
        refused(repack(header, packed, stream, brotli.compress(bad, lgwin=16), bad), stream)
    unfinished = brotli.Compressor(lgwin=16)
    for bad in (
        payload + b"\0",
        payload[:-1],
        payload[: len(payload) // 2],
        payload + brotli.compress(b"", lgwin=16),
        unfinished.process(raw) + unfinished.flush(),
        b"",
    ):
        refused(repack(header, packed, stream, bad, None), stream)
    other = bytearray(raw)
    other[len(raw) // 2] ^= 1
    refused(repack(header, packed, stream, brotli.compress(bytes(other), lgwin=16), None), f"{stream}: sha256")


@pytest.mark.parametrize("window", [10, 11, 12, 13, 14, 15])
def test_a_window_that_no_writer_may_ask_for(tmp_path: Path, refused: Refused, window: int) -> None:
    header, packed, held = made(tmp_path, "ternary")
    payload = brotli.compress(held["scales"], lgwin=window)
    assert codecs.window_bits(payload) == window
    refused(repack(header, packed, "scales", payload, None), "scales: a brotli window")


@pytest.mark.parametrize("window", range(16, 25))
def test_every_window_that_a_writer_may_ask_for(tmp_path: Path, window: int) -> None:
    header, packed, held = made(tmp_path, "ternary")
    payload = brotli.compress(held["scales"], lgwin=window)
    (tmp_path / "a.skc").write_bytes(repack(header, packed, "scales", payload, None))
    assert codecs.window_bits(payload) == window and read_artifact(tmp_path / "a.skc").size


def test_a_declared_window_that_is_not_the_stream_s(tmp_path: Path, refused: Refused) -> None:
    header, packed, held = made(tmp_path, "ternary")
    data = repack(header, packed, "scales", brotli.compress(held["scales"], lgwin=20), None)
    header, payload = parts(data)
    header["streams"][1]["window"] = 16
    refused(join(header, payload), "streams")


def half(value: float) -> bytes:
    return np.array(value, "<f2").tobytes()


BAD_HALVES = {
    "float16": [half(v) for v in (np.nan, np.inf, -np.inf)] + [b"\x01\x7c", b"\xff\xff"],
    "scales": [half(v) for v in (np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0, 2.0**-14 - 2.0**-24, 2.0**-24)],
}


@pytest.mark.parametrize("stream", BAD_HALVES)
def test_halves_that_no_writer_makes(tmp_path: Path, refused: Refused, stream: str) -> None:
    header, packed, held = made(tmp_path, "ternary")
    for number in (0, 7, len(held[stream]) // 2 - 1):
        for value in BAD_HALVES[stream]:
            planes = np.frombuffer(held[stream], np.uint8).reshape(2, -1).copy()
            planes[:, number] = np.frombuffer(value, np.uint8)
            raw = planes.tobytes()
            refused(repack(header, packed, stream, brotli.compress(raw, lgwin=16), raw), stream)
    planes = np.frombuffer(held[stream], np.uint8).reshape(2, -1).copy()
    planes[:, 7] = np.frombuffer(half(2.0**-14), np.uint8)  # the smallest scale that a writer makes
    raw = planes.tobytes()
    (tmp_path / "a.skc").write_bytes(repack(header, packed, stream, brotli.compress(raw, lgwin=16), raw))
    assert read_artifact(tmp_path / "a.skc").size


# Model, stream, the bytes that no writer makes at any place, and one that is fine.
BAD_CODES = [
    ("ternary", "ternary", range(243, 256), 242),
    ("nibbles", "int4", [0x0F, 0xF0, 0xFF, 0xF7, 0x7F], 0xEE),
    ("bytes", "int8", [255], 254),
    ("nibbles", "fp8", [0x7F, 0xFF], 0xFE),
]


@pytest.mark.parametrize("name, stream, bad, fine", BAD_CODES, ids=[case[1] for case in BAD_CODES])
def test_codes_that_no_writer_makes(
    tmp_path: Path, refused: Refused, name: str, stream: str, bad: list[int], fine: int
) -> None:
    header, packed, held = made(tmp_path, name)
    for place in (0, len(held[stream]) // 2):
        for byte in bad:
            raw = held[stream][:place] + bytes([byte]) + held[stream][place + 1 :]
            refused(repack(header, packed, stream, brotli.compress(raw, lgwin=16), raw), stream)
        raw = held[stream][:place] + bytes([fine]) + held[stream][place + 1 :]
        (tmp_path / "a.skc").write_bytes(repack(header, packed, stream, brotli.compress(raw, lgwin=16), raw))
        assert read_artifact(tmp_path / "a.skc").size


def test_a_code_of_int6_beyond_the_largest(tmp_path: Path, refused: Refused) -> None:
    """63 takes all four bits of the high stream and both of the low one: 60 to 62 are fine."""
    header, packed, held = made(tmp_path, "ternary")
    for low, fine in ((0, True), (1, True), (2, True), (3, False)):
        high_raw = bytes([held["int6 high"][0] | 0x0F]) + held["int6 high"][1:]
        low_raw = bytes([held["int6 low"][0] & 0xFC | low]) + held["int6 low"][1:]
        data = repack(header, packed, "int6 high", brotli.compress(high_raw, lgwin=16), high_raw)
        data = repack(parts(data)[0], payloads(data), "int6 low", brotli.compress(low_raw, lgwin=16), low_raw)
        if fine:
            (tmp_path / "a.skc").write_bytes(data)
            assert read_artifact(tmp_path / "a.skc").stored["embed.weight"].codes.flat[0] == 60 + low - 31
        else:
            refused(data, "int6: has a code beyond 31")


@pytest.mark.parametrize(
    "stream, storage", [("ternary", "ternary/64"), ("int4", "int4/row"), ("int6 high", "int6/row")]
)
def test_padding_that_is_not_zero(tmp_path: Path, refused: Refused, stream: str, storage: Any) -> None:
    """A table of 3 x 7 = 21 codes: one trit, one nibble or one pair of bits in the last byte, the rest is padding."""
    model = dataclasses.replace(
        MODELS["rows"], vocab=3, dim=7, heads=1, kv_heads=1, embed_dim=None, table_storage=storage
    )
    write(tmp_path / "made.skc", model, full_range(model))
    data = (tmp_path / "made.skc").read_bytes()
    header, packed = parts(data)[0], payloads(data)
    paddings = {"ternary": [3, 9, 27, 81, 162], "int4": [0x10, 0x80], "int6 high": [0x10, 0x80], "int6 low": [4, 64]}
    for name in [stream, *(["int6 low"] if stream == "int6 high" else [])]:
        raw = brotli.decompress(packed[name])
        for extra in paddings[name]:
            bad = raw[:-1] + bytes([raw[-1] + extra])
            refused(repack(header, packed, name, brotli.compress(bad, lgwin=16), bad), f"{name}: its padding")


def test_decompression_bomb(good: bytes, refused: Refused) -> None:
    header, packed = parts(good)[0], payloads(good)
    bomb = brotli.compress(bytes(1 << 28), quality=5)
    assert len(bomb) < 1000
    for stream in packed:
        data = repack(header, packed, stream, bomb, None)
        tracemalloc.start()
        refused(data, stream)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20


def test_a_model_that_memory_cannot_hold(good: bytes, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(artifact.codecs, "unpack", full)
    refused(good, "model: this machine has too little memory")


def test_sizes_around_the_decoder_s_buffers() -> None:
    """The decoder hands out 32 KiB, then ever larger blocks: an exact or almost full block must read like any other."""
    for size in [2**15 * n + d for n in (1, 3, 7, 11) for d in range(-2, 3)]:
        raw = np.random.default_rng(size).integers(0, 9, size, np.uint8).tobytes()
        payload = codecs.compress("int8", raw)
        assert codecs.inflate("int8", payload, size) == raw
        for wrong in (size - 1, size + 1):
            with pytest.raises(codecs.CodecError, match=f"the {wrong} bytes"):
                codecs.inflate("int8", payload, wrong)
