"""P1: every op against the numpy float64 oracle, its gradients, and fast against exact forms. Budget: 40 s."""

import inspect

import numpy as np
import pytest

from core.check.tolerances import P1_DIFFERENCE, P1_EXACT, P1_FAST, relative_rms
from core.model.ngrams import MULTIPLIERS, ngram_buckets
from core.model.tables import hadamard, rope_tables
from shared_tests.reference import ops as reference
from shared_tests.support.harness import BACKENDS, call, draw, gradients, module, rounded, tokens

pytestmark = pytest.mark.pair
SIZES = (1, 7, 33, 100)
WITHOUT_GRADIENT = ("document_ids", "causal_mask", "hash32", "ngram_buckets")


def cases(op: str, n: int) -> list[tuple]:
    """Return argument tuples of `op` at size n, `exact` left out."""
    x = 3 * draw(f"{op}/{n}", 2, 3, n)
    documents = reference.document_ids(tokens(f"{op}/{n}", 2, n, 50, 1), 1).astype(np.int32)
    if op in ("exp", "softmax", "logsumexp", "relu2", "leaky_relu2", "sigmoid", "silu", "decay"):
        return (
            [(x,), (30 * np.tanh(x),)] if op in ("softmax", "logsumexp") else [(x,)]
        )  # as hot as the softcap lets it be
    if op == "embedding":
        return [(tokens(op, 3, n, 13, 1), draw("table", 13, n))]
    if op == "linear":
        return [(x, draw("weight", 5, n))]
    if op == "rms_norm":
        # With one channel and a small eps the gradient is pure cancellation: there is nothing to compare.
        return [(x, 1e-6), (0.1 * x, 1e-3)] if n > 1 else [(x, 0.5)]
    if op == "rope":
        heads = draw(f"{op}/{n}", 2, 3, n, 10)
        return [(heads, *rope_tables(n, dims, 10_000.0)) for dims in (10, 6, 2)]
    if op == "attention":
        q, k, v = draw(f"q/{n}", 2, 4, n, 6), draw(f"k/{n}", 2, 2, n, 6), draw(f"v/{n}", 2, 2, n, 6)
        mask = reference.causal_mask(n, n, documents)
        late = max(1, n // 3)
        tail = reference.causal_mask(late, n, documents)
        return [(q, k, v, None), (q, k, v, mask), (q[:, :, -late:], k, v, tail), (q, q, q, mask)]
    if op == "ngram_buckets":
        ids = tokens(f"{op}/{n}", 2, 3 + n, 65_535, 1)
        ids[0, :2], ids[1, -1] = -1, 65_535
        late = np.cumsum(ids == 1, axis=1).astype(np.int32)
        return [(ids, late, MULTIPLIERS, buckets) for buckets in (2, 3067, 4096, 65_521)]
    if op == "hashed_rows":
        return [(draw(f"{op}/{n}", 11, n), tokens(op, 2, 4, 12, 12, documents=False).reshape(2, 2, 2) - 1)]
    if op == "hadamard":
        return [(draw(op, 2, 3, size), hadamard(size)) for size in (1 << n.bit_length(),)]
    if op == "short_conv":
        before = np.concatenate([np.zeros((2, 3), np.int32), documents], axis=1)
        return [
            (draw(f"{op}/{n}", 2, 3 + n, 5), draw(f"{op}/weight", 5, 4), before),
            (x, draw("taps", n, 1), np.zeros((2, 3), np.int32)),
        ]
    if op == "scan":
        forget = 1 / (1 + np.exp(draw(f"{op}/decay/{n}", 2, n, 3)))
        forget[:, 1::5] = 0.0  # not at the first position: the start must count
        return [(forget, draw(f"{op}/{n}", 2, n, 3), draw(f"{op}/start", 2, 3))]
    if op == "softcap":
        return [(20 * x, 30.0)]
    if op == "cross_entropy":
        return [(x, np.full((2, 3), n - 1, np.int32)), (30 * np.tanh(x), np.full((2, 3), n // 2, np.int32))]
    if op == "document_ids":
        return [(tokens(f"{op}/{n}", 2, n, 50, 1), 1)]
    if op == "causal_mask":
        return [(n, n, None), (n, n, documents), (max(1, n // 3), n, documents), (max(1, n // 3), n, None)]
    assert op == "hash32"
    return [(5, np.arange(n, dtype=np.uint32))]


def takes_exact(backend: str, op: str) -> bool:
    return "exact" in inspect.signature(getattr(module(backend, "ops"), op)).parameters


OPS = [n for n, f in vars(module("cuda", "ops")).items() if inspect.isfunction(f)]
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


def fast_gaps(backend: str, op: str, n: int, dtype: str) -> dict[str, float]:
    """Return the largest relative RMS of an op's fast form in `dtype` against its exact form in float32, of outputs and
    of gradients, at size n. Gradients that are nothing but cancellation are left out.
    """
    function, worst = getattr(module(backend, "ops"), op), {"outputs": 0.0, "gradients": 0.0}
    forms = ((False, dtype), (True, "float32"))
    for given in cases(op, n):
        arguments = tuple(rounded(a, dtype) for a in given)
        fast, exact = (call(backend, function, (*arguments, form), kind) for form, kind in forms)
        worst["outputs"] = max(worst["outputs"], *map(relative_rms, fast, exact))
        weights = [rounded(draw(f"cotangent/{op}/{i}", *o.shape), dtype) for i, o in enumerate(exact)]
        fast, exact = (gradients(backend, function, (*arguments, form), weights, kind) for form, kind in forms)
        sizes = {place: float(np.sqrt(np.mean(exact[place].astype(np.float64) ** 2))) for place in exact}
        gaps = (relative_rms(fast[place], exact[place]) for place, size in sizes.items() if size >= 1e-6)
        worst["gradients"] = max(worst["gradients"], *gaps, 0.0)
    return worst


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
