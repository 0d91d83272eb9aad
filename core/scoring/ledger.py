"""The ledger: what every target cost, written once, before anything may learn from it (spec/challenge.md D)."""

from dataclasses import InitVar, dataclass
from pathlib import Path

import numpy as np

from core.files import replace_file

ENTRY = np.dtype([("nats", "<f8"), ("version", "<i4"), ("order", "<i4")])
"""One target: -log p in nats, version of the weights that scored it, number of the write (from 1; 0: not written)."""
MAX_TARGETS = 2**28
ROUNDING = 1e-4
"""How far below 0 the rounding of a log-softmax may push nats."""
HEADER_BYTES = 192
_LEDGER = object()


class LedgerError(ValueError):
    """A rule of the ledger was broken, or its file is damaged."""


@dataclass(frozen=True)
class Scored:
    """Target positions [start, stop) that are in a ledger: the only thing that learning from evaluation text may take.

    Only `Ledger.write` makes one; `Ledger.nats` refuses one that does not match what was written.
    """

    start: int
    stop: int
    version: int
    """Version of the weights that scored them."""
    order: int
    """Number of the write, from 1."""
    made_by: InitVar[object] = None

    def __post_init__(self, made_by: object) -> None:
        if made_by is not _LEDGER:
            raise LedgerError("Scored cannot be made by hand: score the targets and take what Ledger.write returns")


class Ledger:
    """A write-once entry for each of the tokens - 1 targets of a stream (positions 1 .. tokens - 1), 16 bytes each."""

    def __init__(self, tokens: int) -> None:
        if not 2 <= tokens <= MAX_TARGETS + 1:
            raise LedgerError(f"a ledger for {tokens} tokens: expected from 2 to {MAX_TARGETS + 1}")
        self._entries = np.zeros(tokens - 1, ENTRY)
        self._written = 0
        self._writes = 0

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

    def write(self, positions: np.ndarray, nats: np.ndarray, version: int) -> tuple[Scored, ...]:
        """Enter `nats` of distinct target `positions`, both (count,), and return them as ranges in the order given.

        LedgerError, with nothing changed, if a position is outside the stream, given twice or already written, or if
        its nats are not finite or negative beyond rounding.
        """
        positions, nats = np.asarray(positions, np.int64), np.asarray(nats, np.float64)
        self._check(positions, nats, version)
        if not len(positions):
            return ()
        block = np.empty(len(positions), ENTRY)
        block["nats"], block["version"], block["order"] = nats, version, self._writes + 1
        self._entries[positions - 1] = block  # one assignment, so that an interrupt leaves no half-written entry
        self._writes += 1
        self._written += len(positions)
        cuts = np.flatnonzero(np.diff(positions) != 1)
        starts, stops = positions[np.append(0, cuts + 1)], positions[np.append(cuts, -1)] + 1
        return tuple(
            Scored(start, stop, version, self._writes, _LEDGER)
            for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
        )

    def _check(self, positions: np.ndarray, nats: np.ndarray, version: int) -> None:
        if positions.ndim != 1 or positions.shape != nats.shape:
            raise LedgerError(f"positions {positions.shape} and nats {nats.shape}: expected two equal lists")
        if not 0 <= version < 2**31:
            raise LedgerError(f"weights version {version}: expected from 0 to 2^31 - 1")
        outside = positions[(positions < 1) | (positions >= self.tokens)]
        if len(outside):
            raise LedgerError(f"target {outside[0]} is outside the stream: expected from 1 to {self.tokens - 1}")
        if len(np.unique(positions)) != len(positions):
            raise LedgerError("a target occurs twice in one write: each is scored once")
        again = positions[self.written(positions)]
        if len(again):
            entry = self._entries[again[0] - 1]
            raise LedgerError(f"target {again[0]} was already scored by write {entry['order']}: each is scored once")
        bad = np.flatnonzero(~(np.isfinite(nats) & (nats >= -ROUNDING)))
        if len(bad):
            raise LedgerError(f"target {positions[bad[0]]} got {nats[bad[0]]} nats: expected a finite number from 0 up")

    def written(self, positions: np.ndarray) -> np.ndarray:
        """Return for each target position whether it is written, (count,) bool."""
        return self._entries["order"][np.asarray(positions, np.int64) - 1] > 0

    def nats(self, scored: Scored) -> np.ndarray:
        """Return the nats of a range, float64; LedgerError if this ledger holds no such range."""
        entries = self._entries[scored.start - 1 : scored.stop - 1] if scored.start >= 1 else self._entries[:0]
        same = (entries["order"] == scored.order) & (entries["version"] == scored.version)
        if scored.order < 1 or len(entries) != scored.stop - scored.start or not same.all():
            raise LedgerError(f"targets {scored.start} to {scored.stop - 1} were not scored so in this ledger")
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
            raise LedgerError(f"target {start + int(np.argmin(entries['order'] > 0))} is not scored: no total yet")
        return float(np.sum(entries["nats"]))

    def save(self, path: str | Path) -> None:
        """Write the entries as one .npy file, replacing `path` at once."""
        replace_file(path, _header(len(self._entries)), self._entries.data)

    @classmethod
    def load(cls, path: str | Path) -> "Ledger":
        """Read what `save` wrote, ready for further writes; LedgerError names the file and what is wrong with it."""
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
            count, rest = divmod(file.seek(0, 2) - HEADER_BYTES, ENTRY.itemsize)
            if rest or not 1 <= count <= MAX_TARGETS or head != _header(count):
                raise LedgerError(f"{path}: header: not a ledger, or cut short")
            file.seek(HEADER_BYTES)
            entries = np.fromfile(file, ENTRY, count)
        order, version, nats = entries["order"], entries["version"], entries["nats"]
        lowest = np.where(order > 0, -ROUNDING, 0.0)
        valid = {"order": order >= 0, "version": version >= 0, "nats": np.isfinite(nats)}
        with np.errstate(invalid="ignore"):  # comparing a signalling NaN warns
            valid["nats"] &= nats >= lowest
        for name, good in valid.items():
            if not good.all():
                raise LedgerError(f"{path}: {name} of target {np.argmin(good) + 1} is damaged")
        ledger = cls(2)
        ledger._entries = entries
        ledger._written = int(np.count_nonzero(order))
        ledger._writes = int(order.max())
        return ledger


def _header(count: int) -> bytes:
    """Return the .npy header of `count` entries, always HEADER_BYTES long: `load` compares it and parses nothing."""
    text = f"{{'descr': {ENTRY.descr}, 'fortran_order': False, 'shape': ({count},), }}"
    size = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + text.encode().ljust(size - 1) + b"\n"
