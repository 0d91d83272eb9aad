"""What an evaluation that was killed needs beside its ledger: copies of what had learned, in one file, now and then."""

import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.engine.protocol import Arrays
from core.engine.ranks import Ranks, agree, share_arrays
from core.files import parse_json, sweep
from core.formats.tensors import read_tensors, write_tensors
from core.scoring.ledger import Ledger, LedgerError

SNAPSHOT_EVERY = 30.0
"""Seconds between two copies."""
MAX_SNAPSHOT = 8 << 30
"""Bytes of a copy at most; what is larger is not copied, so that an evaluation goes on from an earlier copy."""


class Snapshot(NamedTuple):
    """What a file of copies holds."""

    place: dict[str, int]
    """Where the evaluation was, in whole numbers from 0 up."""
    sides: dict[str, Arrays]
    """What each that learns had learned, by its name."""


class Snapshots:
    """The file LEDGER.plugins: its writer is the ledger's. Without a file of the ledger, nothing is kept."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self._saved = ledger, time.monotonic()
        self.path = None if ledger.path is None else Path(f"{ledger.path}.plugins")
        if self.path is not None:  # the ledger is ours alone, and so is what lies beside it
            sweep(self.path.parent, f"{self.path.name}.")

    @property
    def due(self) -> bool:
        """Whether it is time for another copy."""
        return self.path is not None and time.monotonic() - self._saved > SNAPSHOT_EVERY

    def write(self, copy: Snapshot) -> None:
        """Replace the copy; the ledger is on the disk first, so that it is never behind."""
        arrays = {f"{side}/{name}": array for side, part in copy.sides.items() for name, array in part.items()}
        self._saved = time.monotonic()
        if self.path is not None and sum(array.nbytes for array in arrays.values()) <= MAX_SNAPSHOT:
            self._ledger.sync()
            write_tensors(self.path, arrays, {"skc": json.dumps(copy.place)})

    def read(self, ranks: Ranks, *names: str) -> Snapshot | None:
        """Return rank 0's copy, whose place has these names, on every rank; None if there is none.

        LedgerError, on rank 0, if it is damaged.
        """
        copy = self._read(names) if ranks.rank == 0 else None
        place = agree(ranks, copy and copy.place)
        if place is None:
            return None
        arrays = copy and {f"{side}/{name}": array for side, part in copy.sides.items() for name, array in part.items()}
        return Snapshot(place, _by_side(share_arrays(ranks, arrays)))

    def refused(self, why: str) -> LedgerError:
        """Return the error of a copy that nothing can be done with."""
        return LedgerError(f"{self.path}: {why}; delete it and {self._ledger.path} to begin anew")

    def remove(self) -> None:
        """Delete the copy: what it is of has ended."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, names: tuple[str, ...]) -> Snapshot | None:
        if self.path is None or not self.path.exists():
            return None
        if not self._ledger.writes:  # what an earlier evaluation of this name left
            self.path.unlink()
            return None
        try:
            metadata, arrays = read_tensors(self.path, MAX_SNAPSHOT)
            values = parse_json("skc", str(metadata["skc"]))
            place = {name: values[name] for name in names}
            if not all(type(value) is int and value >= 0 for value in place.values()):
                raise ValueError(f"{place}: expected whole numbers from 0 up")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self.refused(f"damaged ({error})") from error
        return Snapshot(place, _by_side(arrays))


def _by_side(arrays: Arrays) -> dict[str, Arrays]:
    sides: dict[str, Arrays] = {}
    for name, array in arrays.items():
        side, _, field = name.partition("/")
        sides.setdefault(side, {})[field] = np.asarray(array)
    return sides
