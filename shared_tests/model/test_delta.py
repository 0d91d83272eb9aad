"""The gated delta rule: chunks against the recurrence, commits from the tape, and planted faults. Budget: 20 s."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from core.check.tolerances import P1_DIFFERENCE, P1_FAST, relative_rms
from core.config import ConfigError, ModelConfig, changed
from core.engine.protocol import Engine
from core.model.context import DeltaState, DeltaTape
from core.model.shares import decoding_state, shares
from core.model.table import TAPS, State
from core.presets import PRESETS
from shared_tests.support.harness import (
    BACKENDS,
    call,
    draw,
    gradients,
    mini,
    module,
    reader,
    to_numpy,
    tokens,
)
from shared_tests.support.one_layer import ONE_LAYER, check_reading_back

pytestmark = pytest.mark.pair
T3 = {"float64": 1e-12, "float32": 1e-5}
"""A state after commits against that after as many tokens: relative RMS."""
T1 = 1e-12
"""Chunks against the recurrence in float64: relative RMS."""
HEADS, KEY, VALUE = 2, 4, 3
Given = tuple[np.ndarray, ...]


def drawn(seq: int, kind: str = "plain") -> Given:
    """Return arguments of the rule for two rows; `kind`: which of them are at their ends."""
    q, k, v = (
        draw(f"delta/{name}/{seq}", 2, seq, HEADS, width) for name, width in (("q", KEY), ("k", KEY), ("v", VALUE))
    )
    if kind == "alike":  # what a row of one and the same token gives
        k = np.broadcast_to(k[:1, :1], k.shape)
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    beta, decay = (
        1 / (1 + np.exp(-draw(f"delta/beta/{seq}", 2, seq, HEADS))),
        -np.exp(draw(f"delta/g/{seq}", 2, seq, HEADS)),
    )
    some = draw(f"delta/some/{seq}", 2, seq, HEADS) > 0
    if kind == "beta at its ends":
        beta = some.astype(float)
    if kind == "alike":
        beta, decay = 0 * beta + 0.97, 0 * decay
    if kind == "strong":  # every eighth token forgets nearly all, the others nearly nothing
        decay = np.where((np.arange(seq) % 8 == 3)[None, :, None], -1e5, -0.01) + 0 * decay
    if kind == "g at its ends":
        decay = np.where(some, 0.0, -80.0)
    documents = np.zeros((2, seq), np.int32)
    if kind != "alike":
        documents = np.cumsum(draw(f"delta/documents/{seq}", 2, seq) > 1.3, axis=1).astype(np.int32)
    return q, k, v, beta, decay, documents, draw(f"delta/start/{seq}", 2, HEADS, KEY, VALUE)


def by_token(q: np.ndarray, k: np.ndarray, v: np.ndarray, beta: np.ndarray, decay: np.ndarray, *rest: Any) -> list:
    """Return what is read and written, token by token."""
    (documents, start), state, read, written = rest, rest[1].copy(), np.empty_like(v), np.empty_like(v)
    for row, t, head in np.ndindex(v.shape[:3]):
        before = state[row, head]
        if documents[row, t] != (documents[row, t - 1] if t else 0):
            before = np.zeros_like(start[row, head])
        memory = np.exp(decay[row, t, head]) * before
        written[row, t, head] = beta[row, t, head] * (v[row, t, head] - k[row, t, head] @ memory)
        state[row, head] = memory + np.outer(k[row, t, head], written[row, t, head])
        read[row, t, head] = q[row, t, head] @ state[row, head]
    return [read, written]


def form_of(backend: str, name: str, exact: bool = True) -> Callable:
    """Return a form of the rule."""
    form = getattr(module(backend, "delta"), name)
    return lambda *given: form(*given, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["plain", "alike", "beta at its ends", "g at its ends"])
def test_chunks_equal_the_recurrence_and_a_loop(kind: str, backend: str) -> None:
    for seq in (*range(1, 34), 64, 97):
        given = drawn(seq, kind)
        chunked, recurrent = (
            call(backend, form_of(backend, name), given, "float64") for name in ("chunked", "recurrent")
        )
        for ours, step, loop in zip(chunked, recurrent, by_token(*given), strict=True):
            assert relative_rms(ours, step) <= T1 and relative_rms(ours, loop) <= T1, (seq, kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["alike", "strong"])
def test_no_digits_are_lost_in_float32(kind: str, backend: str) -> None:
    """Keys alike: the series 1 - a + a^2 - ... has no digit left at 32 tokens, as its powers grow like binomials.
    A strong decay: differences of sums that it is in have none."""
    given = drawn(97, kind)
    fast = call(backend, form_of(backend, "rule", False), given, "float32")
    for ours, loop in zip(fast, by_token(*given), strict=True):
        assert relative_rms(ours, loop) <= P1_FAST


@pytest.mark.parametrize("seq", [1, 2, 7, 33])
def test_gradients_agree_and_match_finite_differences(seq: int) -> None:
    given = drawn(seq)
    weights = [draw(f"delta/cotangent/{i}", 2, seq, HEADS, VALUE) for i in range(2)]
    moves = {i: draw(f"delta/move/{i}", *one.shape) for i, one in enumerate(given) if one.dtype.kind == "f"}

    def objective(h: float) -> float:
        moved = tuple(one + h * moves[i] if i in moves else one for i, one in enumerate(given))
        return sum(float((out * weight).sum()) for out, weight in zip(by_token(*moved), weights, strict=True))

    near, far = ((objective(h) - objective(-h)) / (2 * h) for h in (1e-4, 2e-4))
    found = [
        gradients(b, form_of(b, form), given, weights, "float64") for b in BACKENDS for form in ("chunked", "recurrent")
    ]
    for grads in found:
        parts = [float((grads[str(place)] * moves[i]).sum()) for place, i in zip(grads, moves, strict=True)]
        assert abs((4 * near - far) / 3 - sum(parts)) <= P1_DIFFERENCE * sum(map(abs, parts))
        for place, value in grads.items():
            assert relative_rms(value, found[0][place]) <= 1e3 * T1, place


def test_pytorch_itself_finds_no_fault_in_the_gradients() -> None:
    import torch

    given = [torch.tensor(one, requires_grad=one.dtype.kind == "f") for one in drawn(3)]
    assert torch.autograd.gradcheck(form_of("cuda", "chunked"), given)


# The tape.

CONFIG = mini("delta_ablate")
QWEN = {
    f"delta.{name}": size for name, size in {"heads": 16, "key_heads": 16, "key_dim": 128, "value_dim": 128}.items()
}
"""Sizes of Qwen3.5-0.8B."""


def arrays(value: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a state or a tape of one layer as numpy, by name."""
    return {name: to_numpy(one) for name, one in value._asdict().items() if one is not None}


