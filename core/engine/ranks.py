"""Ranks: one process per device, and what they tell each other on the host. Rank 0 decides and writes.

What ranks exchange on their devices (gradients, updated matrices) is each backend's own: backends/*/distributed.py.
"""

import hashlib
import importlib
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors.numpy

from core.config import ConfigError, RunConfig
from core.engine.scaffolding import trained_table

VARIABLES = {"cuda": ("RANK", "torchrun"), "mlx": ("MLX_RANK", "mlx.launch")}
"""What a launcher sets in each process's environment, and its name."""
BUCKET = 1 << 20
"""Elements of gradients that are summed over the ranks together, about."""

Arrays = dict[str, np.ndarray]


class Stopped(KeyboardInterrupt):
    """All ranks stop, after the same step, because one of them was asked to."""


class Ranks(Protocol):
    """The processes of one run. Every method is called by all of them, in the same order."""

    rank: int
    """This one, from 0."""
    world: int
    """How many there are."""
    address: str
    """Host name of rank 0, as the others reach it."""

    def broadcast(self, value: bytes) -> bytes:
        """Return rank 0's value."""
        ...

    def gather(self, value: np.ndarray) -> list[np.ndarray]:
        """Return every rank's row of numbers, (count,) of one type, of any count."""
        ...

    def close(self) -> None:
        """Leave: no collective comes after it."""
        ...


class Alone:
    """One process."""

    rank, world, address = 0, 1, "localhost"

    def broadcast(self, value: bytes) -> bytes:
        """Return the value."""
        return value

    def gather(self, value: np.ndarray) -> list[np.ndarray]:
        """Return the row."""
        return [value]

    def close(self) -> None:
        """Do nothing."""


def launched() -> tuple[str, int] | None:
    """Return (backend of the launcher that started this process, rank), or None if none did."""
    for backend, (variable, _) in VARIABLES.items():
        value = os.environ.get(variable)
        if (
            value is not None
            and value.isdecimal()
            and len(value) < 10
            and (backend != "cuda" or "WORLD_SIZE" in os.environ)
        ):
            return backend, int(value)
    return None


def join(backend: str) -> Ranks:
    """Return the ranks that a launcher started, or Alone.

    ConfigError if it is another backend's launcher, or has set numbers that cannot be.
    """
    from core.engine import joining

    launch = launched() or joining.unnumbered()
    if launch is None:
        return Alone()
    if launch[0] != backend:
        mine, theirs = VARIABLES[backend][1], VARIABLES[launch[0]][1]
        raise ConfigError(
            f"started by {theirs}, which goes with --backend {launch[0]}, but the backend is {backend}: add "
            f"--backend {launch[0]}, or start it with {mine}"
        )
    words = joining.check_numbers(backend)
    if backend == "mlx":  # before anything imports MLX
        importlib.import_module("backends.mlx.blas").load_fast_blas()
    module = importlib.import_module(f"backends.{backend}.distributed")
    with joining.watched(words):
        return module.join()


def agree(ranks: Ranks, value: Any) -> Any:
    """Return rank 0's value, which JSON can hold."""
    if ranks.world == 1:
        return value
    return json.loads(ranks.broadcast(json.dumps(value).encode() if ranks.rank == 0 else b""))


def share_arrays(ranks: Ranks, arrays: Arrays | None) -> Arrays:
    """Return rank 0's arrays by name; the others may give None."""
    if ranks.world == 1:
        assert arrays is not None
        return arrays
    # safetensors stores the memory that a view begins at, not what the view shows.
    whole = {name: np.asarray(array, order="C") for name, array in (arrays or {}).items()}
    packed = ranks.broadcast(safetensors.numpy.save(whole) if ranks.rank == 0 else b"")
    return safetensors.numpy.load(packed)


def only_rank_0(ranks: Ranks, act: Callable[[], Any]) -> Any:
    """Let rank 0 do something and return what it returned, which JSON can hold, on every rank."""
    return agree(ranks, act() if ranks.rank == 0 else None)


def check_same(
    ranks: Ranks, what: dict[str, str], cure: str = "start every rank with the same command, code and data"
) -> None:
    """Raise ConfigError, on every rank, unless all ranks have the same values; it names the first that differs."""
    for name, value in what.items():
        digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
        all_ = ranks.gather(digest)
        for rank, other in enumerate(all_):
            if not np.array_equal(other, all_[0]):
                raise ConfigError(f"rank {rank} has another {name} than rank 0: {cure}")


def share(count: int, ranks: Ranks) -> slice:
    """Return this rank's part of `count` rows; the parts differ by one row at most."""
    return slice(count * ranks.rank // ranks.world, count * (ranks.rank + 1) // ranks.world)


class Bucket(NamedTuple):
    """Gradients that are summed over the ranks together."""

    names: tuple[str, ...]
    slots: tuple[str | None, ...] = ()
    """Muon's matrices of one shape: slots[r] is the one that rank r updates. Empty: every rank updates all of them."""

    def owned(self, rank: int) -> str | None:
        """Return the name that `rank` updates alone, if there is one."""
        return self.slots[rank] if self.slots else None


def buckets(config: RunConfig, world: int) -> list[Bucket]:
    """Return the buckets of all parameters, in about the order in which a backward pass finishes their gradients.

    Muon's matrices go in groups of `world` of one shape and storage, neighbours in depth, so that their sums can start
    while the backward pass still runs; what is left of a shape goes to the ranks that have least to do.
    """
    table, muon = trained_table(config.model, config.train), config.train.matrix_rule == "muon"
    load, parts = [0.0] * world, []
    rest: list[str] = []
    open_groups: dict[tuple[tuple[int, ...], str, bool, float | None, int], list[str]] = {}
    for name, row in reversed(table.items()):
        if muon and row.group == "matrix":
            kind = row.shape, row.storage, row.scaffold, row.deviation, row.slices
            group = open_groups.setdefault(kind, [])
            group.append(name)
            if len(group) == world:
                parts.append(Bucket(tuple(group), tuple(group)))
                open_groups[kind] = []
            continue
        rest.append(name)
        if sum(int(np.prod(table[n].shape)) for n in rest) >= BUCKET:
            parts.append(Bucket(tuple(rest)))
            rest = []
    for (shape, *_), group in open_groups.items():
        slots: list[str | None] = [None] * world
        for name in group:
            least = min((r for r in range(world) if slots[r] is None), key=lambda r: load[r])
            slots[least] = name
            load[least] += float(np.prod(shape)) * min(shape)
        if group:
            parts.append(Bucket(tuple(group), tuple(slots)))
    return [*parts, Bucket(tuple(rest))] if rest else parts


def owners(parts: list[Bucket]) -> dict[str, int]:
    """Return the rank that alone updates a matrix, by name."""
    return {name: rank for bucket in parts for rank, name in enumerate(bucket.slots) if name is not None}


def updated_by(parts: list[Bucket], rank: int) -> list[list[str]]:
    """Return the names that `rank` updates: Muon's matrices that it alone updates, then what every rank does."""
    alone = [name for bucket in parts if (name := bucket.owned(rank)) is not None]
    return [alone, [name for bucket in parts if not bucket.slots for name in bucket.names]]
