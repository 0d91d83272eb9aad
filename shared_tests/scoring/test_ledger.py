"""The ledger: written once, honest about what it holds, strict about its file. Budget: 5 s."""

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.scoring.ledger import Ledger, LedgerError, Scored
from shared_tests.support.hostile import contents, plant


def test_write_once_and_nothing_changes_on_refusal() -> None:
    ledger = Ledger(10)
    (first,) = ledger.write(np.array([2, 3, 4]), np.array([0.5, 1.0, 1.5]), 7)
    assert (first.start, first.stop, first.version, first.order) == (2, 5, 7, 1)
    before = ledger.entries.copy()
    refused = [
        ([4, 5], [1.0, 1.0], 0, "already scored"),
        ([5, 5], [1.0, 1.0], 0, "twice"),
        ([0, 1], [1.0, 1.0], 0, "outside"),
        ([9, 10], [1.0, 1.0], 0, "outside"),
        ([5, 6], [1.0, np.nan], 0, "target 6"),
        ([5, 6], [1.0, np.inf], 0, "target 6"),
        ([5, 6], [-0.01, 1.0], 0, "target 5"),
        ([5, 6], [1.0], 0, "equal lists"),
        ([5], [1.0], -1, "version"),
        ([5], [1.0], 2**31, "version"),
    ]
    for positions, nats, version, message in refused:
        with pytest.raises(LedgerError, match=message):
            ledger.write(np.array(positions), np.array(nats), version)
        np.testing.assert_array_equal(ledger.entries, before)
    ranges = ledger.write(np.array([8, 9, 6, 7, 1]), np.array([8.0, 9.0, 6.0, -1e-7, 1.0]), 9)
    assert [(r.start, r.stop, r.version, r.order) for r in ranges] == [(8, 10, 9, 2), (6, 8, 9, 2), (1, 2, 9, 2)]
    np.testing.assert_array_equal(ledger.nats(ranges[0]), [8.0, 9.0])
    assert not ledger.complete() and ledger.write(np.empty(0), np.empty(0), 9) == ()
    with pytest.raises(LedgerError, match="target 5 is not scored"):
        ledger.total()
    ledger.write(np.array([5]), np.array([5.0]), 10)
    assert ledger.complete() and ledger.total() == 0.5 + 1 + 1.5 + 8 + 9 + 6 - 1e-7 + 1 + 5
    assert ledger.total(2, 4) == 1.5
    assert ledger.entries["order"].tolist() == [2, 1, 1, 1, 3, 2, 2, 2, 2]


def test_only_the_ledger_makes_scored() -> None:
    ledger = Ledger(10)
    (real,) = ledger.write(np.arange(1, 4), np.ones(3), 0)
    with pytest.raises(LedgerError, match="by hand"):
        Scored(1, 4, 0, 1)
    with pytest.raises(LedgerError, match="by hand"):
        dataclasses.replace(real, stop=9)
    with pytest.raises(dataclasses.FrozenInstanceError):
        real.stop = 9  # type: ignore[misc]
    forged = copy.copy(real)
    object.__setattr__(forged, "stop", 9)
    for fake, book in ((forged, ledger), (real, Ledger(10)), (copy.deepcopy(real), Ledger(3))):
        with pytest.raises(LedgerError, match="were not scored"):
            book.nats(fake)
    with pytest.raises(ValueError, match="read-only"):
        ledger.entries["nats"][0] = 0


def test_ledger_memory() -> None:
    assert Ledger(1001).entries.nbytes == 20 * 1000
    for tokens in (0, 1, 2**28 + 2):
        with pytest.raises(LedgerError, match="expected from 2"):
            Ledger(tokens)


def filled(path: Path, **changes: Any) -> Ledger:
    """Begin a ledger of 50 tokens at `path`, and write 21 of its targets."""
    ledger = Ledger.open(path, **{"tokens": 50, "key": "weights and text", **changes})
    ledger.write(np.arange(1, 20), np.linspace(0, 3, 19), 4)
    ledger.write(np.array([30, 22, 23]), np.array([1 / 3, 7.0, -1e-7]), 5)
    return ledger


