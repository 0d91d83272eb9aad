"""The ledger: what every target cost, written once, before anything may learn from it (docs/challenge.md, D9)."""

from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass
from pathlib import Path

import numpy as np

from core.scoring.journal import MAX_TARGETS, InUseError, Journal, cuts
from core.scoring.journal import LedgerError as LedgerError

ENTRY = np.dtype([("nats", "<f8"), ("version", "<i4"), ("order", "<i4"), ("row", "<i4")])
"""One target: -log p in nats, version of what scored it, number of the write (from 1; 0: not written), row whose
adapters had a part in it (from 1; 0: none, the version is that of the weights)."""
ROUNDING = 1e-4
"""How far below 0 the rounding of a log-softmax may push nats."""
REPEATABLE = 1e-3
"""How far a repeated forward pass may be from what is written, in nats: other rounding, not other weights."""
_LEDGER = object()


@dataclass(frozen=True)
class Scored:
    """Target positions [start, stop) that are in a ledger: the only thing that learning from evaluation text may take.

    Only a ledger makes one; `Ledger.nats` refuses one that does not match what was written.
    """

    start: int
    stop: int
    version: int
    """Version of the weights, or of the row's adapters, that scored them."""
    order: int
    """Number of the write, from 1."""
    row: int = 0
    """Row whose adapters scored them, from 1; 0: the weights alone."""
    made_by: InitVar[object] = None

    def __post_init__(self, made_by: object) -> None:
        if made_by is not _LEDGER:
            raise LedgerError("Scored cannot be made by hand: score the targets and take what comes back", "D9")


