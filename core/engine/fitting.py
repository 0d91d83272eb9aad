"""How many rows of a micro-batch a device's memory holds: an estimate from the settings, before anything is allocated.

The loss of a step does not depend on it beyond rounding. Counted in numbers that the backward pass needs again, per
token: what eager PyTorch keeps of the presets in float32 (a test holds the estimate to it).
"""

import os

import numpy as np

from core.config import ModelConfig, RunConfig
from core.engine.ranks import Ranks
from core.engine.scaffolding import scaffolding
from core.model.params import count

KEPT = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.2, "float16": 2.2}
"""Bytes of such a number: in 16 bits some are float32."""
PEAK = 1.25
"""Memory at its fullest over what is kept: gradients on their way, and what an op needs for itself."""
COPIES = 7
"""Numbers beside every weight: its gradient and the sum of gradients, optimizer state, average, stored forms."""

DEVICE, SHARED = 0.8, 0.5
"""Share of its memory that a device is filled to; share of a machine's memory, where others need it too."""


def values_per_token(model: ModelConfig, seq: int, composed: bool = False) -> int:
    """Estimate how many numbers a token of a row of `seq` keeps; `composed`: attention keeps its scores."""
    stages = sum(model.part(stage).values(model, seq, composed) for stage in model.stages(True))
    return stages + 2 * model.vocab


def halves(rows: int) -> list[int]:
    """Return `rows`, its half rounded up, and so on down to 1."""
    sizes = [rows]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def needed(config: RunConfig, rows: int, seq: int, dtype: str, composed: bool = False) -> float:
    """Estimate the bytes of a training step with micro-batches of `rows` rows of `seq`."""
    further = sum(row.size for row in scaffolding(config.model, config.train).values())
    fixed = (1 + COPIES) * (count(config.model) + further) * max(4.0, KEPT[dtype])
    values = values_per_token(config.model, seq, composed) + 2 * config.model.vocab * config.train.mtp_heads
    return fixed + PEAK * KEPT[dtype] * values * seq * rows


def fitting(
    config: RunConfig, seq: int, dtype: str, memory: float, composed: bool = False, tokens: int | None = None
) -> int:
    """Return the rows of a micro-batch of rows of `seq`: train.micro_batch, halved until they should fit in `memory`.

    `memory` is what may be used, in bytes, `tokens` the most that a micro-batch may have; one row is taken in any case.
    """
    sizes = [rows for rows in halves(config.train.rows_of(seq)[1]) if tokens is None or rows * seq <= tokens]
    return next((rows for rows in sizes if needed(config, rows, seq, dtype, composed) <= memory), 1)


def usable(own: float | None, ranks: Ranks, filled: float = DEVICE) -> float:
    """Return the bytes that every rank may fill: most of its device's own memory, else its part of the machine's.

    It is the least of all ranks': they weight their micro-batches alike.
    """
    machine = SHARED * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks.world
    mine = machine if own is None else filled * own
    return min(float(row[0]) for row in ranks.gather(np.array([mine])))


def note(config: RunConfig, rows: int, memory: float, tokens: int | None = None) -> tuple[str, ...]:
    """Return what there is to say of micro-batches of `rows`."""
    asked = config.train.rows
    if rows == asked:
        return ()
    most = "" if tokens is None else f"to have at most {tokens:,} tokens, and "
    return (f"micro-batches: {rows} of {asked} rows, {most}to fit in {memory / 2**30:.1f} GiB (an estimate)",)
