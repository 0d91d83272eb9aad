"""The ledger: written once, honest about what it holds, strict about its file. Budget: 5 s."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from core.scoring.ledger import Ledger, LedgerError, Scored


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
    assert Ledger(1001).entries.nbytes == 16 * 1000
    for tokens in (0, 1, 2**28 + 2):
        with pytest.raises(LedgerError, match="expected from 2"):
            Ledger(tokens)


def test_ledger_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.npy"
    ledger = Ledger(50)
    ledger.write(np.arange(1, 20), np.linspace(0, 3, 19), 4)
    ledger.write(np.array([30, 22]), np.array([1 / 3, 7.0]), 5)
    ledger.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["ledger.npy"]
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), ledger.entries)
    loaded = Ledger.load(path)
    np.testing.assert_array_equal(loaded.entries, ledger.entries)
    with pytest.raises(LedgerError, match="already scored by write 2"):
        loaded.write(np.array([22]), np.array([1.0]), 6)
    rest = np.flatnonzero(loaded.entries["order"] == 0) + 1
    assert loaded.write(rest, np.ones(len(rest)), 6)[0].order == 3
    assert loaded.complete()


def test_damaged_ledger_files(tmp_path: Path) -> None:
    path = tmp_path / "ledger.npy"
    ledger = Ledger(20)
    ledger.write(np.arange(1, 12), np.ones(11), 1)
    ledger.save(path)
    good = path.read_bytes()

    def refused(data: bytes, field: str) -> None:
        path.write_bytes(data)
        with pytest.raises(LedgerError, match=f"{path.name}: {field}"):
            Ledger.load(path)

    for data in (b"", good[:100], good[:-1], good + b"x", good + bytes(16), b"PK\x03\x04" + good[4:]):
        refused(data, "header")
    refused(good.replace(b"(19,)", b"(18,)"), "header")
    body = np.frombuffer(good[-19 * 16 :], ledger.entries.dtype)
    damage = (
        ("nats", 3, np.nan),
        ("nats", 3, -1.0),
        ("nats", 18, -1e-9),
        ("order", 3, -1),
        ("version", 3, -2),
    )
    for field, index, value in damage:
        changed = body.copy()
        changed[field][index] = value
        refused(good[: -19 * 16] + changed.tobytes(), f"{field} of target {index + 1}")
    noise = np.random.default_rng(0)
    for _ in range(500):
        data = bytearray(good)
        for i in noise.integers(0, len(good), 3):
            data[i] = noise.integers(256)
        path.write_bytes(data)
        try:
            Ledger.load(path)
        except LedgerError:
            continue
