"""The adaptive path on both backends: twins, neighbours, flips, ranks, windows with carry. Budget: 20 s."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.config import RunConfig
from core.scoring import snapshots
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger
from core.scoring.score import score_text
from shared_tests.support.adapting import settings
from shared_tests.support.adapting_numpy import Talk
from shared_tests.support.harness import BACKENDS
from shared_tests.support.known_scores import VOCAB, make_dataset
from shared_tests.support.plugin_examples import fresh, small

LENGTHS = [9, 2, 31, 14, 1, 22, 6]
TWINS = 1e-8
"""Nats, backend against backend in float64 (measured: 1e-13)."""
ALONE = {"float64": 1e-10, "float32": 1e-5}
"""Nats of a document alone and among others."""
FORMS: dict[str, dict[str, Any]] = {
    "documents": {"adapt_sites": ("q", "o", "head"), "plugins": ("temperature", "counts"), "round": 1},
    "stateful": {"windows": "stateful", "adapt_sites": ("mixer", "block_mlp", "up"), "adapt_steps": 2},
    "phases": {"phases_at": (0.35,), "phases_chunk": 8, "phases_lr": 0.05, "adapt_warm_a": True, "round": 1},
}


def configured(form: str, **changes: Any) -> RunConfig:
    """Return a small model of attention and a recurrent kind, with adaptation."""
    config = small("hybrid", 16)
    return dataclasses.replace(config, eval=settings(**{"seq": 16, "adapt_lr": 0.03, **FORMS[form], **changes}))


@functools.cache
def engine_of(backend: str, dtype: str) -> Any:
    return fresh(backend, configured("stateful"), dtype)


def run(
    backend: str, config: RunConfig, lengths: list[int], dtype: str = "float64", ranks: Any = None, split: Any = None
) -> np.ndarray:
    """Score and return the nats; several ranks have an engine each."""
    engine = engine_of(backend, dtype) if ranks is None else fresh(backend, config, dtype)
    split = split or make_dataset(lengths).val
    ledger = Ledger(len(split))
    if ranks is not None:
        engine.ranks = ranks
    score_text(engine, Evaluation.of(split, config, plugins=True), ledger, ranks=ranks)
    return ledger.entries["nats"].copy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_it_goes_on_from_a_copy_to_the_bit(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warm A and moved weights of a real engine, with several rows: what is copied is what comes back."""
    monkeypatch.setattr(snapshots, "SNAPSHOT_EVERY", 0.0)
    config, engine, split = configured("phases"), engine_of(backend, "float64"), make_dataset(LENGTHS).val
    given, whole = Evaluation.of(split, config, plugins=True), run(backend, config, LENGTHS)

    def stops(done: int, total: int) -> None:
        if done >= 0.8 * total:
            raise InterruptedError

    for progress in (stops, None):
        ledger = Ledger.open(tmp_path / "ledger", len(split), "key")
        with contextlib.suppress(InterruptedError):
            score_text(engine, given, ledger, progress=progress)
        assert Path(f"{ledger.path}.plugins").exists() == (progress is not None)
        ledger.close()
    assert ledger.entries["nats"].tobytes() == whole.tobytes()


@pytest.mark.pair
@pytest.mark.parametrize("form", FORMS)
def test_twins_adapt_alike(form: str) -> None:
    config = configured(form)
    ours, theirs = (run(backend, config, LENGTHS) for backend in BACKENDS)
    assert np.abs(ours - theirs).max() <= TWINS
    plain = run("cuda", dataclasses.replace(config, eval=settings(seq=64, adapt_lr=0.0)), LENGTHS)
    assert np.abs(ours - plain).max() > 1e-2, "what is compared must matter"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("windows", ["documents", "stateful"])
def test_what_cannot_learn_costs_what_documents_cost(windows: str, backend: str) -> None:
    """Adapters with B = 0 and a rate of 0: what the plain path says, in windows that hold a whole document."""
    config = configured("stateful", windows=windows, adapt_lr=0.0)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, seq=32))
    plain = dataclasses.replace(config, eval=config.eval.plain())
    for dtype, close in (("float64", 1e-11), ("float32", 2e-6)):
        assert np.abs(run(backend, config, LENGTHS, dtype) - run(backend, plain, LENGTHS, dtype)).max() <= close


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("windows", ["documents", "stateful"])
def test_a_document_alone_and_among_others(windows: str, backend: str) -> None:
    lengths = [31, 9, 2, 14, 22, 6, 40, 3]
    for dtype, close in ALONE.items():
        config = configured("stateful", windows=windows, adapt_documents=64, adapt_eps=1e-6)
        together = run(backend, config, lengths, dtype)[: lengths[0] - 1]
        alone = run(backend, config, lengths[:1], dtype)
        assert np.abs(together - alone).max() <= close


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("windows", ["documents", "stateful"])
def test_flips(windows: str, backend: str) -> None:
    """Another token changes no cost before it, and no other document's: bit for bit."""
    config, split = configured("stateful", windows=windows), make_dataset(LENGTHS).val
    before, tokens, place = run(backend, config, [], split=split), split.tokens, 30
    tokens[place] = (tokens[place] - 3) % (VOCAB - 4) + 4
    changed = np.flatnonzero(run(backend, config, [], split=split) != before) + 1
    end = split.document_starts[3]
    assert changed.min() == place and changed.max() <= end and len(changed) > (end - place) / 2


@pytest.mark.parametrize("form", FORMS)
def test_ranks_agree(form: str) -> None:
    config = configured(form)
    alone = run("cuda", config, LENGTHS)
    for nats in Talk(2).run(lambda ranks: run("cuda", config, LENGTHS, ranks=ranks)):
        assert np.abs(nats - alone).max() <= 1e-9