class Ledger:
    """A write-once entry for each of the tokens - 1 targets of a stream (positions 1 .. tokens - 1), 20 bytes each.

    One that was opened on a file appends every write to it, so that a killed evaluation goes on where it was.
    """

    def __init__(self, tokens: int, journal: Journal | None = None) -> None:
        if not 2 <= tokens <= MAX_TARGETS + 1:
            raise LedgerError(f"a ledger for {tokens} tokens: expected from 2 to {MAX_TARGETS + 1}")
        self._entries = np.zeros(tokens - 1, ENTRY)
        self._written = 0
        self._writes = 0
        self._present: dict[int, int] = {}
        self._journal: Journal | None = None
        for record in journal.records() if journal else ():
            try:
                self.write(*record)
            except LedgerError as error:
                raise LedgerError(f"{journal and journal.path}: {error}", error.rule) from error
        self._journal = journal

    @classmethod
    def open(cls, path: str | Path, tokens: int, key: str, anew: bool = False) -> "Ledger":
        """Open the ledger at `path`, or begin one; LedgerError if it is damaged, in use, or of another evaluation.

        `key` names the evaluation: text, weights and everything else that decides its numbers. With `anew` a file that
        is damaged or of another evaluation is replaced.
        """
        try:
            return cls._continued(path, tokens, key)
        except LedgerError as error:
            if not anew or isinstance(error, InUseError):
                raise
        Path(path).unlink()
        return cls._continued(path, tokens, key)

    @classmethod
    def _continued(cls, path: str | Path, tokens: int, key: str) -> "Ledger":
        journal = Journal.open(path, tokens, key)
        try:
            return cls(tokens, journal)
        except BaseException:
            journal.close()
            raise

    @classmethod
    def read(cls, path: str | Path) -> "Ledger":
        """Read the ledger at `path` without continuing it."""
        with Journal.read(path) as journal:
            ledger = cls(journal.tokens, journal)
            ledger._journal = None
        return ledger

    @property
    def path(self) -> Path | None:
        """The file that it is written to."""
        return self._journal.path if self._journal else None

    @property
    def writes(self) -> int:
        """How many writes it holds."""
        return self._writes

    @property
    def tokens(self) -> int:
        """Length of the stream; the targets are the positions 1 .. tokens - 1."""
        return len(self._entries) + 1

    @property
    def entries(self) -> np.ndarray:
        """Read-only view (targets,) of ENTRY; the entry of position p is entries[p - 1]."""
        view = self._entries.view()
        view.flags.writeable = False
        return view

    def write(
        self, positions: np.ndarray, nats: np.ndarray, version: int | np.ndarray, row: int | np.ndarray = 0
    ) -> tuple[Scored, ...]:
        """Enter `nats` of distinct target `positions`, both (count,), and return them as ranges in the order given.

        `version` and `row` say what scored them: one number, or one for each target. LedgerError, with nothing changed,
        if a position is outside the stream, given twice or already written, or if its nats are not finite or negative
        beyond rounding.
        """
        positions, nats = np.asarray(positions, np.int64), np.asarray(nats, np.float64)
        version, row = self._check(positions, nats, version, row)
        again = positions[self.written(positions)]
        if len(again):
            order = self._entries[again[0] - 1]["order"]
            raise LedgerError(f"target {again[0]} was already scored by write {order}: each is scored once", "D10")
        if not len(positions):
            return ()
        if self._journal:
            self._journal.append(positions, nats, version, row)
        block = np.empty(len(positions), ENTRY)
        block["nats"], block["version"], block["order"], block["row"] = nats, version, self._writes + 1, row
        self._entries[positions - 1] = block  # one assignment, so that an interrupt leaves no half-written entry
        self._writes += 1
        self._written += len(positions)
        return tuple(_scored(positions, block))

    def confirm(
        self,
        positions: np.ndarray,
        nats: np.ndarray,
        version: int | np.ndarray,
        order: int | None = None,
        row: int | np.ndarray = 0,
    ) -> tuple[Scored, ...]:
        """Return what writing these targets returned, for an evaluation that goes on and repeats a forward pass.

        What is written stays. `order`: the number of the write; None: whichever, as another number of ranks writes in
        another order. LedgerError if it is not these targets, or if the numbers differ by more than rounding.
        """
        positions, nats = np.asarray(positions, np.int64), np.asarray(nats, np.float64)
        version, row = self._check(positions, nats, version, row)
        entries = self._entries[positions - 1]
        same = (entries["order"] > 0) & (entries["order"] == (entries["order"] if order is None else order))
        same &= (entries["version"] == version) & (entries["row"] == row)
        far = np.abs(entries["nats"] - nats) > REPEATABLE
        if not same.all() or far.any():
            where = int(np.argmax(~same | far))
            there = entries[where]
            what = f"write {order}" if order is not None else f"it in row {row[where]}"
            raise LedgerError(
                f"target {positions[where]}: repeating {what} gives {nats[where]:.6f} nats with weights "
                f"{version[where]}, write {there['order']} with weights {there['version']} gave {there['nats']:.6f}: "
                f"this evaluation cannot go on; delete {self.path} to begin anew"
            )
        return tuple(_scored(positions, entries)) if len(positions) else ()

    def _check(
        self, positions: np.ndarray, nats: np.ndarray, version: int | np.ndarray, row: int | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return version and row of every target; LedgerError for what cannot be entered."""
        if positions.ndim != 1 or positions.shape != nats.shape:
            raise LedgerError(f"positions {positions.shape} and nats {nats.shape}: expected two equal lists")
        for what, value in (("weights version", np.asarray(version)), ("row", np.asarray(row))):
            if value.size and not 0 <= value.min() <= value.max() < 2**31:
                raise LedgerError(f"{what} {value.min()} to {value.max()}: expected from 0 to 2^31 - 1")
        outside = positions[(positions < 1) | (positions >= self.tokens)]
        if len(outside):
            raise LedgerError(f"target {outside[0]} is outside the stream: expected from 1 to {self.tokens - 1}", "D5")
        if len(np.unique(positions)) != len(positions):
            raise LedgerError("a target occurs twice in one write: each is scored once", "D5")
        bad = np.flatnonzero(~(np.isfinite(nats) & (nats >= -ROUNDING)))
        if len(bad):
            raise LedgerError(
                f"target {positions[bad[0]]} got {nats[bad[0]]} nats: expected a finite number from 0 up", "D8"
            )
        shape = positions.shape
        return np.broadcast_to(np.asarray(version, np.int64), shape), np.broadcast_to(np.asarray(row, np.int64), shape)

    def advance(self, scored: Sequence[Scored], row: int) -> int:
        """Count an update of the adapters of `row` from these ranges, and return the version that they have then.

        LedgerError unless this ledger holds the ranges, and the adapters as they are now scored all of them. So what is
        not entered yet, what another row scored, and what an earlier version scored teaches nothing.
        """
        present = self._present.get(row, 0)
        for one in scored:
            self.nats(one)
            if (one.row, one.version) != (row, present):
                raise LedgerError(
                    f"adapters of row {row} at version {present} are to learn from targets {one.start} to "
                    f"{one.stop - 1}, which row {one.row} scored at version {one.version}",
                    "D9",
                )
        if not scored or row < 1:
            raise LedgerError(f"adapters of row {row} are to learn from nothing that was scored", "D9")
        self._present[row] = present + 1
        return present + 1

    def written(self, positions: np.ndarray) -> np.ndarray:
        """Return for each target position whether it is written, (count,) bool."""
        return self._entries["order"][np.asarray(positions, np.int64) - 1] > 0

    def scored(self, positions: np.ndarray) -> tuple[Scored, ...]:
        """Return written targets, (count,) distinct positions, as ranges in the order given; LedgerError if one is not.

        For what learns from more than one write, or from what another rank scored.
        """
        positions = np.asarray(positions, np.int64)
        missing = positions[~self.written(positions)]
        if len(missing):
            raise LedgerError(f"target {missing[0]} is not scored: nothing may learn from it", "D9")
        return tuple(_scored(positions, self._entries[positions - 1])) if len(positions) else ()

    def nats(self, scored: Scored) -> np.ndarray:
        """Return the nats of a range, float64; LedgerError if this ledger holds no such range."""
        entries = self._entries[scored.start - 1 : scored.stop - 1] if scored.start >= 1 else self._entries[:0]
        same = (entries["order"] == scored.order) & (entries["version"] == scored.version)
        same &= entries["row"] == scored.row
        if scored.order < 1 or len(entries) != scored.stop - scored.start or not same.all():
            raise LedgerError(f"targets {scored.start} to {scored.stop - 1} were not scored so in this ledger", "D9")
        return entries["nats"].copy()

    def complete(self) -> bool:
        """Return whether every target is written."""
        return self._written == len(self._entries)

    def total(self, start: int = 1, stop: int | None = None) -> float:
        """Return the sum (pairwise, float64) of the nats of positions [start, stop); None: to the end.

        LedgerError if one of them is not written.
        """
        entries = self._entries[start - 1 : self.tokens - 1 if stop is None else stop - 1]
        if not entries["order"].all():
            missing = start + int(np.argmin(entries["order"] > 0))
            raise LedgerError(f"target {missing} is not scored: no total yet", "D5")
        return float(np.sum(entries["nats"]))

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        if self._journal:
            self._journal.sync()

    def close(self, delete: bool = False) -> None:
        """Leave the file, or delete it if its numbers are no longer needed."""
        if self._journal:
            path = self._journal.path
            self._journal.close()
            self._journal = None
            if delete:
                path.unlink(missing_ok=True)


def _scored(positions: np.ndarray, entries: np.ndarray) -> Iterator[Scored]:
    """Yield the ranges of consecutive positions that one write entered for one row at one version."""
    first, last = cuts(positions, entries["version"], entries["order"], entries["row"])
    starts, stops = positions[first].tolist(), (positions[last] + 1).tolist()
    marks = (entries[name][first].tolist() for name in ("version", "order", "row"))
    for start, stop, version, order, row in zip(starts, stops, *marks, strict=True):
        yield Scored(start, stop, version, order, row, _LEDGER)
