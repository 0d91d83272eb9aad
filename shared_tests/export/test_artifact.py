"""The artifact: round trip, exact decoding, layout, fixed bytes, and what is not written. Budget: 20 s.

`python -m shared_tests.export.test_artifact` writes the golden files again, after a deliberate change of the format.
"""

import dataclasses
import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest

from core.config import ModelConfig, changed, chosen
from core.export.artifact import MAX_HEADER, ArtifactError, read_artifact
from core.export.codecs import compress, window_bits
from core.files import replace_file
from core.model.params import param_table
from core.model.smear import Smear
from core.model.storage import STORAGES, Storage, Stored
from core.presets import PRESETS
from shared_tests.reference import storage as reference
from shared_tests.support.artifacts import (
    E4M3,
    LARGEST,
    MODELS,
    PROVENANCE,
    SMALL,
    TOKENIZER,
    full_range,
    join,
    parts,
    payloads,
    some_stored,
    write,
)

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_SHA256 = {
    "artifact_v2": "a292e7d752e408751e34a822cc958762da4cf52b61926dd42f02bd55bc572225",
    "artifact_v2_nibbles": "8a77a2dd006dc79c245a4720f9cd8c8c02dde2ea236811428aa614300ada512c",
    "artifact_v2_bytes": "9660585077121a72dbfa2d433ecb4e2e2ab6f1ed3dc0100be6dd854a393deb2c",
}
GOLDEN_MODELS = {"artifact_v2": "ternary", "artifact_v2_nibbles": "nibbles", "artifact_v2_bytes": "bytes"}


