"""Grids by deviations, ternary scales by ratios, int5 and int7: the same scales everywhere, by role. Budget: 25 s."""

import dataclasses
import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core import presets
from core.check.tolerances import P1_EXACT, relative_rms
from core.cli import main
from core.config import ConfigError, ModelConfig, RunConfig, changed
from core.engine.ranks import buckets
from core.export.artifact import read_artifact, write_artifact
from core.export.budget import compressed_bits, gaussian_bits, predicted_bytes, with_tables
from core.model import params
from core.model import storage as core_storage
from core.model.params import param_table
from core.model.storage import LARGEST, RATIOS, STORAGES, by_ratios, decode, gridded, scales_of, storage_class
from core.training import schedule
from shared_tests.reference import storage as reference
from shared_tests.support.by_name import ByName
from shared_tests.support.harness import (
    BACKENDS,
    batches,
    draw,
    engine,
    mini,
    module,
    to_device,
    to_numpy,
    working_weights,
)

RULES: list[Any] = [
    ("int8/row", 20.0), ("int7/row", 14.0), ("int6/row", 12.85), ("int6/row", 40.0), ("int5/row", 6.2),
    ("int4/row", 2.9), ("int6/64", 12.85), ("int5/128", 6.2), ("ternary/64g", None), ("ternary/128g", None),
]  # fmt: skip
WIDTHS = (1, 2, 5, 63, 64, 189, 320, 1027)
ROLES = {"deviations.mlp": 11.5, "deviations.attention": 13.0, "deviations.table": 14.0}
GRIDDED = {"matrix_storage": "int6/row", "embedding.storage": "int7/row", **ROLES}


def hard_weight(columns: int, dtype: str = "float32") -> np.ndarray:
    """Return rows of normals, and rows that are zero, constant, nearly so, off centre, tiny, large, or have a spike."""
    weight = draw(f"grids/{columns}", 40, columns) * 0.02
    weight[0], weight[1], weight[2] = 0.0, 0.37, -1e-9
    weight[3] += 1.0
    weight[4] += 0.1
    weight[5] *= 1e-3
    weight[6] *= 1e4
    weight[7, 0] = 3.0
    weight[8] = np.where(np.arange(columns) % 2, 1.0, -1.0)
    weight[9] *= np.exp(3 * draw("heavy", columns))
    return weight.astype(dtype)


def host(backend: str, weight: np.ndarray, rule: Any, dtype: str = "float32") -> Any:
    return module(backend, "storage").to_host(to_device(backend, weight, dtype), *rule)


@pytest.mark.pair
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_both_backends_and_numpy_have_the_same_scales_and_the_oracle_but_for_ties(rule: Any, dtype: str) -> None:
    ties = total = 0
    for columns in WIDTHS:
        weight = hard_weight(columns, dtype)
        ours, theirs = (host(b, weight, rule, dtype) for b in BACKENDS)
        assert ours.codes.tobytes() == theirs.codes.tobytes() and ours.scales.tobytes() == theirs.scales.tobytes()
        assert scales_of(weight, *rule).tobytes() == ours.scales.tobytes()
        for backend in BACKENDS:
            used = to_numpy(module(backend, "storage").stored(to_device(backend, weight, dtype), *rule))
            assert used.astype(np.float32).tobytes() == decode(ours, rule[0]).tobytes()
        expected = reference.quantise(weight, *rule)
        same = ours.scales == expected.scales
        steps = np.abs(ours.scales.view(np.int16).astype(int) - expected.scales.view(np.int16))  # type: ignore[union-attr]
        assert steps.max() <= (45 if by_ratios(rule[0]) else 1), "no neighbour"
        size = core_storage.group_size(rule[0], columns)
        wide = np.repeat(same, size, 1)[:, :columns]
        assert np.array_equal(ours.codes[wide], expected.codes[wide])
        ties, total = ties + int((~same).sum()), total + same.size
    assert ties <= (0 if dtype == "float64" else 5e-3 * total)


