"""Streams of an artifact that no writer makes (brotli, codes, scales, padding) are refused by name. Budget: 10 s."""

import hashlib
import tracemalloc
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest

from core.config import changed
from core.export import codecs
from core.export.artifact import read_artifact
from shared_tests.support.artifacts import MODELS, Refused, full_range, join, parts, payloads, refusing, write


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    return refusing(tmp_path / "bad.skc")


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
    model = changed(
        MODELS["rows"],
        {
            "vocab": 3,
            "dim": 7,
            "attention.heads": 1,
            "attention.kv_heads": 1,
            "embedding.dim": None,
            "embedding.storage": storage,
        },
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


def test_decompression_bomb(tmp_path: Path, refused: Refused) -> None:
    header, packed, _ = made(tmp_path, "ternary")
    bomb = brotli.compress(bytes(1 << 28), quality=5)
    assert len(bomb) < 1000
    for stream in packed:
        data = repack(header, packed, stream, bomb, None)
        tracemalloc.start()
        refused(data, stream)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20


def test_sizes_around_the_decoder_s_buffers() -> None:
    """The decoder hands out 32 KiB, then ever larger blocks: an exact or almost full block must read like any other."""
    for size in [2**15 * n + d for n in (1, 3, 7, 11) for d in range(-2, 3)]:
        raw = np.random.default_rng(size).integers(0, 9, size, np.uint8).tobytes()
        payload = codecs.compress("int8", raw)
        assert codecs.inflate("int8", payload, size) == raw
        for wrong in (size - 1, size + 1):
            with pytest.raises(codecs.CodecError, match=f"the {wrong} bytes"):
                codecs.inflate("int8", payload, wrong)