def assert_same(ours: dict[str, Stored], theirs: dict[str, Stored]) -> None:
    """Both hold the same tensors, bit for bit and of the same types."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        for a, b in zip(ours[name], theirs[name], strict=True):
            if a is None or b is None:
                assert a is b, name
            else:
                assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes()), name


@pytest.mark.parametrize("name", ["debug", "ablate"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    model = PRESETS[name].config.model
    stored = some_stored(model)
    size = write(tmp_path / "a.skc", model, stored)
    artifact = read_artifact(tmp_path / "a.skc")
    assert [p.name for p in tmp_path.iterdir()] == ["a.skc"]
    assert size == artifact.size == os.path.getsize(tmp_path / "a.skc")
    assert (artifact.model, artifact.tokenizer_sha256, artifact.provenance) == (model, TOKENIZER, PROVENANCE)
    table = param_table(model)
    assert list(artifact.weights) == list(artifact.stored) == list(table)
    assert_same(artifact.stored, stored)
    for key, values in artifact.weights.items():
        assert values.dtype == np.float32 and values.flags.writeable
        assert values.tobytes() == reference.decode(stored[key], table[key].storage).astype(np.float32).tobytes()
    write(tmp_path / "b.skc", artifact.model, artifact.stored)
    assert (tmp_path / "a.skc").read_bytes() == (tmp_path / "b.skc").read_bytes()


WIDTHS = [(storage, width) for storage in STORAGES for width in (64, 128, 189, 320)]


@pytest.mark.parametrize("storage, width", [pair for pair in WIDTHS if pair[0] != "float16" or pair[1] == 64])
def test_every_code_and_scale_decodes_exactly(storage: Storage, width: int, tmp_path: Path) -> None:
    model = changed(ModelConfig(), {
        "vocab": 16, "dim": width, "layers": 1, "attention.heads": 1, "attention.kv_heads": 1, "mlp.hidden": 16,
        "attention.rope_dims": 0, "bos": 0, "matrix_storage": storage, "embedding.storage": storage,
    })  # fmt: skip
    stored = full_range(model)
    write(tmp_path / "a.skc", model, stored)
    artifact = read_artifact(tmp_path / "a.skc")
    assert_same(artifact.stored, stored)
    for name, row in param_table(model).items():
        exact = reference.decode(stored[name], row.storage)
        decoded = artifact.weights[name]
        assert decoded.dtype == np.float32 and decoded.astype(np.float64).tobytes() == exact.tobytes(), name


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for model in MODELS.values():
        write(tmp_path / "a.skc", model)
        stored = some_stored(model)
        backwards = {name: transposed(stored[name]) for name in reversed(stored)}
        write(tmp_path / "b.skc", model, backwards, provenance=dict(reversed(PROVENANCE.items())))
        assert (tmp_path / "b.skc").read_bytes() == (tmp_path / "a.skc").read_bytes()
        whole_numbers = changed(model, {"head.softcap": 30, "attention.rope_base": 10_000})
        write(tmp_path / "c.skc", whole_numbers)
        assert (tmp_path / "c.skc").read_bytes() == (tmp_path / "a.skc").read_bytes()
        assert read_artifact(tmp_path / "c.skc").model == model


def transposed(stored: Stored) -> Stored:
    """The same values with their columns together in memory."""
    scales = None if stored.scales is None else np.asfortranarray(stored.scales)
    return Stored(np.asfortranarray(stored.codes), scales)


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_golden(tmp_path: Path, name: str) -> None:
    model = MODELS[GOLDEN_MODELS[name]]
    write(tmp_path / "g.skc", model)
    golden = GOLDEN / f"{name}.skc"
    assert hashlib.sha256(golden.read_bytes()).hexdigest() == GOLDEN_SHA256[name]
    assert golden.read_bytes() == (tmp_path / "g.skc").read_bytes()
    assert_same(read_artifact(golden).stored, some_stored(model))


STREAMS = ["float16", "scales", "ternary", "int4", "int6 high", "int6 low", "int8", "fp8"]


def planes(values: list[float]) -> bytes:
    """The low bytes of float16 numbers, then their high bytes."""
    halves = [struct.pack("<e", value) for value in values]
    return bytes(h[0] for h in halves) + bytes(h[1] for h in halves)


def digits(values: list[int], base: int, count: int) -> bytes:
    """Whole numbers below `base`, `count` to a byte, the first one the lowest digit; the last byte is filled with 0."""
    rows = [values[i : i + count] for i in range(0, len(values), count)]
    return bytes(sum(value * base**place for place, value in enumerate(row)) for row in rows)


def layout(model: ModelConfig, stored: dict[str, Stored]) -> dict[str, bytes]:
    """The streams of a model, value by value, as docs/artifact.md says."""
    codes: dict[str, list] = {}
    scales: list[float] = []
    for name, row in param_table(model).items():
        codes.setdefault(row.storage.split("/")[0], []).extend(stored[name].codes.ravel().tolist())
        given = stored[name].scales
        scales += [] if given is None else given.ravel().tolist()
    out = {}
    for cls, values in codes.items():
        if cls == "float16":
            out[cls] = planes(values)
        elif cls == "fp8":
            byte_of = {(value, math.copysign(1, value)): byte for byte, value in E4M3.items()}
            out[cls] = bytes(byte_of[value, math.copysign(1, value)] for value in values)
        else:
            above = [value + LARGEST[cls] for value in values]
            if cls == "int6":
                out["int6 high"] = digits([value // 4 for value in above], 16, 2)
                out["int6 low"] = digits([value % 4 for value in above], 4, 4)
            else:
                out[cls] = digits(above, *{"ternary": (3, 5), "int4": (16, 2), "int8": (256, 1)}[cls])
    if scales:
        out["scales"] = planes(scales)
    return {name: out[name] for name in STREAMS if name in out}


@pytest.mark.parametrize("name", MODELS)
def test_layout_is_the_documented_one(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    stored = some_stored(model)
    write(tmp_path / "a.skc", model, stored)
    data, expected = (tmp_path / "a.skc").read_bytes(), layout(model, stored)
    header, payload = parts(data)
    packed = payloads(data)
    assert {key: brotli.decompress(part) for key, part in packed.items()} == expected
    assert list(packed) == list(expected)
    assert header == {
        "schema": 2,
        "model": json.loads(json.dumps(chosen(model))),
        "tokenizer_sha256": TOKENIZER,
        "tensors": [[key, row.storage, list(row.shape)] for key, row in param_table(model).items()],
        "streams": [
            {
                "name": key,
                "raw_bytes": len(raw),
                "payload_bytes": len(packed[key]),
                "window": 16,
                "sha256": hashlib.sha256(raw).hexdigest(),
            }
            for key, raw in expected.items()
        ],
        "provenance": PROVENANCE,
    }
    assert join(header, payload) == data


def test_the_header_holds_exactly_what_is_not_at_its_default(tmp_path: Path) -> None:
    write(tmp_path / "a.skc")
    assert parts((tmp_path / "a.skc").read_bytes())[0]["model"] == {
        "vocab": 11, "dim": 8, "layers": 2, "residual_mix": True, "matrix_storage": "ternary/64",
        "attention": {"heads": 2, "kv_heads": 1, "rope_dims": 2}, "embedding": {"dim": 5, "storage": "int6/row"},
        "head": {"bias": True}, "mlp": {"hidden": 66}, "skips": {"on": True},
    }  # fmt: skip


def test_a_new_setting_changes_no_header() -> None:
    """Neither in a part nor beside the parts, as long as it is at its default."""

    @dataclasses.dataclass(frozen=True)
    class LaterSmear(Smear):
        strength: int = 5

    @dataclasses.dataclass(frozen=True)
    class Later(ModelConfig):
        later: int = 1
        smear: LaterSmear = dataclasses.field(default_factory=LaterSmear)

    model = MODELS["ternary"]
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name != "smear"}
    assert chosen(Later(**fields)) == chosen(model)
    assert chosen(Later(**fields, later=2)) == {**chosen(model), "later": 2}
    assert chosen(Later(**fields, smear=LaterSmear(strength=6)))["smear"] == {"strength": 6}


@pytest.mark.parametrize("vocab", range(2, 7))
@pytest.mark.parametrize("storage", ["ternary/64", "int4/row", "int6/row"])
def test_a_last_byte_may_be_part_full(storage: Storage, vocab: int, tmp_path: Path) -> None:
    """A table of 7 to a row: 14 to 42 values leave every possible number of places of the last byte free."""
    model = changed(
        SMALL,
        {
            "vocab": vocab,
            "dim": 7,
            "attention.heads": 1,
            "attention.rope_dims": 2,
            "embedding.dim": None,
            "embedding.storage": storage,
            "layers": 1,
        },
    )
    stored = full_range(model)
    write(tmp_path / "a.skc", model, stored)
    packed = payloads((tmp_path / "a.skc").read_bytes())
    assert {key: brotli.decompress(part) for key, part in packed.items()} == layout(model, stored)
    assert_same(read_artifact(tmp_path / "a.skc").stored, stored)


def test_minus_zero_and_the_largest_numbers_survive(tmp_path: Path) -> None:
    model = MODELS["nibbles"]
    write(tmp_path / "a.skc", model)
    artifact = read_artifact(tmp_path / "a.skc")
    assert np.signbit(artifact.weights["blocks.0.mlp_scale"][0])
    table = artifact.stored["embed.weight"].codes.ravel()
    assert table[:2].tolist() == [448.0, -448.0] and np.signbit(table[2]) and table[2] == 0
    assert np.signbit(artifact.weights["embed.weight"].ravel()[2])
    assert artifact.weights["embed.weight"].ravel()[0] == 448 * 2.0**-14


WINDOWS = {
    "0": 16, "0000001": 17, "0011": 18, "0101": 19, "0111": 20, "1001": 21, "1011": 22, "1101": 23, "1111": 24,
    "0100001": 10, "0110001": 11, "1000001": 12, "1010001": 13, "1100001": 14, "1110001": 15, "0010001": 0,
}  # fmt: skip
"""RFC 7932, section 9.1: first bits of a stream, lowest last, and the window; 0010001 is not allowed."""


def test_the_window_of_a_stream() -> None:
    for first in range(256):
        (expected,) = (window for bits, window in WINDOWS.items() if f"{first:08b}".endswith(bits))
        assert window_bits(bytes([first])) == expected
    assert window_bits(b"") == 0
    for size, window in ((1, 16), (1 << 16, 16), ((1 << 16) + 1, 17), (1 << 20, 20), ((1 << 20) + 1, 21)):
        payload = compress("int8", bytes(size))
        assert window_bits(payload) == window and brotli.decompress(payload) == bytes(size)


def with_value(value: Any, part: int, name: str) -> dict[str, Stored]:
    """Stored tensors of `nibbles` with one bad number: in the codes (0) or scales (1) of a tensor."""
    stored = some_stored(MODELS["nibbles"])
    array = stored[name][part]
    assert array is not None
    array.flat[min(3, array.size - 1)] = value
    return stored


MATRIX, VECTOR, TABLE = "blocks.0.mlp.up.weight", "blocks.0.mlp_scale", "embed.weight"


@pytest.mark.parametrize(
    "name, part, value",
    [(VECTOR, 0, v) for v in (np.nan, np.inf, -np.inf)]
    + [(MATRIX, 0, v) for v in (8, -8, 127, -128)]
    + [(TABLE, 0, v) for v in (480.0, -449.0, np.nan, np.inf, 1.0625, 2.0**-10)]
    + [(t, 1, v) for t in (MATRIX, TABLE) for v in (np.nan, np.inf, -1.0, 0.0, 2.0**-14 - 2.0**-24)],
)
def test_values_that_a_storage_class_cannot_hold(tmp_path: Path, name: str, part: int, value: float) -> None:
    with pytest.raises(ArtifactError, match=name if value not in (1.0625, 2.0**-10) else "e4m3"):
        write(tmp_path / "a.skc", MODELS["nibbles"], with_value(value, part, name))
    assert not list(tmp_path.iterdir())


def test_wrong_tensors_are_not_written(tmp_path: Path) -> None:
    model = MODELS["nibbles"]
    stored = some_stored(model)
    codes, scales = stored[MATRIX]
    assert scales is not None
    flat = stored[VECTOR].codes
    for name, bad in (
        (MATRIX, Stored(codes.astype(np.int16), scales)),
        (MATRIX, Stored(codes.astype(np.float32), scales)),
        (MATRIX, Stored(codes, None)),
        (MATRIX, Stored(codes, scales.astype(np.float32))),
        (MATRIX, Stored(codes, scales.T)),
        (MATRIX, Stored(codes, np.repeat(scales, 2, 1))),
        (TABLE, Stored(stored[TABLE].codes.astype(np.float16), stored[TABLE].scales)),
        (VECTOR, Stored(flat.astype(np.float32), None)),
        (VECTOR, Stored(flat, np.ones((8, 1), np.float16))),
    ):
        with pytest.raises(ArtifactError, match=name):
            write(tmp_path / "a.skc", model, stored | {name: bad})
    missing = {name: values for name, values in stored.items() if name != MATRIX}
    for bad in (missing, stored | {"extra": stored[VECTOR]}, stored | {MATRIX: Stored(codes.T, scales)}):
        with pytest.raises(ValueError, match=f"{MATRIX}|extra"):
            write(tmp_path / "a.skc", model, bad)
    assert not list(tmp_path.iterdir())


def test_wrong_words_are_not_written(tmp_path: Path) -> None:
    for provenance in ({"a": None}, {"a": np.nan}, {"a": [1]}, {"a": "\x1b[2J"}, {"é": 1}, {"a": True}, {1: 2}):
        with pytest.raises(ArtifactError, match="provenance"):
            write(tmp_path / "a.skc", provenance=provenance)
    with pytest.raises(ArtifactError, match="tokenizer_sha256"):
        write(tmp_path / "a.skc", tokenizer_sha256="0" * 63 + "G")
    with pytest.raises(ArtifactError, match="header"):
        write(tmp_path / "a.skc", provenance={"a": "x" * MAX_HEADER})
    assert not list(tmp_path.iterdir())


def test_replace_file_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    with pytest.raises(TypeError):
        replace_file(path, b"new", "not bytes")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    replace_file(path, b"ne", b"w")
    assert path.read_bytes() == b"new"


if __name__ == "__main__":
    for golden, model in GOLDEN_MODELS.items():
        write(GOLDEN / f"{golden}.skc", MODELS[model])
        print(f'    "{golden}": "{hashlib.sha256((GOLDEN / f"{golden}.skc").read_bytes()).hexdigest()}",')
