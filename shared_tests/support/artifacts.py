"""What artifact tests share: small models, tensors to store, an artifact taken apart and put together again."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from core import rng
from core.config import ModelConfig, changed, chosen
from core.export import codecs
from core.export.artifact import ArtifactError, read_artifact, write_artifact
from core.export.coder import SymbolRun, encode, lanes
from core.model.params import param_table
from core.model.storage import Stored, by_ratios
from shared_tests.reference import storage as reference

SMALL = changed(ModelConfig(), {
    "vocab": 11, "dim": 8, "layers": 2, "attention.heads": 2, "attention.kv_heads": 1, "mlp.hidden": 66,
    "attention.rope_dims": 2, "embedding.dim": 5, "head.bias": True, "skips.on": True, "residual_mix": True,
})  # fmt: skip

MODELS = {
    "ternary": changed(SMALL, {"matrix_storage": "ternary/64", "embedding.storage": "int6/row"}),
    "nibbles": changed(
        SMALL, {"matrix_storage": "int4/128", "embedding.storage": "fp8/row", "mlp.hidden": 130, "layers": 1}
    ),
    "bytes": changed(SMALL, {"matrix_storage": "int8/64", "embedding.storage": "ternary/128", "layers": 1}),
    "rows": changed(SMALL, {"matrix_storage": "int8/row", "embedding.storage": "float16", "layers": 1}),
    "ratios": changed(SMALL, {"matrix_storage": "ternary/64g", "embedding.storage": "int5/row", "layers": 1}),
    "sevens": changed(SMALL, {"matrix_storage": "int7/64", "embedding.storage": "ternary/128g", "layers": 1}),
}
"""Groups of 64 and 128 of which the last is cut short, whole rows, and every class of storage."""

MODEL = MODELS["ternary"]

TOKENIZER = hashlib.sha256(b"tokenizer").hexdigest()

PROVENANCE = {"seed": 1337, "steps": 20, "code": "0.1.0", "lr": 1e-3}

LARGEST = {"ternary": 1, "int4": 7, "int5": 15, "int6": 31, "int7": 63, "int8": 127}

E4M3 = {
    byte: math.copysign((m / 8 * 2.0**-6) if e == 0 else (1 + m / 8) * 2.0 ** (e - 7), -1 if byte >> 7 else 1)
    for byte in range(256)
    for e, m in [(byte >> 3 & 15, byte & 7)]
    if byte & 127 != 127
}
"""The 254 bytes of e4m3 that are numbers."""


def some_stored(model: ModelConfig = MODEL) -> dict[str, Stored]:
    """What the oracle stores of normal weights, with corner cases in front of every kind of tensor."""
    table = param_table(model)
    weights = {n: rng.normal(5, n, row.size).reshape(row.shape).astype(np.float32) for n, row in table.items()}
    stored = reference.stored_model(model, weights)
    corners = np.array([-0.0, 2.0**-24, 65504.0, -65504.0, 1 + 2.0**-10], np.float16)  # minus zero, subnormal, largest
    stored["blocks.0.mlp_scale"].codes[:5] = corners
    for name, row in table.items():
        codes, scales = stored[name]
        if scales is not None:
            largest = LARGEST.get(row.storage.split("/")[0], 448)
            codes.flat[:3] = [largest, -largest, -0.0]
            codes.flat[-1] = largest  # beside the padding
            scales.flat[0], scales.flat[-1] = 2.0**-14, 2.0 ** (15 + 31 / 32) if by_ratios(row.storage) else 65504.0
    return stored


def full_range(model: ModelConfig) -> dict[str, Stored]:
    """Every code of every class, under scales from the smallest to the largest."""
    noise, out = np.random.default_rng(3), {}
    for name, row in param_table(model).items():
        if row.storage == "float16":
            out[name] = Stored(noise.normal(0, 100, row.shape).astype(np.float16), None)
            continue
        cls, grouping = row.storage.split("/")
        groups = 1 if grouping == "row" else -(-row.shape[1] // int(grouping.removesuffix("g")))
        if cls == "fp8":
            codes = noise.choice(np.array(list(E4M3.values()), np.float32), row.shape)
        else:
            codes = noise.integers(-LARGEST[cls], LARGEST[cls] + 1, row.shape, np.int8)
        powers = noise.uniform(-14, 15.96, (row.shape[0], groups))
        powers = np.floor(32 * powers) / 32 if grouping.endswith("g") else powers
        scales = np.exp2(powers).astype(np.float16)
        out[name] = Stored(codes, scales)
    return out


def write(path: Path, model: ModelConfig = MODEL, stored: dict[str, Stored] | None = None, **changes: Any) -> int:
    keywords: dict[str, Any] = {"tokenizer_sha256": TOKENIZER, "provenance": PROVENANCE} | changes
    return write_artifact(path, model, some_stored(model) if stored is None else stored, **keywords)


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and everything behind it of an artifact, by docs/artifact.md."""
    length = int.from_bytes(data[8:12], "little")
    return json.loads(data[12 : 12 + length]), data[12 + length :]


class Piece(NamedTuple):
    """What is coded of one tensor (or of several, together) in one go: its codes, or its scales or float16 values."""

    name: str
    plan: bytes
    runs: list[SymbolRun]


def pieces(model: ModelConfig, stored: dict[str, Stored] | None = None) -> list[Piece]:
    """The pieces of a payload, in its order."""
    stored, table = some_stored(model) if stored is None else stored, param_table(model)
    return [
        Piece(names[0], plan.data, runs)
        for names in codecs.together(table)
        for plan, runs in codecs.planned(names, stored, table)
    ]


def assembled(model: ModelConfig, parts: list[Piece]) -> bytes:
    """An artifact of pieces that may be no writer's, its sizes and checksums as if they were."""
    plans = b"".join(piece.plan for piece in parts)
    runs = [run for piece in parts for run in piece.runs]
    coded = encode(runs, lanes(codecs.values_in(param_table(model))))
    return repaired(model, len(plans).to_bytes(4, "little") + plans + coded)


def repaired(model: ModelConfig, payload: bytes) -> bytes:
    """An artifact of any payload, with the header that the writer gives it."""
    tensors = [[name, row.storage, list(row.shape)] for name, row in param_table(model).items()]
    header = {
        "schema": 3,
        "model": json.loads(json.dumps(chosen(model))),
        "tokenizer_sha256": TOKENIZER,
        "tensors_sha256": hashlib.sha256(json.dumps(tensors, separators=(",", ":")).encode()).hexdigest(),
        "payload_bytes": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "provenance": PROVENANCE,
    }
    return join(header, payload)


def join(header: Any, payload: bytes, magic: bytes = b"SKCMODEL") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return magic + len(text).to_bytes(4, "little") + text + payload


Refused = Callable[[bytes, str], None]


def refusing(path: Path) -> Refused:
    """Return a function that writes a file at `path` and asserts that reading it is refused in a field's name."""

    def check(data: bytes, field: str) -> None:
        path.write_bytes(data)
        with pytest.raises(ArtifactError) as caught:
            read_artifact(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: {field}"), message
        assert message.isprintable() and len(message) < 500

    return check
