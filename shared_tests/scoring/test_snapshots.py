"""What an evaluation that was killed finds beside its ledger. Budget: 1 s."""

from pathlib import Path

import numpy as np
import pytest

from core.engine.ranks import Alone
from core.scoring import snapshots
from core.scoring.ledger import Ledger, LedgerError
from core.scoring.snapshots import Snapshot, Snapshots


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    ledger = Ledger.open(tmp_path / "l", 9, "key")
    ledger.write(np.arange(1, 4), np.ones(3), 0)
    return ledger


def learned(size: int) -> Snapshot:
    """Return a snapshot whose array is a view, of which the raw memory is another array's."""
    return Snapshot({"rounds": size}, {"a0": {"embed": np.arange(2.0 * size).reshape(2, size).T}, "loose": {}})


def test_what_was_learned_comes_back(ledger: Ledger) -> None:
    Snapshots(ledger).write(learned(3))
    snapshot = Snapshots(ledger).read(Alone(), "rounds")
    assert snapshot is not None and snapshot.place == {"rounds": 3}
    assert np.array_equal(snapshot.sides["a0"]["embed"], learned(3).sides["a0"]["embed"])
    Snapshots(ledger).remove()
    assert Snapshots(ledger).read(Alone(), "rounds") is None
    ledger.close()


def test_what_no_reader_takes_is_not_written(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The evaluation goes on from the snapshot before."""
    monkeypatch.setattr(snapshots, "MAX_SNAPSHOT", 4096)
    kept = Snapshots(ledger)
    kept.write(learned(3))
    kept.write(learned(4096))
    snapshot = kept.read(Alone(), "rounds")
    assert snapshot is not None and snapshot.place == {"rounds": 3}
    ledger.close()


def test_what_is_damaged_or_of_before_is_not_taken(ledger: Ledger, tmp_path: Path) -> None:
    kept = Snapshots(ledger)
    kept.write(learned(3))
    with pytest.raises(LedgerError, match=r"l\.plugins: damaged .*delete it and .*l to begin anew"):
        kept.read(Alone(), "chunks")
    ledger.close()
    (tmp_path / "l").unlink()
    anew = Ledger.open(tmp_path / "l", 9, "key")
    assert Snapshots(anew).read(Alone(), "rounds") is None and not (tmp_path / "l.plugins").exists()
    anew.close()


def test_without_a_file_nothing_is_kept(tmp_path: Path) -> None:
    kept = Snapshots(Ledger(9))
    kept.write(learned(3))
    assert not kept.due and kept.read(Alone(), "rounds") is None and not list(tmp_path.iterdir())
