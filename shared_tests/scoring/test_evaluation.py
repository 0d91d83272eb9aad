"""Which documents lie in which rows: a function of the evaluation, shared by ranks and ledger. Budget: 2 s."""

from typing import Any

import numpy as np
import pytest

from core.config import EvalConfig
from core.scoring.evaluation import Evaluation
from core.scoring.ledger import Ledger
from core.scoring.windows import Windows
from shared_tests.support.known_scores import make_dataset
from shared_tests.support.plugin_examples import LENGTHS

CUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sliding": {"windows": "sliding", "stride": 5},
    "documents": {"windows": "documents", "stride": 3},
    "stateful": {"windows": "stateful"},
}


def targets(rows: Windows) -> list[int]:
    """Return the positions that rows score, in their order."""
    return [p for s, n, f in zip(*rows, strict=True) for p in range(int(s + f) + 1, int(s + n) + 1)]


def evaluation(cut: str, documents: int | None = None, isolated: bool = True) -> Evaluation:
    split = make_dataset(LENGTHS).val
    return Evaluation(split, EvalConfig(**{"seq": 16, "batch": 4, **CUTS[cut]}), documents, isolated)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("documents", [None, 4])
@pytest.mark.parametrize("isolated", [True, False])
def test_rows_score_every_target_of_the_ranges_once(cut: str, documents: int | None, isolated: bool) -> None:
    plan = evaluation(cut, documents, isolated)
    wanted = [p for a, b in zip(*plan.ranges(), strict=True) for p in range(int(a) + 1, int(b) + 1)]
    rows = plan.rows()
    assert sorted(targets(rows)) == sorted(wanted) and len(wanted) == len(set(wanted))
    assert plan.carries or rows.length.max() <= 16
    if cut == "stateful":
        assert (np.diff(rows.length) <= 0).all(), "streams of like length go side by side"
        assert len(rows.start) == (1 if documents is None and not isolated else np.count_nonzero(rows.length))


@pytest.mark.parametrize("cut", CUTS)
def test_turns_leave_out_what_a_ledger_holds_and_keep_the_order(cut: str) -> None:
    plan = evaluation(cut)
    rows, ledger = plan.rows(), Ledger(len(plan.split))
    whole = plan.turns(rows, 4, ledger)
    assert [len(turn.start) for turn in whole[:-1]] == [4] * (len(whole) - 1)
    assert [p for turn in whole for p in targets(turn)] == targets(rows)
    done = np.array(targets(whole[0]))
    ledger.write(done, np.ones(len(done)), 0)
    rest = plan.turns(rows, 4, ledger)
    assert [targets(turn) for turn in rest] == [targets(turn) for turn in whole[1:]]
    assert [targets(turn) for turn in plan.turns(rows, 4, None)] == [targets(turn) for turn in whole]
    half = np.array(targets(whole[1].take(slice(0, 1))))[:1]
    if len(targets(whole[1].take(slice(0, 1)))) > 1:  # a row that was cut short by a kill is scored again
        ledger.write(half, np.ones(1), 0)
        assert [targets(turn) for turn in plan.turns(rows, 4, ledger)] == [targets(turn) for turn in rest]