def layers_of(state: Any) -> list[dict[str, np.ndarray]]:
    """Return the states of all delta layers."""
    return [arrays(part) for part in state.model.parts if isinstance(part, DeltaState)]


def text() -> np.ndarray:
    """Return three rows: with documents, with a document that begins at a chunk's first token, with one document."""
    rows = tokens("delta/tape", 3, 60, CONFIG.model.vocab, CONFIG.model.bos, documents=False)
    rows[0, [3, 17, 18, 33]] = rows[1, [0, 10, 32]] = CONFIG.model.bos
    return rows


def gap_of_commits(model: Engine) -> float:
    """Return the largest relative difference of a delta layer's state after commits of n from that after n tokens.

    Every n from 0 to a first chunk's 12, then other numbers of two more chunks; what is dropped was another text.
    """
    rows, worst, ids = text(), 0.0, CONFIG.model
    for n in range(13):
        state, at = model.start(3), np.zeros(3, int)
        for size, counts in ((12, (n, 12 - n, (n + 5) % 13)), (5, (n % 6, 2, 0)), (40, (n, 40, 38 - 2 * n))):
            counts = np.minimum(np.array(counts), rows.shape[1] - at)
            chunk = tokens(f"delta/dropped/{n}/{size}", 3, size, ids.vocab, ids.bos)
            for row, count in enumerate(counts):
                chunk[row, :count] = rows[row, at[row] : at[row] + count]
            state, at = model.commit(model.chunk(state, chunk), counts), at + counts
        for row in np.flatnonzero(at):
            prefix = rows[row : row + 1, : at[row]]
            plain = model.commit(model.chunk(model.start(1), prefix), prefix.shape[1])
            for ours, theirs in zip(layers_of(state), layers_of(plain), strict=True):
                worst = max(worst, *(relative_rms(ours[name][row], theirs[name][0]) for name in ours))
    return worst


