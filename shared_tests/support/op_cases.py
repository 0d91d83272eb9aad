"""Arguments of every op, and the gap between its fast and its exact form."""

import inspect

import numpy as np

from core.check.tolerances import relative_rms
from core.engine.loading import available_backends
from core.model.ngrams import MULTIPLIERS
from core.model.tables import hadamard, rope_tables
from shared_tests.reference import ops as reference
from shared_tests.support.harness import call, draw, gradients, module, rounded, tokens


def cases(op: str, n: int) -> list[tuple]:
    """Return argument tuples of `op` at size n, `exact` left out."""
    x = 3 * draw(f"{op}/{n}", 2, 3, n)
    documents = reference.document_ids(tokens(f"{op}/{n}", 2, n, 50, 1), 1).astype(np.int32)
    if op in ("exp", "softmax", "logsumexp", "relu2", "leaky_relu2", "sigmoid", "silu", "softplus", "decay"):
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
    if op == "exclude":
        y, v = draw(f"y/{n}", 2, n, 4, 6), draw(f"own/{n}", 2, n, 2, 6)
        alone = tokens(f"{op}/{n}", 2, n, 50, 1) == 1
        return [(y, v, alone, True), (y, v, alone, False), (y, draw(f"own/each/{n}", 2, n, 4, 6), alone, True)]
    if op == "ngram_buckets":
        ids = tokens(f"{op}/{n}", 2, 3 + n, 65_535, 1)
        ids[0, :2], ids[1, -1] = -1, 65_535
        late = np.cumsum(ids == 1, axis=1).astype(np.int32)
        return [(ids, late, MULTIPLIERS, buckets) for buckets in (2, 3067, 4096, 65_521)]
    if op == "xor_buckets":
        ids = tokens(f"{op}/{n}", 2, 1 + n, 65_535, 1)
        ids[0, 0], ids[1, -1] = -1, 65_535
        late = np.cumsum(ids == 1, axis=1).astype(np.int32)
        return [(ids, late, buckets) for buckets in (2, 3072, 65_521)]
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
    if op == "span":
        return [(np.array([0, 3, n], np.int32), n)]
    kept = np.array([0, min(2, n)], np.int32)
    if op == "pick":
        x = draw(f"{op}/{n}", 2, n, 3)
        return [(x, np.array([[0, n - 1], [n // 2, 0]], np.int32)), (x, np.array([n - 1, 0], np.int32))]
    if op == "after":
        return [(draw(f"{op}/{n}", 2, n, 3), kept, draw(f"{op}/before", 2, 3))]
    if op in ("ends", "tail"):
        before = np.concatenate([np.zeros((2, 3), np.int32), documents], axis=1)
        given = [(before, count, 3) for count in (kept, np.array([n, n], np.int32))]
        x = draw(f"{op}/{n}", 2, 3 + n, 5)
        return given if op == "ends" else [(x, *reference.ends(*one), -1.0) for one in given]
    assert op == "hash32"
    return [(5, np.arange(n, dtype=np.uint32))]


def takes_exact(backend: str, op: str) -> bool:
    return "exact" in inspect.signature(getattr(module(backend, "ops"), op)).parameters


OPS = [n for n, f in vars(module(available_backends()[-1], "ops")).items() if inspect.isfunction(f)]


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