def test_what_is_written_is_on_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = filled(path)
    assert [p.name for p in tmp_path.iterdir()] == ["ledger"]
    np.testing.assert_array_equal(Ledger.read(path).entries, ledger.entries)  # while it is being written
    ledger.close()
    again = Ledger.open(path, 50, "weights and text")
    np.testing.assert_array_equal(again.entries, ledger.entries)
    assert again.writes == 2
    with pytest.raises(LedgerError, match="target 5 was already scored by write 1"):
        again.write(np.array([5]), np.ones(1), 5)
    assert [s.order for s in again.write(np.array([20]), np.ones(1), 5)] == [3]
    rest = np.flatnonzero(again.entries["order"] == 0) + 1
    again.write(rest, np.ones(len(rest)), 6)
    again.close()
    assert Ledger.read(path).complete() and Ledger.read(path).path is None
    gone = Ledger.open(path, 50, "weights and text")
    gone.close(delete=True)
    assert not path.exists()


def test_one_evaluation_and_one_writer_per_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = filled(path)
    with pytest.raises(LedgerError, match="another evaluation is writing"):
        Ledger.open(path, 50, "weights and text")
    ledger.close()
    for tokens, key in ((51, "weights and text"), (50, "other weights")):
        with pytest.raises(LedgerError, match="holds another evaluation"):
            Ledger.open(path, tokens, key)
    Ledger.open(path, 50, "weights and text").close()
    with filled_again(path) as writing, pytest.raises(LedgerError, match="another evaluation is writing"):
        Ledger.open(path, 50, "other weights", anew=True)
    assert writing.writes == 2
    fresh = Ledger.open(path, 50, "other weights", anew=True)
    assert fresh.writes == 0
    fresh.close()


def filled_again(path: Path) -> Any:
    return contextlib.closing(Ledger.open(path, 50, "weights and text"))


def test_a_repeated_pass_must_give_what_is_written(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "ledger")
    nats = np.linspace(0, 3, 19)
    found = ledger.confirm(np.arange(1, 20), nats + 1e-6, 4, 1)
    assert [(s.start, s.stop, s.version, s.order) for s in found] == [(1, 20, 4, 1)]
    np.testing.assert_array_equal(ledger.nats(found[0]), nats)
    refused = (
        (np.arange(1, 20), nats + 2e-3, 4, 1),
        (np.arange(1, 20), nats, 5, 1),
        (np.arange(1, 20), nats, 4, 2),
        (np.arange(2, 21), nats, 4, 1),
    )
    for positions, costs, version, order in refused:
        with pytest.raises(LedgerError, match="cannot go on"):
            ledger.confirm(positions, costs, version, order)
    ledger.close()


def test_a_kill_loses_the_write_that_it_cut(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    filled(path).close()
    good = path.read_bytes()
    first = next(n for n in range(len(good)) if good[n:].startswith(b"SCOR"))
    second = next(n for n in range(first + 1, len(good)) if good[n:].startswith(b"SCOR"))
    for size in range(first, len(good)):
        path.write_bytes(good[:size])
        writes = (size >= second) + 0
        assert Ledger.read(path).writes == writes
        ledger = Ledger.open(path, 50, "weights and text")
        assert ledger.writes == writes
        ledger.close()
        assert path.read_bytes() == good[: (first, second)[writes]], "what was cut short is gone"
    path.write_bytes(good + bytes(100))  # a power cut
    assert Ledger.read(path).writes == 2


def test_damaged_ledger_files(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    filled(path).close()
    good = path.read_bytes()
    for data in (b"", good[:10], b"PK\x03\x04" + good[4:], good.replace(b'"tokens": 50', b'"tokens": ""')):
        path.write_bytes(data)
        with pytest.raises(LedgerError, match="header: not a ledger"):
            Ledger.read(path)
    noise = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        data = bytearray(good)
        for i in noise.integers(0, len(good), 3):
            data[i] ^= 1 << noise.integers(8)
        path.write_bytes(data)
        try:
            found = Ledger.read(path)
        except LedgerError as error:
            refused += str(path) in str(error)
            continue
        assert (found.entries["order"] > 0).sum() in (0, 19, 22), "no write is taken in part"
    assert refused > 400


@pytest.mark.parametrize("kind", ["fifo", "socket", "zeros for ever", "link to a stranger", "link to itself", "sparse"])
def test_whatever_lies_there_is_refused_or_replaced(kind: str, tmp_path: Path) -> None:
    path, strangers = tmp_path / "ledger", tmp_path / "strangers"
    plant(kind, path, strangers)
    theirs = contents(strangers)
    with pytest.raises(LedgerError, match="ledger: .*begin anew"):
        Ledger.open(path, 50, "weights and text")
    with pytest.raises(LedgerError):
        Ledger.read(path)
    with contextlib.closing(Ledger.open(path, 50, "weights and text", anew=True)) as fresh:
        assert fresh.writes == 0
    assert contents(strangers) == theirs and not path.is_symlink()
