"""Ranks in PyTorch: torch.distributed, NCCL between GPUs and gloo between CPUs. A translation of the MLX file.

W ranks; R rows and C columns of a matrix.
"""

import datetime
import os

import numpy as np
import torch
import torch.distributed as dist

from core.config import ConfigError
from core.engine.ranks import Alone

PATIENCE = datetime.timedelta(hours=12)
"""How long a collective waits: longer than a slow rank compiles or evaluates. Dead ranks are the heartbeat's matter."""
# CUDA: torch 2.13 renamed both
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """See core.engine.ranks.Ranks for every public method of the host."""

    def __init__(self):
        self.rank, self.world, self.address = dist.get_rank(), dist.get_world_size(), os.environ["MASTER_ADDR"]

    def broadcast(self, value: bytes) -> bytes:
        size = torch.tensor([len(value)])
        dist.broadcast(size, 0)
        data = torch.from_numpy(np.frombuffer(value, np.uint8).copy()) if self.rank == 0 else None
        data = torch.empty(int(size), dtype=torch.uint8) if data is None else data
        if int(size):
            dist.broadcast(data, 0)
        return data.numpy().tobytes()

    def gather(self, value: np.ndarray) -> list[np.ndarray]:
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(counts, torch.tensor([len(value)]))
        most = max(map(int, counts))
        if not most:
            return [value[:0]] * self.world
        mine = np.zeros(most, value.dtype)
        mine[: len(value)] = value
        sent = torch.from_numpy(mine.view(np.uint8))
        parts = [torch.empty_like(sent) for _ in range(self.world)]
        dist.all_gather(parts, sent)
        return [part.numpy().view(value.dtype)[: int(n)] for part, n in zip(parts, counts, strict=True)]

    def close(self) -> None:
        dist.destroy_process_group()

    # On the device.

    def sum(self, tensor):
        """Return the sum over the ranks of a tensor, which is changed."""
        dist.all_reduce(tensor)
        return tensor

    def start_sum(self, tensor):
        """Start the sum over the ranks of a tensor, in place; what is returned has to be waited for."""
        return dist.all_reduce(tensor, async_op=True)

    def start_scatter(self, mine_1RC, stack_WRC):
        """Start to sum a stack over the ranks, of which each gets its own matrix; likewise."""
        return _reduce_scatter(mine_1RC, stack_WRC, async_op=True)

    def share_updates(self, buckets, tensors):
        """Start to bring what each rank updated to all: tensors[name] of every bucket with slots, in place.

        Returns a function that waits for it.
        """
        open_ = []
        for bucket in buckets:
            shape = tensors[bucket.names[0]].shape
            mine, name = tensors[bucket.names[0]].new_zeros(shape), bucket.owned(self.rank)
            if name is not None:
                mine = tensors[name]
            out = mine.new_empty((self.world, *shape))
            open_.append((bucket, out, _all_gather(out, mine.contiguous()[None], async_op=True)))

        def finish():
            for bucket, out, work in open_:
                work.wait()
                for rank, name in enumerate(bucket.slots):
                    if name is not None and rank != self.rank:
                        tensors[name].copy_(out[rank])

        return finish


class OneOf(Alone):
    """Rank 0 of `world` without the others, for timing: it does its share of a step and sends nothing."""

    def __init__(self, world):
        self.world = world

    def sum(self, tensor):
        return tensor

    def start_sum(self, tensor):
        return self

    def start_scatter(self, mine_1RC, stack_WRC):
        mine_1RC.copy_(stack_WRC[:1])
        return self

    def share_updates(self, buckets, tensors):
        return self.wait

    def wait(self):
        """Do nothing: nothing was sent."""


class Reducer:
    """The gradients of one step on their way to the ranks that update with them.

    A bucket's sum starts as soon as all of its gradients are there and the buckets before it have started: the same
    order on every rank, while the backward pass goes on.
    """

    def __init__(self, ranks, buckets, wire=None):
        """`wire`: the type in which gradients are sent and added up, None for their own."""
        self._ranks, self._buckets, self._wire = ranks, buckets, wire
        self._grads = {}
        self._works = []

    def add(self, name, grad):
        """Take the gradient of a parameter, all of this rank's rows together."""
        self._grads[name] = grad
        while len(self._works) < len(self._buckets):
            bucket = self._buckets[len(self._works)]
            if not all(n in self._grads for n in bucket.names):
                return
            self._works.append(self._start(bucket))

    def _start(self, bucket):
        grads = [self._grads[name] for name in bucket.names]
        if not bucket.slots:
            flat = torch.cat([g.reshape(-1) for g in grads]).to(self._wire or grads[0].dtype)
            return flat, self._ranks.start_sum(flat)
        of = dict(zip(bucket.names, grads, strict=True))
        empty = torch.zeros_like(grads[0])
        stack_WRC = torch.stack([empty if name is None else of[name] for name in bucket.slots])
        stack_WRC = stack_WRC.to(self._wire or empty.dtype)
        mine_1RC = torch.empty_like(stack_WRC[:1])
        return mine_1RC, self._ranks.start_scatter(mine_1RC, stack_WRC)

    def finish(self):
        """Wait and return the sums by name: of the matrices that this rank updates, and of all else."""
        sums = {}
        for bucket, (out, work) in zip(self._buckets, self._works, strict=True):
            work.wait()
            out = out.to(self._grads[bucket.names[0]].dtype)
            if bucket.slots:
                name = bucket.owned(self._ranks.rank)
                if name is not None:
                    sums[name] = out[0]
                continue
            sizes = [self._grads[name].numel() for name in bucket.names]
            for name, part in zip(bucket.names, torch.split(out, sizes), strict=True):
                sums[name] = part.view_as(self._grads[name])
        return sums


def join() -> Ranks:
    """Join the ranks that torchrun started, on the GPU of the local rank where there is one for each."""
    if torch.cuda.is_available():
        here, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > there:  # on every rank of the node, so that the first says it
            raise ConfigError(f"{here} ranks on a node of {there} GPUs: use --nproc_per_node={there}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(kind, timeout=PATIENCE)
    return Ranks()
