"""Too little memory, in one line: what a pass takes, what was asked for, what there is and what to lower."""

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from core.config import ModelConfig
from core.files import read_text

WORDS = re.compile(
    r"out of memory|not enough memory|can't allocate memory|cannot allocate memory|unable to allocate|bad_alloc"
    r"|attempting to allocate|maximum allowed buffer",
    re.I,
)
"""What allocators say: torch's of CPU and CUDA, MLX's of CPU and Metal, C++ and the system."""
ASKED = re.compile(r"(?:allocat|tried to)\D{0,40}?([\d.,]+) ?(bytes|[KMGTPE]iB)", re.I)
CAPACITY = re.compile(r"total capacity of ([\d.]+) ?([KMGTPE]iB)")
CGROUP = "/sys/fs/cgroup/memory.max"


class OutOfMemoryError(ValueError):
    """This machine has too little memory for the settings."""


def is_memory(error: BaseException) -> bool:
    """Return whether an exception of Python, numpy or a framework says that memory ran out."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(WORDS.search(str(error))))


@contextmanager
def enough_memory(model: ModelConfig, rows: int, seq: int, lower: str, training: bool) -> Iterator[None]:
    """Turn an allocator's exception in the block into OutOfMemoryError.

    `rows` windows of `seq` tokens are what goes through the model at once; `lower`: the options that make it less.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        takes = gigabytes(pass_bytes(model, rows, seq, training))
        raise OutOfMemoryError(
            f"{memory_message(error)}; {rows:,} rows of {seq:,} tokens in one pass take {takes} or more by estimate: "
            f"lower {lower}"
        ) from error


def memory_message(error: BaseException) -> str:
    """Return what an allocator's exception says: what was asked for, and what there is."""
    asked, capacity = ASKED.search(str(error)), CAPACITY.search(str(error))
    failed = f": a request of {gigabytes(_bytes(*asked.groups()))} failed" if asked else ""
    place, size = ("GPU", _bytes(*capacity.groups())) if capacity else ("process", machine_bytes())
    return f"not enough memory{failed}, this {place} may have {gigabytes(size)}"


def pass_bytes(model: ModelConfig, rows: int, seq: int, training: bool) -> float:
    """Return about what a pass keeps at least, in float32: logits, their gradient or softmax, and values of layers.

    Training keeps those of all layers for the way back.
    """
    layers = model.layers if training else 1
    return 4.0 * rows * seq * (2 * model.vocab + layers * (8 * model.dim + 3 * model.mlp.hidden))


def machine_bytes() -> float:
    """Return the memory that this process may have: the machine's, less what a limit or a container takes off."""
    limits = [float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")]
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    limits += [float(soft)] if soft != resource.RLIM_INFINITY else []
    with suppress(OSError, ValueError):  # no container, or "max"
        limits.append(float(read_text(CGROUP, 64)))
    return min(limits)


def gigabytes(size: float) -> str:
    """Return bytes as people read them."""
    return f"{size / 1e9:,.3g} GB" if size < 1e12 else f"{size / 1e9:,.0f} GB"


def _bytes(number: str, unit: str) -> float:
    powers = "KMGTPE"
    value = float(number.replace(",", ""))
    return value if unit == "bytes" else value * 1024.0 ** (1 + powers.index(unit[0].upper()))
