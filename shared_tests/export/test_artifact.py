"""The artifact: round trip, exact decoding, layout, fixed bytes, and what is not written. Budget: 20 s.

`python -m shared_tests.export.test_artifact` writes the golden files again, after a deliberate change of the format.
"""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.config import ModelConfig, changed, chosen
from core.export.artifact import MAX_HEADER, ArtifactError, read_artifact
from core.export.codecs import CodingPlan, halves_plan, matrix_plan, tensor_sizes, values_in
from core.export.coder import lanes
from core.files import replace_file
from core.model.params import param_table
from core.model.smear import Smear
from core.model.storage import STORAGES, Storage, Stored
from core.presets import PRESETS
from shared_tests.reference import storage as reference
from shared_tests.reference.artifact import read_payload
from shared_tests.support.artifacts import (
    MODELS,
    PROVENANCE,
    SMALL,
    TOKENIZER,
    full_range,
    parts,
    pieces,
    repaired,
    some_stored,
    write,
)

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_SHA256 = {
    "artifact_v3": "d7027ee5f5a11f5c61d514793bda04a7e30ea97e4848eeac510e8fa0e5078486",
    "artifact_v3_nibbles": "597cbf401ffa1220adfcd029a6e29c6b5547c0ce1b392274d9d32d3fbfb55150",
    "artifact_v3_bytes": "91c742f6d4a237678459f81c6cdbea51080140ad9eff77b4fff5f3b5073b9124",
    "artifact_v3_ratios": "ca6c17705abe050950069cc2455dd94b54ed5fee52f7f6b0aeb5c995e46224bc",
}
PLANS_SHA256 = "70fca06f08eb512a145ca166f46cb10f778d6b965e7d98fd3e943094adb99871"
GOLDEN_MODELS = {
    "artifact_v3": "ternary",
    "artifact_v3_nibbles": "nibbles",
    "artifact_v3_bytes": "bytes",
    "artifact_v3_ratios": "ratios",
}


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
    length = sum(tensor.bits for tensor in tensor_sizes(stored, table).values()) / 8
    assert len(parts((tmp_path / "a.skc").read_bytes())[1]) <= 1.002 * length + 4 + 4 * lanes(values_in(table))
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


def some_plans() -> list[CodingPlan]:
    """Plans with classes of rows, of columns and of scales, of numbers that a generator of whole numbers draws."""
    noise = np.random.default_rng(11)
    draws = noise.integers(-100, 101, (96, 64, 6)).sum(2)  # about Gaussian
    sizes = noise.integers(5, 120, 96)[:, None]
    symbols = np.clip(draws * sizes // 4000 + 31, 0, 62).astype(np.uint8)
    symbols[noise.integers(0, 96, 20)] = 31
    halves = (noise.integers(0, 3000, (500, 1)) + noise.integers(0, 200, (500, 6)) + 8000).astype(np.uint16)
    return [matrix_plan(symbols, 62), matrix_plan(np.ascontiguousarray(symbols.T), 62), halves_plan(halves)]


def test_the_writer_chooses_as_it_always_did() -> None:
    """Another choice of tables or classes would refuse every larger artifact that there is."""
    plans = some_plans()
    assert [plan.axis for plan in plans] == [1, 2, 1] and all(len(plan.tables) > 4 for plan in plans)
    assert hashlib.sha256(b"".join(plan.data for plan in plans)).hexdigest() == PLANS_SHA256


def assert_documented(data: bytes, model: ModelConfig, stored: dict[str, Stored]) -> None:
    """The payload of an artifact gives what was stored to a reader that knows docs/artifact.md alone."""
    found = read_payload(parts(data)[1], model)
    assert found.keys() == stored.keys()
    for name, (codes, scales) in stored.items():
        assert np.array(found[name][0], codes.dtype).tobytes() == codes.tobytes(), name
        theirs = found[name][1]
        assert (theirs is None) == (scales is None), name
        assert scales is None or np.array(theirs, np.float16).tobytes() == scales.tobytes(), name


@pytest.mark.parametrize("name", MODELS)
def test_the_payload_is_the_documented_one(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    stored = some_stored(model)
    write(tmp_path / "a.skc", model, stored)
    data = (tmp_path / "a.skc").read_bytes()
    assert_documented(data, model, stored)
    assert repaired(model, parts(data)[1]) == data, "the header is another one"


@pytest.mark.parametrize("axis", [1, 2])
def test_classes_of_rows_and_of_columns_are_the_documented_ones(axis: int, tmp_path: Path) -> None:
    """Lines of very different sizes, and lines of zeros, get tables of their own; two lanes code them."""
    model = changed(SMALL, {"matrix_storage": "int4/row", "mlp.hidden": 600, "layers": 1, "skips.on": False})
    stored, noise = some_stored(model), np.random.default_rng(axis)
    name = "blocks.0.mlp.up.weight"
    deviations = np.exp2(noise.integers(-2, 3, 600 if axis == 1 else 8)) * (noise.random(600 if axis == 1 else 8) < 0.7)
    values = noise.standard_normal((600, 8)) * (deviations[:, None] if axis == 1 else deviations)
    stored[name] = Stored(np.clip(np.rint(values), -7, 7).astype(np.int8), stored[name].scales)
    write(tmp_path / "a.skc", model, stored)
    plan = next(piece.plan for piece in pieces(model, stored) if piece.name == name)
    assert plan[0] == axis and plan[1] > 2, "its codes, which stand before its scales, have classes"
    assert_documented((tmp_path / "a.skc").read_bytes(), model, stored)
    assert_same(read_artifact(tmp_path / "a.skc").stored, stored)


def test_classes_of_scales_are_the_documented_ones(tmp_path: Path) -> None:
    """Rows whose scales are of very different sizes: 400 tokens in six groups of 64."""
    name, noise = "embed.weight", np.random.default_rng(4)
    model = changed(SMALL, {"vocab": 400, "embedding.dim": 384, "embedding.storage": "ternary/64", "layers": 1})
    stored = some_stored(model)
    sizes = np.exp2(noise.integers(-3, 4, (400, 1)) + 0.05 * noise.standard_normal((400, 6)))
    stored[name] = Stored(stored[name].codes, sizes.astype(np.float16))
    write(tmp_path / "a.skc", model, stored)
    _, plan = (piece.plan for piece in pieces(model, stored) if piece.name == name)
    assert plan[3] == 1 and plan[4] >= 7, "seven sizes of rows"
    assert_documented((tmp_path / "a.skc").read_bytes(), model, stored)
    assert_same(read_artifact(tmp_path / "a.skc").stored, stored)


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
def test_the_smallest_tensors(storage: Storage, vocab: int, tmp_path: Path) -> None:
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
    assert_documented((tmp_path / "a.skc").read_bytes(), model, stored)
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


def test_a_scale_that_is_not_on_the_grid_of_its_storage(tmp_path: Path) -> None:
    for value in (1.5, 1.0 + 2.0**-10, 65504.0):  # all fine for ternary/64
        stored = some_stored(MODELS["ratios"])
        scales = stored[MATRIX].scales
        assert scales is not None
        scales[3, 0] = value
        with pytest.raises(ArtifactError, match=f"{MATRIX}: has a scale that is not on the grid of ternary/64g"):
            write(tmp_path / "a.skc", MODELS["ratios"], stored)


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
