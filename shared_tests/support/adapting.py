"""What tests of adaptation share: settings, one pass on the numpy engine, what it leaves in the ledger."""

from typing import Any

import numpy as np

from core.config import AdaptConfig, EvalConfig, PhasesConfig
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger
from core.scoring.score import score_text
from shared_tests.support.adapting_numpy import SITES, AdaptingEngine
from shared_tests.support.known_scores import VOCAB, make_dataset

LENGTHS = [9, 2, 31, 14, 1, 22, 6, 40, 3, 11, 18, 5, 27]
"""Of documents, with BOS: shorter than a chunk, as long as one, longer than a window."""
LOOSE = ("w",)
"""Weights that learn in phases."""
FORMS: dict[str, dict[str, Any]] = {
    "documents": {},
    "stateful": {"windows": "stateful"},
    "warm": {"adapt_warm_a": True},
    "length": {"adapt_order": "length"},
    "steps": {"adapt_steps": 3, "adapt_clip": 0.5},
    "predictors": {"plugins": ("temperature", "counts(orders=1-3)")},
    "carried": {"plugins": ("counts(orders=2-8/2, rule=tilt)",), "windows": "stateful", "adapt_warm_a": True},
    "phases": {"phases_at": (0.35, 0.6), "phases_chunk": 8, "phases_lr": 0.3, "round": 1, "adapt_warm_a": True},
    "sgd": {"adapt_rule": "sgd", "adapt_momentum": 0.5, "windows": "stateful"},
}
"""Per-document forms of adaptation."""


def settings(**changes: Any) -> EvalConfig:
    """Return settings of adapters that learn much from little; `adapt_NAME` and `phases_NAME` are those of a part."""
    parts = {"adapt": {"kind": "lora", "chunk": 5, "documents": 3, "lr": 0.05, "rank": 2}, "phases": {}}
    for name in list(changes):
        part, _, field = name.partition("_")
        if part in parts and field:
            parts[part][field] = changes.pop(name)
    chosen = {"windows": "documents", "seq": 12, "round": 2, **changes}
    return EvalConfig(adapt=AdaptConfig(**parts["adapt"]), phases=PhasesConfig(**parts["phases"]), **chosen)


def evaluation(config: EvalConfig, lengths: list[int] | None = None, **changes: Any) -> Any:
    """Return the evaluation of the known documents."""
    split = make_dataset(LENGTHS if lengths is None else lengths).val
    return Evaluation(
        split, config, **{"adapts": True, "sites": SITES, "plugins": bool(config.plugins), "loose": LOOSE, **changes}
    )


def run(given: Evaluation, engine: Any = None, ledger: Ledger | None = None, **others: Any) -> np.ndarray:
    """Score and return the ledger's entries."""
    ledger = ledger or Ledger(len(given.split))
    engine = engine or AdaptingEngine(VOCAB)
    engine.ranks = others.get("ranks") or engine.ranks
    score_text(engine, given, ledger, **others)
    return ledger.entries.copy()
