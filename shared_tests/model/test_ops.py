"""P1: every op against the numpy float64 oracle, its gradients, and fast against exact forms. Budget: 40 s."""

import inspect

import numpy as np
import pytest

from core.check.tolerances import P1_DIFFERENCE, P1_EXACT, P1_FAST, relative_rms
from core.model.ngrams import ngram_buckets
from shared_tests.reference import ops as reference
from shared_tests.support.harness import BACKENDS, call, draw, gradients, module
from shared_tests.support.op_cases import OPS, cases, fast_gaps, takes_exact

pytestmark = pytest.mark.pair
SIZES = (1, 7, 33, 100)
WITHOUT_GRADIENT = ("document_ids", "causal_mask", "hash32", "ngram_buckets", "xor_buckets", "span", "ends")


REFERENCE = {**vars(reference)}


def oracle(op: str, arguments: tuple) -> list[np.ndarray]:
    """Return the oracle's outputs."""
    if op == "hash32":
        from core.rng import hash32

        return [hash32(*arguments)]
    if op == "ngram_buckets":
        return [ngram_buckets(*arguments)]
    function = REFERENCE[op]
    out = function(*arguments, True) if "exact" in inspect.signature(function).parameters else function(*arguments)
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_exact_form_equals_the_oracle(op: str, n: int, backend: str) -> None:
    for arguments in cases(op, n):
        extra = (True,) if takes_exact(backend, op) else ()
        got = call(backend, getattr(module(backend, "ops"), op), (*arguments, *extra), "float64")
        for ours, theirs in zip(got, oracle(op, arguments), strict=True):
            assert relative_rms(ours, theirs) <= P1_EXACT


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("op", [op for op in OPS if op not in WITHOUT_GRADIENT])
def test_gradients_agree_and_match_finite_differences(op: str, n: int) -> None:
    for arguments in cases(op, n):
        extra = (True,) if takes_exact("cuda", op) else ()
        full = (*arguments, *extra)
        weights = [draw(f"cotangent/{op}/{i}", *o.shape) for i, o in enumerate(oracle(op, arguments))]
        mine, theirs = (gradients(b, getattr(module(b, "ops"), op), full, weights, "float64") for b in BACKENDS)
        moves = {place: draw(f"move/{op}/{place}", *np.shape(full[int(place)])) for place in mine}
        slope = 0.0
        for place, move in moves.items():
            assert relative_rms(mine[place], theirs[place]) <= P1_EXACT, (op, n, place)
            slope += float((mine[place] * move).sum())

        def objective(h: float, op=op, arguments=arguments, moves=moves, weights=weights) -> float:
            moved = tuple(a + h * moves[str(i)] if str(i) in moves else a for i, a in enumerate(arguments))
            return sum(float((o * w).sum()) for o, w in zip(oracle(op, moved), weights, strict=True))

        h = 1e-4
        # Richardson's combination of two central differences: the error falls with h^4.
        near, far = ((objective(s) - objective(-s)) / (2 * s) for s in (h, 2 * h))
        measured = (4 * near - far) / 3
        size = sum(float(np.abs(mine[p] * moves[p]).sum()) for p in mine) + 1e-12
        assert abs(measured - slope) / size <= P1_DIFFERENCE, (op, n)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("op", [op for op in OPS if takes_exact("cuda", op)])
def test_fast_form_equals_exact_form_in_float32(op: str, n: int, backend: str) -> None:
    found = fast_gaps(backend, op, n, "float32")
    assert max(found.values()) <= P1_FAST, found


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_without_a_mask_refuses_a_cache(backend: str) -> None:
    q, k = draw("q", 1, 1, 2, 4), draw("k", 1, 1, 3, 4)
    for exact in (True, False):
        with pytest.raises(ValueError, match="as many queries as keys"):
            call(backend, module(backend, "ops").attention, (q, k, k, None, exact), "float32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_zero_gets_no_gradient(backend: str) -> None:
    table, rows = draw("pruned", 5, 3), np.array([[[0, 1], [1, -1], [3, 3]]], np.int32)
    table[1] = 0.0
    ones = np.ones((1, 3, 6))
    (found,) = gradients(backend, module(backend, "ops").hashed_rows, (table, rows), [ones], "float64").values()
    assert (found == np.array([1.0, 0.0, 0.0, 2.0, 0.0])[:, None]).all()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_the_cross_entropy_is_added_before_the_cap(backend: str, exact: bool) -> None:
    ops, dtype = module(backend, "ops"), "float64" if exact else "float32"
    targets, cotangents = np.array([[0, 8, 4], [3, 3, 7]], np.int32), [draw(f"bias/{i}", 2, 3) for i in "nz"]
    given = (5 * draw("bias/logits", 2, 3, 9), targets, 2 * draw("bias", 9))
    inside = lambda x, t, b: ops.cross_entropy(x, t, exact, 15.0, b)  # noqa: E731
    apart = lambda x, t, b: ops.cross_entropy(ops.softcap(x + b, 15.0, exact), t, exact)  # noqa: E731
    sides = []
    for function in (inside, apart):
        out = call(backend, function, given, dtype)
        grads = gradients(backend, function, given, cotangents, dtype)
        assert set(grads) == {"0", "2"}
        sides.append([*out, *grads.values()])
    for ours, theirs in zip(*sides, strict=True):
        assert relative_rms(ours, theirs) <= (P1_EXACT if exact else P1_FAST)
    bare = call(backend, lambda x, t: ops.cross_entropy(x, t, exact, 15.0), given[:2], dtype)
    assert relative_rms(sides[0][0], bare[0]) > 0.01


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gain_of_the_norm_multiplies_what_is_normed(backend: str, exact: bool) -> None:
    ops, dtype = module(backend, "ops"), "float64" if exact else "float32"
    given, cotangents = (draw("gain/x", 2, 3, 9), draw("gain/gain", 9)), [draw("gain/slope", 2, 3, 9)]
    sides = []
    for function in (lambda x, g: ops.rms_norm(x, 1e-6, exact, g), lambda x, g: ops.rms_norm(x, 1e-6, exact) * g):
        grads = gradients(backend, function, given, cotangents, dtype)
        sides.append([*call(backend, function, given, dtype), grads["0"], grads["1"]])
    sides.append([reference.rms_norm(given[0], 1e-6, exact, given[1])])
    for side in sides[1:]:
        for ours, theirs in zip(sides[0], side, strict=False):
            assert relative_rms(ours, theirs) <= (P1_EXACT if exact else P1_FAST)