@pytest.mark.parametrize("storage", STORAGES)
def test_numpy_has_the_scales_of_every_class(storage: Any) -> None:
    for columns in () if storage == "float16" else (5, 128, 189):
        weight = hard_weight(columns)
        assert scales_of(weight, storage).tobytes() == host("cuda", weight, (storage,)).scales.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_constant_and_nearly_constant_rows_and_the_ends_of_the_grid(backend: str) -> None:
    weight = np.zeros((6, 256), np.float32)
    weight[1], weight[2] = 0.37, -0.37
    weight[3] = 0.37 + 1e-3 * draw("nearly", 256)
    weight[4] = np.where(np.arange(256) % 2, 1.0, -1.0)  # of deviation 1
    weight[5] = draw("spike", 256) * 0.02
    weight[5, 7] = 3.0
    got = host(backend, weight, ("int6/row", 12.85))
    assert got.scales[0, 0] == 2.0**-14 and not got.codes[0].any()
    assert (got.codes[1] == 31).all() and (got.codes[2] == -31).all(), "by the largest weight, not clipped to nothing"
    assert got.codes[3].min() >= 30 and got.codes[3].max() == 31
    assert got.scales[4, 0] == np.float16(12.85 / 31) and set(got.codes[4]) == {-2, 2}
    reach = 12.85 * weight[5].astype(np.float64).std()
    assert 3.0 / 4 < reach < 3.0 and got.codes[5, 7] == 31 and got.scales[5, 0] == np.float16(reach / 31)
    assert np.abs(decode(got, "int6/row")[5, 7] - reach) < 1e-2, "clipped at the end"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_is_all_that_matters_and_the_largest_code_clips(backend: str) -> None:
    weight = draw("step", 32, 512).astype(np.float32) * 0.02
    six, five = (host(backend, weight, rule) for rule in (("int6/row", 31 * 0.4), ("int5/row", 15 * 0.4)))
    assert six.scales.tobytes() == five.scales.tobytes() and six.codes.tobytes() == five.codes.tobytes()
    assert 8 <= np.abs(six.codes).max() <= 12
    four = host(backend, weight, ("int4/row", 7 * 0.4))
    assert np.array_equal(four.codes, np.clip(six.codes, -7, 7)) and (np.abs(six.codes) > 7).any()
    _, counts = np.unique(six.codes, return_counts=True)
    shares = counts / six.codes.size
    assert -np.sum(shares * np.log2(shares)) == pytest.approx(gaussian_bits(0.4), abs=0.01)


def test_the_table_of_ratios_is_what_a_logarithm_says_and_never_changes() -> None:
    starts, steps = RATIOS
    scales = [1 + sum(steps[:n]) / 2**23 for n in range(33)]
    assert scales == [float(np.float16(2 ** (n / 32))) for n in range(33)]
    for n, start in enumerate(starts):
        edge = 2 ** ((2 * n + 1) / 64)
        assert 1 + (start - 1) / 2**23 < edge < 1 + start / 2**23
    digest = hashlib.sha256(struct.pack("<64i", *starts, *steps)).hexdigest()
    assert digest == "4d2f65e5c1ac85359208f2e38c0f8a7f7a2f6b022a46427b5fe5939eb0756df0"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ternary_scale_is_the_nearest_ratio_and_its_codes_are_taken_with_it(backend: str) -> None:
    """At every place where the next scale begins, in every octave of float16, and next to it."""
    octaves = np.exp2(np.arange(-14.0, 16.0))
    starts = (1 + np.array(RATIOS[0]) / 2**23)[None] * octaves[:, None]
    for place, up in ((starts, 1), (starts - octaves[:, None] / 2**23, 0)):
        weight = np.repeat(place.reshape(-1, 1), 64, 1).astype(np.float32)
        got = host(backend, weight, ("ternary/64g",))
        numbers = 32 * np.arange(-14, 16)[:, None] + np.arange(32) + up
        with np.errstate(over="ignore"):
            expected = np.exp2(numbers / 32).astype(np.float16)
        assert got.scales[:, 0].tobytes() == expected.tobytes()
        finite = np.isfinite(expected).ravel()
        assert finite.sum() == finite.size - up and (got.codes[finite] == 1).all()
    weight = np.ones((1, 64), np.float32)  # the mean is 1.0105 of which the scale is 1
    weight[0, :3] = [0.5, np.nextafter(np.float32(0.5), 1), 2.672]
    got = host(backend, weight, ("ternary/64g",))
    assert got.scales[0, 0] == 1.0 and got.codes[0, :3].tolist() == [0, 1, 1]
    assert host(backend, weight, ("ternary/64",)).codes[0, 1] == 0, "by a scale of its own"


