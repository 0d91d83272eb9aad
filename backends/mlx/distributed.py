"""Ranks in MLX: mx.distributed, Macs that are joined by a ring or by JACCL. A translation of the PyTorch file.

W ranks; R rows and C columns of a matrix.
"""

import mlx.core as mx
import numpy as np

from core.engine.joining import from_mlx_launch
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
        if not buckets:
            return {}
        firsts = [arrays[bucket.names[0]] for bucket in buckets]
        owned = [bucket.owned(self.rank) for bucket in buckets]
        mine = [mx.zeros_like(a) if name is None else arrays[name] for a, name in zip(firsts, owned, strict=True)]
        # MLX: one collective for all: each waits for every rank
        flat_W = mx.distributed.all_gather(mx.concatenate([a.reshape(-1) for a in mine])[None])
        mx.eval(flat_W)
        shared, begin = {}, 0
        for bucket, a in zip(buckets, firsts, strict=True):
            end = begin + a.size
            rows = {name: flat_W[rank, begin:end] for rank, name in enumerate(bucket.slots) if name is not None}
            shared |= {name: row.reshape(a.shape) for name, row in rows.items()}
            begin = end
        return shared


class OneOf(Alone):
    """Rank 0 of `world` without the others, for timing: it does its share of a step and sends nothing."""

    def __init__(self, world):
        self.world = world

    def sum(self, array):
        return array

    def share_updates(self, buckets, arrays):
        return {}


def reduce(ranks, grads, loss, wire=None):
    """Return the sums over the ranks of a step's gradients, by name, and of its loss.

    `wire`: the type in which gradients are sent and added up, None for their own. MLX: a ring has no reduce-scatter:
    the whole sums go to every rank.
    """
    flat = mx.concatenate([grad.reshape(-1) for grad in grads.values()])
    # MLX: one collective for all gradients: each waits for every rank
    if wire is None:
        flat = ranks.sum(mx.concatenate([flat, loss[None]]))
        loss = flat[-1]
    else:
        flat, loss = ranks.sum(flat.astype(wire)).astype(flat.dtype), ranks.sum(loss[None])[0]
    mx.eval(flat)  # MLX: collectives in the same order on every rank, also where a rank needs nothing of one
    mx.eval(loss)
    sums, begin = {}, 0
    for name, grad in grads.items():
        sums[name] = flat[begin : begin + grad.size].reshape(grad.shape)
        begin += grad.size
    return sums, loss


def join() -> Ranks:
    """Join the ranks that mlx.launch started."""
    backend, _, _, address = from_mlx_launch()
    return Ranks(mx.distributed.init(strict=True, backend=backend), address.rpartition(":")[0])