@pytest.mark.parametrize("dtype", T3)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_commit_of_n_is_the_state_after_n_tokens(backend: str, dtype: str) -> None:
    assert gap_of_commits(reader(backend, CONFIG, 1.0, dtype=dtype)) <= T3[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("forgotten", ["matrices", "convolution"])
def test_a_crop_that_does_not_roll_back_is_seen(forgotten: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What libraries do with keys alone: they are cropped, the recurrent state stays as the whole chunk left it."""
    delta = module(backend, "parts.delta").Delta
    honest = delta.commit

    def kept(self: Any, tape: DeltaTape, context: Any, n: Any) -> DeltaState:
        whole = context.kept._replace(last=context.documents[:, -1:])
        last = honest(self, tape, context._replace(kept=whole), 0 * n + tape.decay.shape[1]).last
        cropped = honest(self, tape, context, n)
        return cropped._replace(last=last) if forgotten == "matrices" else cropped._replace(tail=tape.tail[:, -3:])

    monkeypatch.setattr(delta, "commit", kept)
    assert gap_of_commits(reader(backend, CONFIG, 1.0, dtype="float64")) > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tape_is_as_large_as_declared(backend: str) -> None:
    model, rows = reader(backend, CONFIG, 1.0, dtype="float64"), text()[:1]
    settings, sizes = CONFIG.model.delta, []
    for seq in (7, 50):
        chunk: Any = model.chunk(model.start(1), rows[:, :seq])
        tapes = [arrays(tape) for tape in chunk.model[2] if isinstance(tape, DeltaTape)]
        sizes.append([sum(array.size for array in tape.values()) for tape in tapes])
    state = settings.state(CONFIG.model).fixed
    assert sizes == [[state + seq * settings.tape(CONFIG.model)] * 3 for seq in (7, 50)]


def test_what_the_tape_of_qwen_takes() -> None:
    """18 layers, float32, chunks of 8: 144 MiB of a state for every token, 2.3 of factors, 3.4 of the convolution."""
    model = changed(ModelConfig(), {"blocks": ("delta",), "dim": 1024, **QWEN})
    size, settings = 18 * 8 * 4 / 2**20, model.delta
    states = settings.state(model).fixed - 3 * settings.entering
    assert settings.entering == 6144 and size * states == 144
    assert round(size * (settings.tape(model) - settings.entering), 1) == 2.3 and round(size * 6144, 1) == 3.4


# The part.


def test_shares_counted_by_hand() -> None:
    model = changed(ModelConfig(), {
        "vocab": 50, "dim": 8, "layers": 2, "blocks": ("delta",), "attention.rope_dims": 2, "delta.heads": 4,
        "delta.key_heads": 2, "delta.key_dim": 3, "delta.value_dim": 5,
    })  # fmt: skip
    matrices, vectors = 2 * 6 * 8 + 3 * 20 * 8 + 2 * 4 * 8, 2 * 4 + 32 * TAPS + 5
    share = shares(model, 100)["delta"]
    assert share.parameters == 2 * (matrices + vectors)
    assert share.flops == 2 * 3 * (2 * matrices + 6 * 4 * 3 * 5)
    assert share.state == State(2 * (3 * 32 + 4 * 3 * 5)) == decoding_state(model)
    # Each number of Qwen3.5's mixer: q, k, v, z; a and b; output; convolution; A_log, dt_bias and the norm.
    mixer = changed(ModelConfig(), {"blocks": ("delta",), "dim": 1024, **QWEN})
    assert sum(row.size for row in mixer.delta.rows(mixer).values()) == 10_543_264


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"delta.conv": False},
        {"delta.gate": False, "delta.key_heads": 1},
        {"documents": "packed", "output_norm": "gain"},
        {"layers": 2, "shared_blocks": 1, "repeat_layers": (1,)},
    ],
)
def test_other_settings_read_back_exactly(changes: dict, backend: str) -> None:
    settings = {"blocks": ("delta",), "delta.heads": 2, "delta.key_heads": 2, "delta.key_dim": 3, "delta.value_dim": 5}
    check_reading_back(ONE_LAYER | settings | changes, f"delta/{sorted(changes)}", backend)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 4, "key_heads": 3}, "model.delta.heads=4 is not divisible by model.delta.key_heads=3"),
        ({"key_dim": 0}, "model.delta.key_dim=0: expected"),
        ({"times": (8.0, 2.0)}, "model.delta.times=.*expected two rising numbers"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        changed(ModelConfig(), {"blocks": ("delta",), **{f"delta.{name}": value for name, value in changes.items()}})


@pytest.mark.parametrize("name", ["conv", "gate"])
def test_a_setting_without_a_use_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.delta.{name}=False: no layer has a use for it"):
        changed(ModelConfig(), {f"delta.{name}": False})


def test_the_preset_is_as_large_as_its_sibling() -> None:
    ours, theirs = PRESETS["delta_ablate"].params, PRESETS["skc_ablate"].params
    assert abs(ours - theirs) <= 0.02 * theirs