def test_what_is_no_number_stays_none() -> None:
    """Whatever the sign and the digits of a NaN: a carry into the sign would make a scale of it."""
    bits = np.array([0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000], np.uint32)
    given = bits.view(np.float32)[:, None, None]
    for backend in BACKENDS:
        out = to_numpy(module(backend, "storage")._on_ratios(to_device(backend, given, "float32")))
        assert not np.isfinite(out).any()
    assert not np.isfinite(core_storage._on_ratios(given)).any()
    weight = np.where(np.arange(64) == 3, np.nan, np.ones((1, 64))).astype(np.float32)
    assert not np.isfinite(scales_of(weight, "int6/row", 12.85)).any()


GOLDEN = {
    "int6/row 12.85": "c764db503c23f490", "int5/64 6.2": "6c4105cb6e29dab7", "int7/row None": "55887c3c89019991",
    "ternary/64g None": "a705ed7c75c2ed0c",
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    storage, _, factor = name.partition(" ")
    rule = storage, None if factor == "None" else float(factor)
    for backend in BACKENDS:
        got = host(backend, hard_weight(189)[3:], rule)
        assert hashlib.sha256(got.codes.tobytes() + got.scales.tobytes()).hexdigest()[:16] == GOLDEN[name]


# Roles.


def of(changes: dict[str, Any], **train: Any) -> RunConfig:
    config = mini("ablate_float")
    model = changed(config.model, {"mlp.hidden": 189, "embedding.dim": 20, **changes})
    train = {"quantise": "always", **train}
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, **train))


def test_roles() -> None:
    model = changed(presets.mini(presets.get("skc_mac").config).model, {**GRIDDED, "engram.storage": "int4/row"})
    model = changed(model, {"engram.orders": 1, "bigram.buckets": 11, "bank.at": "head"})
    for name, row in param_table(model).items():
        if row.group == "vector" or row.group == "hash":
            assert row.deviation is None
        else:
            role = "table" if name.startswith("embed") else "mlp" if ".mlp." in name else "attention"
            assert row.deviation == ROLES[f"deviations.{role}"], name
            assert row.rule == f"{row.storage} by {row.deviation:g} deviations"
    assert all(row.deviation is None for row in param_table(ModelConfig()).values())


@pytest.mark.pair
def test_engines_store_and_use_each_role_by_its_own_rule() -> None:
    config = of({**GRIDDED, "deviations.attention": None})
    weights, table = working_weights(config.model, 1.0), param_table(config.model)
    expected = reference.stored_model(config.model, weights)
    for backend in BACKENDS:
        made: Any = engine(backend, config, weights, dtype="float32")
        used, stored = made.weights(), made.quantised()
        for name, row in table.items():
            assert np.array_equal(stored[name].codes, expected[name].codes), name
            assert used[name].tobytes() == decode(stored[name], row.storage).tobytes(), name
            if row.storage != "float16":
                assert stored[name].scales.tobytes() == scales_of(weights[name], row.storage, row.deviation).tobytes()
        rules = {(bank.storage, bank.deviation) for bank in made._banks}
        assert rules == {("float16", None), ("int6/row", None), ("int6/row", 11.5), ("int7/row", 14.0)}


