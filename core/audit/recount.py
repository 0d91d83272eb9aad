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
from core.files import FileError
from core.formats.kinds import ANYTHING, FLAG, Leaf, among, check_value, or_null
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.score import adaptation_in_words, score_of

ODD = "odd"
"""Kind of the error of a process whose answer has not the form of an answer."""
FIGURE = Leaf("a number", lambda value: type(value) in (int, float))
WHOLE = Leaf("a whole number", lambda value: type(value) is int)
TEXT = Leaf("a text", lambda value: type(value) is str)
SOME = {"*": ANYTHING}
PERHAPS = Leaf("an object or null", lambda value: value is None or type(value) is dict)
FLIPS = {
    "flips": WHOLE, "documents": WHOLE, "ends": WHOLE, "compared": WHOLE, "noticed": WHOLE, "wrong": [ANYTHING],
    "wrong_count": WHOLE, "largest_wrong": FIGURE, "differ": WHOLE, "explained": FIGURE, "by_plugins": FLAG,
    "repeatable": FLAG, "repeat_gap": FIGURE, "rounding": FIGURE, "tokens": [ANYTHING], "broken": PERHAPS,
    "*": ANYTHING,
}  # fmt: skip
ANSWER = {
    "backend": TEXT, "device": TEXT, "dtype": among(*ROUNDING), "plugins": SOME, "prepared": FIGURE,
    "watching": FIGURE, "clock": FIGURE, "resumed": WHOLE, "broken": PERHAPS, "score": PERHAPS, "continued": PERHAPS,
    "distributions": {
        "passes": WHOLE, "positions": WHOLE, "vocabulary": WHOLE, "largest_log_sum": or_null(FIGURE),
        "largest_cost_gap": FIGURE, "normal": FLAG, "agrees": FLAG, "limit": FIGURE, "*": ANYTHING,
    },
    "*": ANYTHING,
}  # fmt: skip
"""What an evaluation answers."""


def understood(process: Isolated, flips: bool) -> Isolated:
    """Return a process with an error in place of an answer that has not the form of one."""
    if process.error is not None:
        return process
    try:
        check_value(process.value, ANSWER | ({"flips": FLIPS} if flips else {}), "its answer", "it cannot be judged")
    except FileError as error:
        return process._replace(value=None, error=_error(str(error)))
    return process


def _error(message: str) -> dict[str, str]:
    return {"kind": ODD, "message": message, "traceback": ""}


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
    counted["adaptation"] = adaptation_in_words(config.eval) if config.eval.adapt.kind != "none" else ""
    return process._replace(value={**process.value, **counted})


def order_of(entries: np.ndarray, starts: np.ndarray) -> dict[str, Any]:
    """Return the order of scoring by the entries of a ledger; `starts`: the first tokens of the documents."""
    order, version, row = entries["order"], entries["version"], entries["row"]
    written = order > 0
    by_row = np.lexsort((order[written], row[written]))  # what is versioned: each row's adapters, or the weights
    rises = (np.diff(version[written][by_row]) >= 0) | (np.diff(row[written][by_row]) > 0)
    first = order[starts[starts < len(order)]]  # of each document, to be written
    within = np.searchsorted(starts, np.arange(len(entries)), "right")  # the document of each target's input
    back = (np.diff(order) < 0) & (np.diff(within) == 0) & written[1:] & written[:-1]
    return {
        "targets": len(entries),
        "written": int(written.sum()),
        "writes": int(order.max(initial=0)),
        "versions": int(version[written].max(initial=0)) + 1,
        "versions_rise": bool(rises.all()),
        "rows": len(np.unique(row[written & (row > 0)])),
        "documents_in_order": bool((np.diff(first[first > 0]) >= 0).all()),
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
