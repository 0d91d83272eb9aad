"""Whatever bytes an artifact file holds, reading is refused by name, in bounded time and memory. Budget: 25 s."""

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

from core.config import ModelConfig
from core.export.artifact import MAX_FILE, MAX_HEADER, PREFIX, Artifact, ArtifactError, read_artifact
from core.params import param_table, start_values
from shared_tests.test_artifact import TOKENIZER, join, parts, some_weights, write


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    write(tmp_path / "good.skc")
    return (tmp_path / "good.skc").read_bytes()


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[bytes, str], None]:
    def check(data: bytes, field: str) -> None:
        path = tmp_path / "bad.skc"
        path.write_bytes(data)
        with pytest.raises(ArtifactError) as caught:
            read_artifact(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: {field}"), message
        assert message.isprintable() and len(message) < 500

    return check


def test_framing(good: bytes, refused: Callable[[bytes, str], None]) -> None:
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


def test_header_text(good: bytes, refused: Callable[[bytes, str], None]) -> None:
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
        text.replace(b'"schema":0', b'"schema":0,"schema":0'),
        text.replace(b'"seed":1337', b'"seed":NaN'),
        text.replace(b'"seed":1337', b'"seed":1e999'),
        text.replace(b'"seed":1337', b'"seed":-Infinity'),
        text.replace(b'"seed":1337', b'"seed":' + b"1" * 5000),
        text.replace(b'"seed"', "\u00e9".encode().join([b'"', b'"'])),
        text.replace(b'"seed"', b'"se\\u0065d"'),
    ):
        assert bad != text
        refused(join(bad, payload), "header")


def test_header_fields(good: bytes, refused: Callable[[bytes, str], None]) -> None:
    header, payload = parts(good)
    tensors = header["tensors"]
    swapped = [tensors[1], tensors[0], *tensors[2:]]
    bad_values: dict[str, list[Any]] = {
        "schema": [1, -1, "0", False, 0.0, None],
        "tokenizer_sha256": ["", TOKENIZER.upper(), TOKENIZER + "0", 0, None],
        "sha256": ["", 5, header["sha256"].upper()],
        "payload_bytes": [len(payload) + 1, len(payload) - 1, -1, float(len(payload)), "9", True, 10**30],
        "raw_bytes": [0, header["raw_bytes"] + 2, float(header["raw_bytes"]), 2**62, None],
        "provenance": [None, [], {"a": {}}, {"a": []}, {"a": None}, {"a": True}, {"a": "\u001b[2J"}, {"\n": 1}],
        "tensors": [
            [], tensors[:-1], [*tensors, tensors[0]], swapped, {"a": 1}, None,
            [["embed.weights", *tensors[0][1:]], *tensors[1:]],
            [[tensors[0][0], "float32", tensors[0][2]], *tensors[1:]],
            [[*tensors[0][:2], tensors[0][2][::-1]], *tensors[1:]],
            [[*tensors[0][:2], [11.0, 4]], *tensors[1:]],
            [[*tensors[0][:2], [-11, -4]], *tensors[1:]],
        ],
    }  # fmt: skip
    for field, values in bad_values.items():
        for value in values:
            refused(join(header | {field: value}, payload), field)
        refused(join({k: v for k, v in header.items() if k != field}, payload), field)
    refused(join(header | {"extra": 1}, payload), "extra")
    refused(join(header | {"\x1b[2J\n" * 1000: 1}, payload), "")


def test_model_fields(good: bytes, refused: Callable[[bytes, str], None]) -> None:
    header, payload = parts(good)
    model = header["model"]
    changes: list[Any] = [
        {"dim": 8.0}, {"dim": "8"}, {"dim": True}, {"dim": -8}, {"dim": 0}, {"dim": None}, {"softcap": 0.0},
        {"activation": ["relu2"]}, {"activation": "gelu"}, {"blocks": []}, {"blocks": [["attention"]]},
        {"blocks": "attention"}, {"blocks": ["x\n\x1b" * 1000]}, {"heads": 3}, {"rope_dims": 3}, {"extra": 1},
        {"k" * 900_000: 1}, {"norm_eps": {}}, {"bos": 11}, {"rope_base": 10_000},
    ]  # fmt: skip
    for change in changes:
        refused(join(header | {"model": model | change}, payload), "model")
    refused(join(header | {"model": {k: v for k, v in model.items() if k != "bos"}}, payload), "model")
    for bad in (None, [], "model", 3):
        refused(join(header | {"model": bad}, payload), "model")
    # A model whose table differs from the tensors is as wrong as tensors that differ from the table.
    refused(join(header | {"model": model | {"mlp_hidden": 7}}, payload), "tensors")


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
]


@pytest.mark.parametrize("sizes", HUGE)
def test_huge_sizes_cost_nothing(good: bytes, refused: Callable[[bytes, str], None], sizes: dict[str, Any]) -> None:
    header, payload = parts(good)
    data = join(header | {"model": header["model"] | sizes}, payload)
    tracemalloc.start()
    refused(data, "model")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def repack(header: dict[str, Any], raw: bytes) -> bytes:
    payload = brotli.compress(raw, quality=5)
    changed = {"payload_bytes": len(payload), "sha256": hashlib.sha256(raw).hexdigest()}
    return join(header | changed, payload)