def test_banks_and_ranks_keep_rules_apart() -> None:
    config = of(
        {"matrix_storage": "int6/row", "deviations.mlp": 11.5, "deviations.attention": 13.0}, matrix_rule="muon"
    )
    shape = (config.model.dim, config.model.dim)
    config = dataclasses.replace(config, model=changed(config.model, {"mlp.hidden": shape[0]}))
    table = param_table(config.model)
    assert table["blocks.0.mlp.up.weight"].shape == table["blocks.0.mixer.q.weight"].shape == shape
    stacks = [bank for bank in params.banks(config.model) if bank.group == "matrix" and bank.shapes[0] == shape]
    assert {bank.deviation for bank in stacks} == {11.5, 13.0}
    rows = module("mlx", "banks").banks(config.model, {})
    assert len({bank.key for bank in rows}) == len(rows)
    for bank in (*stacks, *rows):
        assert {table[name].deviation for name in bank.names} == {bank.deviation}
    slots = [bucket.names for bucket in buckets(config, 3) if bucket.slots]
    assert slots and all(len({table[name].deviation for name in names}) == 1 for names in slots)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_stack_is_stored_as_its_matrices_are(rule: Any) -> None:
    stack = np.stack([hard_weight(189), hard_weight(189)[::-1]])
    made = module("cuda", "storage").stored(torch.tensor(stack), *rule)
    for whole, weight in zip(made, stack, strict=True):
        apart = module("cuda", "storage").stored(torch.tensor(weight), *rule)
        assert np.array_equal(to_numpy(whole), to_numpy(apart))


@pytest.mark.long
@pytest.mark.parametrize("rule", [("int6/row", 12.85), ("int5/64", 6.2), ("ternary/64g", None)], ids=str)
def test_mlx_compiled_gives_the_same_bits(rule: Any) -> None:
    import mlx.core as mx

    storage, weight = module("mlx", "storage"), mx.array(hard_weight(189))
    made = mx.compile(lambda weight: storage.stored(weight, *rule))(weight)
    assert to_numpy(made).tobytes() == to_numpy(storage.stored(weight, *rule)).tobytes()


def test_mlx_trains_rows_of_two_rules_as_it_would_each_parameter_alone() -> None:
    config = of({**GRIDDED, "matrix_storage": "int5/64"}, quantise="late", quantise_soft=(1.0, 16.0), steps=4)
    made: Any = engine("mlx", config, working_weights(config.model, 0.3), dtype="float32")
    apart = ByName(config, made)
    for step, batch in enumerate(batches(config, 3)):
        plan = dataclasses.replace(schedule.plan(step, (step + 1) / 4, config.train), quantise=step > 0)
        assert tuple(made.train_step(batch, plan).result()) == apart.train_step(batch, plan)
    for name, value in made.params().items():
        assert value.tobytes() == apart.arrays()[name].tobytes(), name


@pytest.mark.pair
@pytest.mark.parametrize("rule", [rule for rule in RULES if gridded(rule[0])], ids=str)
def test_soft_rounding_is_on_the_same_grid(rule: Any) -> None:
    weight, softness, largest = hard_weight(189, "float64"), 7.0, LARGEST[storage_class(rule[0])]
    scales = np.repeat(scales_of(weight, *rule).astype(np.float64), core_storage.group_size(rule[0], 189), 1)[:, :189]
    u = weight / scales
    inside, u = np.abs(u) <= largest, np.clip(u, -largest, largest)
    bend, end = np.tanh(softness * (u - np.floor(u) - 0.5)), 2 * math.tanh(softness / 2)
    value, slope = scales * (np.floor(u) + 0.5 + bend / end), inside * softness * (1 - bend**2) / end
    assert not inside.all() or rule[1] >= 14
    for backend in BACKENDS:
        number = to_device(backend, np.array(softness), "float64")
        made = module(backend, "storage").softened(to_device(backend, weight, "float64"), rule[0], number, rule[1])
        for got, expected in zip(made, (value, slope), strict=True):
            assert relative_rms(to_numpy(got), expected) <= P1_EXACT


# Artifact and command line.


@pytest.mark.parametrize(
    "matrix, table", [("int5/64", "int7/row"), ("int7/128", "int5/row"), ("ternary/64g", "int6/row")]
)
def test_the_artifact_gives_back_what_was_used_and_its_reader_needs_no_factor(
    matrix: Any, table: Any, tmp_path: Path
) -> None:
    roles = ROLES if gridded(matrix) else {"deviations.table": 14.0}
    config = of({"matrix_storage": matrix, "embedding.storage": table, **roles})
    made = engine("cuda", config, working_weights(config.model, 1.0), dtype="float32")
    stored = made.quantised()
    write_artifact(tmp_path / "a.skc", config.model, stored, tokenizer_sha256="0" * 64, provenance={})
    read = read_artifact(tmp_path / "a.skc")
    assert read.model == config.model
    for name, value in made.weights().items():
        assert read.weights[name].tobytes() == value.tobytes()
        assert np.array_equal(read.stored[name].codes, stored[name].codes)
    size = predicted_bytes(config.model)
    assert with_tables(config.model)["fp8/row"] > 0 and size > 0, "fp8 has no deviations"


