"""Counts score and order anew from the ledger of an evaluation.

The evaluation's own answer comes from a process that ran the plug-ins too, so it is compared and never believed.
"""

from pathlib import Path
from typing import Any

import numpy as np

from core.audit.fingerprints import ROUNDING, Fingerprints, Predictions, predictions_from
from core.audit.watch.isolation import Isolated
from core.config import ConfigError, RunConfig
from core.data.dataset import Dataset
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.score import score_of

ODD = "odd"
"""Kind of the error of a process whose answer has not the form of an answer."""
NUMBER = (int, float)
FLIPS = {
    "flips": int, "ends": int, "compared": int, "noticed": int, "wrong": list, "wrong_count": int,
    "largest_wrong": NUMBER, "differ": int, "explained": NUMBER, "by_plugins": bool, "repeatable": bool,
    "repeat_gap": NUMBER, "rounding": NUMBER,
    "tokens": list, "broken": (dict, type(None)),
}  # fmt: skip
ANSWER = {
    "backend": str, "device": str, "dtype": str, "plugins": dict, "prepared": NUMBER, "watching": NUMBER,
    "clock": NUMBER, "resumed": int, "broken": (dict, type(None)), "score": (dict, type(None)),
    "continued": (dict, type(None)),
    "distributions": {
        "passes": int, "positions": int, "vocabulary": int, "largest_log_sum": (*NUMBER, type(None)),
        "largest_cost_gap": NUMBER, "normal": bool, "agrees": bool, "limit": NUMBER,
    },
}  # fmt: skip
"""What an evaluation answers, and of which types."""


def understood(process: Isolated, flips: bool) -> Isolated:
    """Return a process with an error in place of an answer that has not the form of one."""
    if process.error is not None:
        return process
    problem = _odd(process.value, ANSWER | ({"flips": FLIPS} if flips else {}), "its answer")
    if not problem and process.value["dtype"] not in ROUNDING:
        problem = f"its answer: dtype is {process.value['dtype'][:40]!r}"
    return process._replace(value=None, error=_error(problem)) if problem else process


def _error(message: str) -> dict[str, str]:
    return {"kind": ODD, "message": message, "traceback": ""}


def _odd(value: Any, wanted: Any, name: str) -> str:
    """Return what is odd about a value, or an empty text."""
    if not isinstance(wanted, dict):
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        good = type(value) in kinds
        words = f"{name} is {str(value)[:40]!r}, expected {' or '.join(kind.__name__ for kind in kinds)}"
        return "" if good else words
    if not isinstance(value, dict):
        return f"{name} is {str(value)[:40]!r}, expected several figures"
    missing = [key for key in wanted if key not in value]
    if missing:
        return f"{name} lacks {', '.join(missing)}"
    return next(filter(None, (_odd(value[key], kind, f"{name}: {key}") for key, kind in wanted.items())), "")


def recount(process: Isolated, dataset: Dataset, config: RunConfig, ledger: Path) -> Isolated:
    """Return a process with score and order as its ledger gives them, for the text of `dataset`.

    `differs` in its value says in which figures the answer departs from the ledger.
    """
    if not process.value:
        return process
    try:
        book = Ledger.read(ledger)
        if book.tokens != len(dataset.val):
            raise LedgerError(f"{ledger}: of a text of {book.tokens} tokens, the text has {len(dataset.val)}")
    except (LedgerError, OSError) as error:
        return process._replace(value=None, error=_error(str(error)))
    answer, score, differs = process.value["score"], None, ""
    if answer:
        try:
            score = score_of(Evaluation.of(dataset.val, config, plugins=True), book).to_json()
            differs = ", ".join(f"{k} {answer.get(k)} for {v}" for k, v in score.items() if answer.get(k) != v)
        except (LedgerError, ConfigError) as error:
            differs = str(error)
    counted = {"score": score, "differs": differs, "ledger": order_of(book.entries, dataset.val.document_starts)}
    return process._replace(value={**process.value, **counted})


def order_of(entries: np.ndarray, starts: np.ndarray) -> dict[str, Any]:
    """Return the order of scoring by the entries of a ledger; `starts`: the first tokens of the documents."""
    order, version = entries["order"], entries["version"]
    written = order > 0
    by_order = np.argsort(order[written], kind="stable")
    within = np.searchsorted(starts, np.arange(len(entries)), "right")  # the document of each target's input
    back = (np.diff(order) < 0) & (np.diff(within) == 0) & written[1:] & written[:-1]
    return {
        "targets": len(entries),
        "written": int(written.sum()),
        "writes": int(order.max(initial=0)),
        "versions": int(version[written].max(initial=0)) + 1,
        "versions_rise": bool((np.diff(version[written][by_order]) >= 0).all()),
        "left_to_right": bool((np.diff(order[written]) >= 0).all()),
        "backwards": int(np.flatnonzero(back)[0]) + 2 if back.any() else None,
    }


def predictions_of(ledger: Path, file: Path, dataset: Dataset, config: RunConfig) -> Predictions | None:
    """Return the predictions that a process left of the text of `dataset`; None if its files do not hold them."""
    try:
        book = Ledger.read(ledger)
        if book.tokens != len(dataset.val):
            return None
        return predictions_from(Fingerprints.load(file, book.tokens), book.entries, dataset.val, config)
    except (LedgerError, OSError, ValueError, KeyError):
        return None
