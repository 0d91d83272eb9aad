"""Ranks in MLX: mx.distributed, a ring of Macs. A translation of the PyTorch file.

W ranks; R rows and C columns of a matrix.
"""

import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np

from core.config import ConfigError
from core.engine.ranks import Alone


class Ranks:
    """See core.engine.ranks.Ranks for every public method of the host."""

    def __init__(self, group, address):
        self.rank, self.world, self.address = group.rank(), group.size(), address

    def broadcast(self, value: bytes) -> bytes:
        mine = np.frombuffer(value, np.uint8) if self.rank == 0 else np.empty(0, np.uint8)
        return self.gather(mine)[0].tobytes()

    def gather(self, value: np.ndarray) -> list[np.ndarray]:
        counts = self._gathered(np.array([len(value)], np.int32))
        most = int(counts.max())
        if not most:
            return [value[:0]] * self.world
        mine = np.zeros(most, value.dtype)
        mine[: len(value)] = value
        parts = self._gathered(mine.view(np.uint8)).reshape(self.world, -1)
        return [part.view(value.dtype)[:n] for part, n in zip(parts, counts.tolist(), strict=True)]

    def close(self) -> None:
        mx.eval(self.sum(mx.zeros(1)))  # MLX: a ring has no goodbye; nobody leaves before the last has come

    def _gathered(self, row):
        with mx.stream(mx.cpu):
            return np.array(mx.distributed.all_gather(mx.array(row)))

    # On the device.

    def sum(self, array):
        """Return the sum over the ranks of an array."""
        return mx.distributed.all_sum(array)

    def share_updates(self, buckets, arrays):
        """Return what each rank updated, on all ranks: arrays[name] of every bucket with slots, by name."""
        shared = {}
        for bucket in buckets:
            name = bucket.owned(self.rank)
            mine = mx.zeros_like(arrays[bucket.names[0]]) if name is None else arrays[name]
            out_WRC = mx.distributed.all_gather(mine[None])
            mx.eval(out_WRC)  # MLX: collectives in the same order on every rank, also where a rank needs nothing of one
            shared |= {name: out_WRC[rank] for rank, name in enumerate(bucket.slots) if name is not None}
        return shared


class OneOf(Alone):
    """Rank 0 of `world` without the others, for timing: it does its share of a step and sends nothing."""

    def __init__(self, world):
        self.world = world

    def sum(self, array):
        return array

    def share_updates(self, buckets, arrays):
        return {}


def reduce(ranks, grads):
    """Return the sums of gradients over the ranks, by name: all in one message.

    MLX: a ring has no reduce-scatter: the whole sum goes to every rank.
    """
    flat = ranks.sum(mx.concatenate([grad.reshape(-1) for grad in grads.values()]))
    mx.eval(flat)  # MLX: collectives in the same order on every rank, also where a rank needs nothing of one
    sums, begin = {}, 0
    for name, grad in grads.items():
        sums[name] = flat[begin : begin + grad.size].reshape(grad.shape)
        begin += grad.size
    return sums


def join() -> Ranks:
    """Join the ranks that mlx.launch started."""
    file = os.environ.get("MLX_HOSTFILE")
    try:
        hosts = json.loads(Path(file).read_text()) if file else None
        address = str(hosts[0][0]).rpartition(":")[0] if hosts else ""
        group = mx.distributed.init(strict=True, backend="ring") if address else None
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise ConfigError(f"MLX_HOSTFILE={file}: no ring can be made of it ({error}): use mlx.launch") from error
    if group is None:
        raise ConfigError("MLX_RANK is set but MLX_HOSTFILE is not: start the ranks with mlx.launch --backend ring")
    return Ranks(group, address)
