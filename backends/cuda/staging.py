"""CUDA: host arrays on their way to a GPU, through pinned buffers in turn, while the GPU computes.

A copy from pinned memory goes on after the call that started it has returned: a buffer must not be written again before
an event says that its copy has ended. MLX shares memory with its GPU.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

SLOTS = 6
"""Buffers: tokens, targets and the places of documents of two micro-batches."""


class Staging:
    """Buffers in turn. `allocate` makes one of so many int32; `copy` starts to copy one to the device and returns the
    copy with an event that has come when the buffer may be written again."""

    def __init__(self, allocate: Callable[[int], Any], copy: Callable[[Any], tuple[Any, Any]]) -> None:
        self._allocate, self._copy = allocate, copy
        self._slots: list[tuple[Any, Any]] = [(None, None)] * SLOTS
        self._next = 0

    def __call__(self, array: np.ndarray) -> Any:
        """Return an int32 array on the device, of the same shape; work started after this call sees it whole."""
        buffer, event = self._slots[self._next]
        if event is not None:
            event.synchronize()
        if buffer is None or len(buffer) < array.size:
            buffer = self._allocate(array.size)
        part = buffer[: array.size]
        part.copy_(torch.from_numpy(np.ascontiguousarray(array, np.int32).reshape(-1)))
        made, event = self._copy(part)
        self._slots[self._next] = buffer, event
        self._next = (self._next + 1) % SLOTS
        return made.view(array.shape)


def to_gpu(device: torch.device) -> Staging:
    """Return a staging whose copies run on a stream of their own; the stream that computes waits for each."""
    stream = torch.cuda.Stream(device)

    def allocate(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, pin_memory=True)

    def copy(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        computing = torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            made = buffer.to(device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        computing.wait_event(event)
        made.record_stream(computing)  # its memory is this stream's: not to be given away while the other one reads it
        return made, event

    return Staging(allocate, copy)
