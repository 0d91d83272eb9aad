"""The artifact: round trip, fixed bytes, and what is not written. Budget: 5 s.

`python -m shared_tests.test_artifact` writes the golden file again, after a deliberate change of the format.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest

from core.config import ModelConfig, to_json
from core.engine import Arrays
from core.export.artifact import MAX_HEADER, ArtifactError, read_artifact, write_artifact
from core.files import replace_file
from core.params import param_table, start_values
from core.presets import PRESETS

GOLDEN = Path(__file__).parent / "golden" / "artifact_v0.skc"
GOLDEN_SHA256 = "41564e5794fbe78b634df5eb06af8e56edb9530242fe632e1de4ff84b7217efc"
MODEL = ModelConfig(
    vocab=11, dim=8, layers=2, heads=2, kv_heads=1, mlp_hidden=6, rope_dims=2, embed_dim=4, vocab_bias=True,
    unet_skips=True, residual_mix=True,
)  # fmt: skip
TOKENIZER = hashlib.sha256(b"tokenizer").hexdigest()
PROVENANCE = {"seed": 1337, "steps": 20, "code": "0.1.0", "lr": 1e-3}


def some_weights(model: ModelConfig = MODEL) -> Arrays:
    """Start values, with the float16 corner cases in the first tensor: -0, subnormal, largest, a tie that rounds."""
    weights = start_values(model, 5)
    weights["embed.weight"].flat[:6] = [-0.0, 2.0**-24, 65504.0, -65504.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11]
    return weights


def write(path: Path, model: ModelConfig = MODEL, weights: Arrays | None = None, **changes: Any) -> int:
    keywords: dict[str, Any] = {"tokenizer_sha256": TOKENIZER, "provenance": PROVENANCE, "quality": 9} | changes
    return write_artifact(path, model, some_weights(model) if weights is None else weights, **keywords)


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the payload of an artifact, by docs/artifact.md."""
    length = int.from_bytes(data[8:12], "little")
    return json.loads(data[12 : 12 + length]), data[12 + length :]


def join(header: Any, payload: bytes, magic: bytes = b"SKCMODEL") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return magic + len(text).to_bytes(4, "little") + text + payload


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    write(tmp_path / "good.skc")
    return (tmp_path / "good.skc").read_bytes()


@pytest.mark.parametrize("name", ["debug", "tiny"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    model = PRESETS[name].config.model
    weights = start_values(model, 3)
    size = write(tmp_path / "a.skc", model, weights, quality=5)
    artifact = read_artifact(tmp_path / "a.skc")
    assert [p.name for p in tmp_path.iterdir()] == ["a.skc"] and size == artifact.size == os.path.getsize(
        tmp_path / "a.skc"
    )
    assert (artifact.model, artifact.tokenizer_sha256, artifact.provenance) == (model, TOKENIZER, PROVENANCE)
    assert list(artifact.weights) == list(param_table(model))
    for key, values in weights.items():
        assert artifact.weights[key].dtype == np.float32 and artifact.weights[key].flags.writeable
        np.testing.assert_array_equal(artifact.weights[key], values.astype(np.float16).astype(np.float32))
    write(tmp_path / "b.skc", artifact.model, artifact.weights, quality=5)
    assert (tmp_path / "a.skc").read_bytes() == (tmp_path / "b.skc").read_bytes()


def test_same_input_same_bytes(tmp_path: Path, good: bytes) -> None:
    weights = some_weights()
    backwards = {name: np.asfortranarray(weights[name].astype(np.float64)) for name in reversed(weights)}
    write(tmp_path / "b.skc", weights=backwards, provenance=dict(reversed(PROVENANCE.items())))
    assert (tmp_path / "b.skc").read_bytes() == good
    whole_numbers = dataclasses.replace(MODEL, softcap=30, rope_base=10_000)
    write(tmp_path / "c.skc", model=whole_numbers)
    assert (tmp_path / "c.skc").read_bytes() == good and read_artifact(tmp_path / "c.skc").model == MODEL


def test_golden(tmp_path: Path) -> None:
    write(tmp_path / "g.skc", quality=11)
    assert hashlib.sha256((tmp_path / "g.skc").read_bytes()).hexdigest() == GOLDEN_SHA256
    assert GOLDEN.read_bytes() == (tmp_path / "g.skc").read_bytes()
    artifact = read_artifact(GOLDEN)
    decoded = b"".join(values.tobytes() for values in artifact.weights.values())
    expected = b"".join(v.astype(np.float16).astype(np.float32).tobytes() for v in some_weights().values())
    assert decoded == expected


def test_layout_is_the_documented_one(good: bytes) -> None:
    header, payload = parts(good)
    table = param_table(MODEL)
    bits = np.concatenate([some_weights()[name].astype("<f2").view("<u2").ravel() for name in table])
    raw = (bits & 0xFF).astype(np.uint8).tobytes() + (bits >> 8).astype(np.uint8).tobytes()
    assert brotli.decompress(payload) == raw
    assert header == {
        "schema": 0,
        "model": json.loads(json.dumps(to_json(MODEL))),
        "tokenizer_sha256": TOKENIZER,
        "tensors": [[name, "float16", list(row.shape)] for name, row in table.items()],
        "raw_bytes": len(raw),
        "payload_bytes": len(payload),
        "sha256": hashlib.sha256(raw).hexdigest(),
        "provenance": PROVENANCE,
    }
    assert join(header, payload) == good


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65520.0, -1e30])
def test_values_that_float16_cannot_hold(tmp_path: Path, value: float) -> None:
    weights = some_weights()
    weights["blocks.1.mlp.up.weight"][3, 2] = value
    with pytest.raises(ArtifactError, match="blocks.1.mlp.up.weight"):
        write(tmp_path / "a.skc", weights=weights)
    assert not list(tmp_path.iterdir())


def test_wrong_weights_and_values_are_not_written(tmp_path: Path) -> None:
    weights = some_weights()
    missing = {name: values for name, values in weights.items() if name != "vocab_bias"}
    for bad in (missing, weights | {"extra": np.zeros(1)}, weights | {"vocab_bias": np.zeros(12)}):
        with pytest.raises(ValueError, match="vocab_bias|extra"):
            write(tmp_path / "a.skc", weights=bad)
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
    write(GOLDEN, quality=11)
    print(f'GOLDEN_SHA256 = "{hashlib.sha256(GOLDEN.read_bytes()).hexdigest()}"')
