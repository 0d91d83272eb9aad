"""MLX's attention in blocks: as exact as P1 asks, its memory bounded, used where it is said to be. Budget: 10 s."""

import functools
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from core.check.tolerances import P1_EXACT, P1_FAST, relative_rms
from core.data.batch import Batch
from core.engine.measured import load_measured
from core.engine.protocol import EngineOptions
from core.model.attention import Attention
from core.model.tables import rope_tables
from shared_tests.support.harness import call, draw, gradients, mini, module

attention, ops = module("mlx", "attention"), module("mlx", "ops")
LEAST = 16
"""Queries of a block here: rows of 100 have seven, the last one shorter."""


def given(queries: int, keys: int, documents: bool) -> tuple:
    """Return (q, k, v, mask): two rows, four heads that share two, keys of a state in front."""
    shapes = {"q": (2, 4, queries, 8), "k": (2, 2, keys, 8), "v": (2, 2, keys, 8)}
    q, k, v = (draw(f"blocks/{name}", *shape) for name, shape in shapes.items())
    mask = np.tri(queries, keys, keys - queries, dtype=np.bool_)
    if documents:
        ids = np.cumsum(draw("blocks/documents", 2, keys) > 1.2, axis=1)
        mask = (mask & (ids[:, keys - queries :, None] == ids[:, None, :]))[:, None]
    return q, k, v, None if queries == keys and not documents else mask


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("recomputed", [1, 999])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(100, 100), (16, 16), (33, 80), (1, 40)])
def test_blocks_give_what_the_exact_form_gives(
    queries: int, keys: int, documents: bool, recomputed: int, dtype: str
) -> None:
    arguments = given(queries, keys, documents)
    weights = [draw("blocks/cotangent", 2, 4, queries, 8)]
    blocks = functools.partial(attention.attention, least=LEAST, recomputed=recomputed)
    ours, exact = (
        [*call("mlx", f, (*arguments, last), d), *gradients("mlx", f, (*arguments, last), weights, d).values()]
        for f, last, d in ((blocks, False, dtype), (ops.attention, True, "float64"))
    )
    assert len(ours) == len(exact) == 4
    for mine, theirs in zip(ours, exact, strict=True):
        # MLX's own softmax in float64 is good to 1e-7, which is why the exact form is composed.
        assert relative_rms(mine, theirs) <= (P1_FAST if dtype == "float32" else max(P1_EXACT, 2e-7))


def test_blocks_refuse_a_state_without_a_mask() -> None:
    q, k, v, _ = given(3, 5, False)
    with pytest.raises(ValueError, match="as many queries as keys"):
        call("mlx", functools.partial(attention.attention, least=LEAST), (q, k, v, None, False), "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dims", [0, 4, 8])
@pytest.mark.parametrize("position", [None, (0, 0), (3, 3), (5, 117)])
def test_rope_of_half_precision_turns_as_the_exact_one_does(position: tuple | None, dims: int, dtype: str) -> None:
    """MLX's own pairs halves, too, and counts from each row's position; in float32 the host's tables are used."""
    settings = Attention(rope_dims=dims)
    first = None if position is None else np.array(position)
    x, tables = draw("rope", 2, 3, 40, 8), rope_tables(40, dims, settings.rope_base, first)
    given = None if first is None else mx.array(first)
    found = {}
    for kind, exact in ((dtype, False), ("float32", False), ("float64", True)):
        cos, sin = (mx.array(table, mx.float64 if exact else mx.float32) for table in tables)
        context = SimpleNamespace(cos=cos, sin=sin, position=given)
        (found[kind],) = call("mlx", lambda x, c=context, e=exact: attention.rope(x, c, settings, e), (x,), kind)
    assert relative_rms(found["float32"], found["float64"]) < 1e-6
    assert relative_rms(found[dtype], found["float64"]) < (4e-3 if dtype == "bfloat16" else 6e-4)


def peak(form, layers: int = 4, seq: int = 1024, backward: bool = True) -> int:
    """Return the bytes at the fullest moment of a forward (and backward) pass through layers of attention."""
    q, k, v = (mx.array(draw(f"peak/{name}", 1, 4, seq, 8), mx.float32) for name in "qkv")

    def loss(q, k, v):
        for _ in range(layers):
            q = q + form(q, k, v, None, False)
        return mx.sum(mx.square(q))

    step = mx.compile(mx.grad(loss, argnums=(0, 1, 2)) if backward else loss)
    mx.eval(q, k, v)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(q, k, v))
    return mx.get_peak_memory() - before


def test_scores_that_are_made_again_do_not_live_at_once() -> None:
    """Kept, the causal halves of four layers are half of MLX's own scores; made again, in turn, a few blocks' are."""
    scores = 4 * 4 * 1024**2
    kept, again = (peak(functools.partial(attention.attention, least=64, recomputed=r)) for r in (9999, 1))
    own = peak(ops.attention)
    assert own > 4 * scores  # of every layer its own: else nothing is measured
    assert kept < 0.6 * own
    assert again < own / 4
    assert again < 2 * scores  # of two layers: what is under way when a block begins still counts
    forward = peak(functools.partial(attention.attention, least=64, recomputed=1), backward=False)
    assert forward < scores / 2  # 16 blocks, the last of which has a sixteenth


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize(("seq", "again"), [(2047, False), (2048, True)])
def test_scores_are_made_again_from_2048_tokens_on(
    gpu: bool, seq: int, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form that engines train with, and what the estimate of their memory takes it for; nothing is computed."""
    seen: list[bool] = []
    blocks = attention._blocks
    monkeypatch.setattr(attention, "_blocks", lambda *given: (seen.append(given[2]), blocks(*given))[1])
    q = mx.zeros((1, 1, seq, 4))
    attention.choose(False, gpu).training(q, q, q, None, False)
    engine: Any = load_measured("mlx", mini("ablate_float"), options=EngineOptions(compile=False))
    assert seen == [again] and engine._composed(seq) is not again


def test_training_takes_the_blocks_and_scoring_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where MLX's own form is fused when it scores, and only then."""
    calls = []

    def said(name, form):
        return lambda *arguments: (calls.append(name), form(*arguments))[1]

    forms = attention.choose(False, True)
    assert forms.scoring is ops.attention and forms.training is not ops.attention
    forms = forms._replace(training=said("training", forms.training), scoring=said("scoring", forms.scoring))
    monkeypatch.setattr(attention, "choose", lambda exact, gpu: forms)
    engine: Any = load_measured("mlx", mini("ablate_float"), options=EngineOptions(compile=False))
    rows = np.arange(2 * 33, dtype=np.int32).reshape(2, 33) % engine._config.vocab
    batch = Batch(rows[:, :-1], rows[:, 1:], 2)
    engine.nll(*batch[:2])
    assert set(calls) == {"scoring"}
    calls.clear()
    engine.gradients(batch)
    assert set(calls) == {"training"}
    assert "training block-causal" in forms.note and forms.note in engine.notes


def test_every_form_is_said() -> None:
    exact, cpu = attention.choose(True, True), attention.choose(False, False)
    assert exact.note == "attention: exact, composed" and exact.training is exact.scoring is ops.attention
    assert cpu.training is cpu.scoring and "scaled_dot_product" not in cpu.note