def test_payload(good: bytes, refused: Callable[[bytes, str], None]) -> None:
    header, payload = parts(good)
    raw = brotli.decompress(payload)
    refused(repack(header, raw[:-2]), "payload")
    refused(repack(header, raw + b"\0\0"), "payload")
    refused(repack(header, b""), "payload")
    trailing = payload + b"\0"
    refused(join(header | {"payload_bytes": len(trailing)}, trailing), "payload")
    cut = payload[:-1]
    refused(join(header | {"payload_bytes": len(cut)}, cut), "payload")
    unfinished = brotli.Compressor()
    whole = unfinished.process(raw) + unfinished.flush()
    refused(join(header | {"payload_bytes": len(whole)}, whole), "payload")
    two = payload + brotli.compress(b"")
    refused(join(header | {"payload_bytes": len(two)}, two), "payload")
    refused(join(header | {"payload_bytes": 0}, b""), "payload")
    refused(join(header, payload[::-1]), "payload")
    changed = bytearray(raw)
    changed[100] ^= 1
    packed = brotli.compress(bytes(changed))
    refused(join(header | {"payload_bytes": len(packed)}, packed), "sha256")
    planes = np.frombuffer(raw, np.uint8).reshape(2, -1).copy()
    for value in (np.nan, np.inf):
        planes[:, 7] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        refused(repack(header, planes.tobytes()), "embed.weight")


def test_decompression_bomb(good: bytes, refused: Callable[[bytes, str], None]) -> None:
    header, _ = parts(good)
    bomb = brotli.compress(bytes(1 << 28), quality=5)
    assert len(bomb) < 1000
    tracemalloc.start()
    refused(join(header | {"payload_bytes": len(bomb)}, bomb), "payload")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_sizes_around_the_decoder_s_buffers(tmp_path: Path) -> None:
    """The decoder hands out 32 KiB, then ever larger blocks: an exact or almost full block must read like any other."""
    for values in [2**14 * n + d for n in (1, 3, 7, 11) for d in range(-2, 3)]:
        model = ModelConfig(vocab=1, dim=1, layers=1, heads=1, kv_heads=1, mlp_hidden=1, rope_dims=0, bos=0)
        rest = sum(row.size for row in param_table(model).values()) - 2
        model = dataclasses.replace(
            model, vocab=1, mlp_hidden=(values - rest) // 2, vocab_bias=(values - rest) % 2 == 1
        )
        raw = sum(row.size for row in param_table(model).values())
        assert raw == values
        weights = {
            k: np.resize(v, v.shape) + np.arange(v.size).reshape(v.shape) % 99
            for k, v in start_values(model, 0).items()
        }
        write(tmp_path / "a.skc", model, weights, quality=1)
        assert read_artifact(tmp_path / "a.skc").size


def accept_or_refuse(path: Path, data: bytes) -> Artifact | None:
    path.write_bytes(data)
    try:
        return read_artifact(path)
    except ArtifactError:
        return None


def test_mutations_before_compression(tmp_path: Path, good: bytes) -> None:
    """Mutated headers over a payload that is whole; whatever is accepted is what the writer makes of its values."""
    header, payload = parts(good)
    text = join(header, b"")[PREFIX:]
    noise = np.random.default_rng(1)
    path, accepted = tmp_path / "m.skc", 0
    tokens = [
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b'"',
        b"-",
        b"9",
        b"0",
        b".",
        b"e",
        b"null",
        b"true",
        b"\\u0000",
        b"\xff",
    ]
    for _ in range(2000):
        data = bytearray(text)
        for _ in range(noise.integers(1, 4)):
            at = int(noise.integers(len(data)))
            data[at : at + int(noise.integers(3))] = tokens[noise.integers(len(tokens))]
        artifact = accept_or_refuse(path, join(bytes(data), payload))
        if artifact is not None:
            accepted += 1
            keywords = {"tokenizer_sha256": artifact.tokenizer_sha256, "provenance": artifact.provenance}
            write(tmp_path / "again.skc", artifact.model, artifact.weights, **keywords)
            assert (tmp_path / "again.skc").read_bytes() == path.read_bytes()
    assert accepted < 200


def test_mutations_after_compression(tmp_path: Path, good: bytes) -> None:
    noise = np.random.default_rng(2)
    start = len(good) - len(parts(good)[1])
    tensors = b"".join(v.astype(np.float16).astype(np.float32).tobytes() for v in some_weights().values())
    for i in range(2000):
        data = bytearray(good)
        low = start if i % 2 else 0
        for _ in range(noise.integers(1, 4)):
            at = int(noise.integers(low, len(data)))
            if noise.integers(4):
                data[at] ^= 1 << int(noise.integers(8))
            else:
                del data[at : at + int(noise.integers(1, 9))]
        artifact = accept_or_refuse(tmp_path / "m.skc", bytes(data))
        if artifact is not None:  # a brotli stream may be spelt in several ways; the tensors may not
            assert b"".join(values.tobytes() for values in artifact.weights.values()) == tensors
