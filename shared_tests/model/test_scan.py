"""The recurrence, fast form against the definition: every length, forward and gradients, both engines. Budget: 30 s."""

import numpy as np
import pytest

from core.check.tolerances import P1_EXACT, P1_FAST, relative_rms
from shared_tests.reference import ops as reference
from shared_tests.support.harness import BACKENDS, call, draw, gradients, module, to_device

pytestmark = pytest.mark.pair
LENGTHS = range(1, 131)


def inputs(seq: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return decays (some exactly 0, some next to 1), drives and a start, (2, seq, 3) and (2, 3)."""
    decay = 1 / (1 + np.exp(3 * draw(f"scan/decay/{seq}", 2, seq, 3)))
    decay[0, seq // 2 :: 7] = 0.0
    decay[1, ::3] = 1 - 1e-7
    return decay, draw(f"scan/{seq}", 2, seq, 3), draw("scan/start", 2, 3)


def naive_gradients(decay: np.ndarray, drive: np.ndarray, start: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """Return the gradients of sum(h * weights), position by position from the last one back."""
    states = reference.scan(decay, drive, start, True)
    d_decay, d_drive, delta = np.zeros_like(decay), np.zeros_like(drive), np.zeros_like(start)
    for t in reversed(range(decay.shape[1])):
        delta = delta + weights[:, t]
        d_drive[:, t], d_decay[:, t] = delta, delta * (states[:, t - 1] if t else start)
        delta = delta * decay[:, t]
    return [d_decay, d_drive, delta]


def gaps(backend: str, seq: int, dtype: str, narrow: bool = False) -> float:
    """Return the largest relative gap of the fast form and its gradients from the naive recurrence."""
    decay, drive, start = inputs(seq)
    if narrow:  # what bfloat16 can hold
        decay, drive, start = (
            (v.astype("f4").view("u4") & 0xFFFF0000).view("f4").astype(float) for v in (decay, drive, start)
        )
    elif dtype == "float32":
        decay, drive, start = (v.astype("f4").astype(float) for v in (decay, drive, start))
    values, scan = (decay, drive, start), module(backend, "ops").scan
    weights = draw(f"scan/cotangent/{seq}", 2, seq, 3).astype(np.float32).astype(float)
    (got,) = call(backend, scan, (*values, False), dtype)
    found = gradients(backend, scan, (*values, False), [weights], dtype)
    wanted = naive_gradients(decay, drive, start, weights)
    pairs = [(got, reference.scan(decay, drive, start, True)), *zip(found.values(), wanted, strict=True)]
    return max(relative_rms(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_length_equals_the_naive_recurrence(backend: str) -> None:
    worst = {seq: gaps(backend, seq, "float64") for seq in LENGTHS}
    assert max(worst.values()) <= P1_EXACT, max(worst, key=lambda seq: worst[seq])


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16-like"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_so_does_float32(backend: str, narrow: bool) -> None:
    worst = {seq: gaps(backend, seq, "float32", narrow) for seq in (*range(1, 131, 7), 32, 64, 96, 97, 128)}
    assert max(worst.values()) <= P1_FAST, worst


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_chunk_that_forgets_its_past_is_caught(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = module(backend, "scan")
    honest = scan.chunked

    def forgetful(decay, drive, start, backwards=False):
        kept = np.ones((1, decay.shape[1], 1))
        kept[:, scan.CHUNK :: scan.CHUNK] = 0.0
        return honest(decay * to_device(backend, kept, "float64"), drive, start, backwards)

    monkeypatch.setattr(scan, "chunked", forgetful)
    assert gaps(backend, scan.CHUNK, "float64") <= P1_EXACT < gaps(backend, scan.CHUNK + 1, "float64")
