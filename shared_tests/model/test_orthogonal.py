"""Orthogonal start values: bits, right angles, and which matrices start so. Budget: 3 s."""

import ast
import hashlib
import inspect
import math
import time
from typing import Any

import numpy as np
import pytest

from core import rng
from core.config import ConfigError, ModelConfig, changed
from core.model import orthogonal as spec
from core.model.orthogonal import TILE, orthogonal
from core.model.params import param_table, start_values
from shared_tests.support.harness import EVERYTHING, mini

GOLDEN = {
    (1, 1): "80ef3277cff18540",
    (3, 8): "20fc96860074f7aa",
    (33, 101): "fee56148e3ee2a8f",
    (300, 100): "58fa7205ecab9d5d",
}
"""blake2b of the float64 bits by shape, seed 7 and name `golden`: of one vector, of one tile, of several, tall."""
GOLDEN_TINY = "01b80d86dd3ee952"
"""blake2b of the float32 start values of the mini of `tiny` with orthogonal matrices, in table order."""


def digest(*arrays: np.ndarray) -> str:
    """Return a short hash of arrays."""
    return hashlib.blake2b(
        b"".join(np.ascontiguousarray(array).tobytes() for array in arrays), digest_size=8
    ).hexdigest()


def gap(matrix: np.ndarray) -> float:
    """Return the largest entry of W W^T - I, of W^T W - I if the columns are fewer."""
    wide = matrix.astype(np.float64) if matrix.shape[0] <= matrix.shape[1] else matrix.T.astype(np.float64)
    return float(np.abs(wide @ wide.T - np.eye(len(wide))).max())


@pytest.mark.parametrize("shape", GOLDEN)
def test_bits_are_golden(shape: tuple[int, int]) -> None:
    assert digest(orthogonal(7, "golden", *shape)) == GOLDEN[shape]


def test_start_values_of_a_model_are_golden() -> None:
    model = changed(mini("tiny").model, {"matrix_init": "orthogonal"})
    assert digest(*start_values(model, 1337).values()) == GOLDEN_TINY


def summed(numbers: list[float]) -> float:
    """Return the sum of Python floats in the order of the spec."""
    while len(numbers) > 1:
        half, count = len(numbers) // 2, len(numbers)
        numbers = [numbers[i] + numbers[count - half + i] for i in range(half)] + numbers[half : count - half]
    return numbers[0]


@pytest.mark.parametrize("shape", [(1, 4), (5, 7), (6, 6), (9, 4), (TILE + 2, TILE + 9), (2 * TILE + 3, TILE + 1)])
def test_bits_are_those_of_python_floats_one_by_one(shape: tuple[int, int]) -> None:
    """No array op, whatever this processor's vectors and caches, has rounded or added up otherwise."""
    drawn = rng.normal(3, "floats", shape[0] * shape[1]).reshape(shape)
    tall = shape[0] > shape[1]
    vectors: list[list[float]] = (drawn.T if tall else drawn).tolist()
    for _ in range(2):
        for k, vector in enumerate(vectors):
            for unit in vectors[:k]:
                along = summed([a * b for a, b in zip(vector, unit, strict=True)])
                vector[:] = [a - along * b for a, b in zip(vector, unit, strict=True)]
            length = math.sqrt(summed([a * a for a in vector]))
            vector[:] = [a / length for a in vector]
    expected = np.array(vectors).T if tall else np.array(vectors)
    assert np.ascontiguousarray(orthogonal(3, "floats", *shape)).tobytes() == np.ascontiguousarray(expected).tobytes()


def test_only_ops_that_round_number_by_number_are_used() -> None:
    """A product of matrices, a norm or a sum of numpy's would have an order of its own on another processor."""
    tree = ast.parse(inspect.getsource(spec))
    assert {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} == {
        *("add", "subtract", "multiply", "sqrt"),
        *("ndarray", "empty", "ascontiguousarray", "reshape", "shape", "T", "copy", "normal"),
    }
    assert not any(isinstance(node, ast.MatMult) for node in ast.walk(tree))


@pytest.mark.parametrize("shape", [(256, 256), (320, 128), (96, 400)])
def test_rows_or_columns_are_at_right_angles(shape: tuple[int, int]) -> None:
    matrix = orthogonal(11, "angles", *shape)
    assert matrix.shape == shape and gap(matrix) < 1e-14 and gap(matrix.astype(np.float32)) < 1e-6
    drawn = rng.normal(11, "angles", matrix.size).reshape(shape)
    tall = shape[0] > shape[1]
    r = matrix.T @ drawn if tall else matrix @ drawn.T
    assert np.abs(np.tril(r, -1)).max() < 1e-10 and (np.diag(r) > 0).all(), "R is triangular with a positive diagonal"


def test_vectors_that_are_nearly_dependent_come_out_at_right_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass alone would leave what rounding makes of vectors that differ in the ninth digit."""
    noise = rng.normal(0, "noise", 40 * 50).reshape(40, 50)
    monkeypatch.setattr(rng, "normal", lambda seed, name, count: (1.0 + 1e-9 * noise).ravel())
    assert gap(orthogonal(0, "dependent", 40, 50)) < 1e-14


def test_which_matrices_start_so() -> None:
    """Those that model.matrix_init speaks of; what starts at 0, vectors and tables keep their starts."""
    before = mini(EVERYTHING).model
    model = changed(before, {"matrix_init": "orthogonal", "shared_blocks": None})
    plain, table = param_table(changed(model, {"matrix_init": "normal"})), param_table(model)
    kinds = {name: row.init.kind for name, row in table.items() if row.group == "matrix"}
    zero = {name for name, kind in kinds.items() if kind == "constant"}
    assert set(kinds.values()) == {"orthogonal", "constant"}
    ends = ".o.weight", ".down.weight", "feedback.scale.weight", "feedback.shift.weight", "bigram.value.weight"
    assert all(name.endswith(ends) for name in zero), zero
    assert {"embed_up.weight", "value_embed.proj.weight", "engram.key.weight"} <= kinds.keys() - zero
    for name, row in table.items():
        assert row == (plain[name]._replace(init=row.init) if kinds.get(name) == "orthogonal" else plain[name]), name
    start, normal = (start_values(changed(model, {"matrix_init": kind}), 5) for kind in ("orthogonal", "normal"))
    for name, value in start.items():
        if kinds.get(name) != "orthogonal":
            assert value.tobytes() == normal[name].tobytes(), name
        else:  # every expert by itself
            assert max(map(gap, np.split(value, table[name].slices))) < 1e-6, name


def test_a_spread_for_matrices_without_one_is_refused() -> None:
    changes: dict[str, Any] = {"matrix_init": "orthogonal", "matrix_std": 0.05}
    with pytest.raises(ConfigError, match=r"^model.matrix_std=0.05: orthogonal matrices have no use for it"):
        changed(ModelConfig(), changes)


@pytest.mark.long
def test_a_model_of_36_million_weights_starts_in_a_minute() -> None:
    """Of processor time, on one core: 11 layers, 512 wide."""
    model = changed(ModelConfig(), {
        "vocab": 8192, "dim": 512, "layers": 11, "attention.heads": 8, "attention.kv_heads": 4, "mlp.hidden": 2048,
        "matrix_init": "orthogonal",
    })  # fmt: skip
    begin = time.process_time()
    start = start_values(model, 1)
    assert time.process_time() - begin < 60 and 35e6 < sum(value.size for value in start.values()) < 37e6
    assert gap(start["blocks.10.mlp.up.weight"]) < 1e-6