def test_predicted_bits_follow_the_step() -> None:
    for storage, factor in (("int6/row", 12.85), ("int6/row", 60.0), ("int4/64", 2.9)):
        weight = draw("bits", 64, 1024).astype(np.float32)
        codes = host("cuda", weight, (storage, factor)).codes
        _, counts = np.unique(codes, return_counts=True)
        bits = -np.sum(counts / codes.size * np.log2(counts / codes.size))
        assert compressed_bits(storage, 1024, factor) == pytest.approx(bits, rel=0.03)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"deviations.mlp": 11.5}, "deviations.mlp=11.5: model.matrix_storage=float16 has no steps of equal size"),
        ({"matrix_storage": "fp8/row", "deviations.attention": 3.0}, "matrix_storage=fp8/row has no steps"),
        ({"matrix_storage": "ternary/64g", "deviations.mlp": 3.0}, "matrix_storage=ternary/64g has no steps"),
        ({"embedding.storage": "ternary/64", "deviations.table": 3.0}, "embedding.storage=ternary/64 has no steps"),
        ({"matrix_storage": "int6/row", "deviations.table": 3.0}, "embedding.storage=float16 has no steps"),
        ({"matrix_storage": "int6/row", "deviations.mlp": 0.5}, "deviations.mlp=0.5: expected from 1 to 1000"),
        ({"matrix_storage": "int6/row", "deviations.mlp": 1e9}, "expected from 1 to 1000"),
        ({"matrix_storage": "int6/row", "deviations.mlp": float("nan")}, "expected a finite number"),
    ],
)
def test_a_factor_without_a_grid_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        changed(ModelConfig(), changes)


def test_info_tells_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.matrix_storage", "int6/row", "--model.deviations.mlp", "11.5", "--model.layers", "1"]
    assert main(["info", "debug", *flags]) == 0
    out = capsys.readouterr().out
    assert "int6/row by 11.5 deviations" in out
    line = next(line for line in out.splitlines() if "mixer.q.weight" in line)
    assert "int6/row" in line and "deviations" not in line
    capsys.readouterr()
    assert main(["info", "debug", "--model.deviations.table", "14"]) == 2
    assert "has no steps of equal size: take int4 to int8, or leave it out" in capsys.readouterr().err


FAULTS: dict[str, Any] = {
    "what fills the last group counts": lambda s: {"_flat": lambda x, columns: x.reshape(x.shape[0], -1)},
    "one less in the denominator": lambda s: {"group_counts": lambda c, z: [n - 1 for n in s.core_counts(c, z)]},
    "no way out for constant rows": lambda s: {"_spread": lambda *a, honest=s._spread: honest(*a) + 1e-3},
    "of another class's largest code": lambda s: {"LARGEST": {**LARGEST, "int6": 32}},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_catches(fault: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = module(backend, "storage")
    monkeypatch.setattr(storage, "core_counts", core_storage.group_counts, raising=False)
    weight, rule = hard_weight(189), ("int6/64", 12.85)
    expected = reference.quantise(weight, "int6/64", 12.85).scales
    for name, value in FAULTS[fault](storage).items():
        monkeypatch.setattr(storage, name, value)
    grid = storage._on_grid(to_device(backend, weight, "float32"), *rule)[1]
    assert (to_numpy(grid)[..., 0] != expected).mean() > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_ratio_that_is_rounded_down_would_be_seen(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, (_, steps) = module(backend, "storage"), RATIOS
    down = tuple(np.cumsum(steps).tolist()), steps
    if backend == "mlx":
        monkeypatch.setattr(storage, "RATIOS", down)
    else:
        monkeypatch.setattr(storage, "STARTS_AND_STEPS", to_device(backend, np.array(down, np.int32), "int32"))
    got, expected = (
        host(backend, hard_weight(189), ("ternary/64g",)),
        reference.quantise(hard_weight(189), "ternary/64g"),
    )
    assert 0.3 < (got.scales != expected.scales).mean() < 0.7
