"""The parameters of a twin: which of a mixer's arrays are its own in full, which by two factors, and their start.

Names are those of the frozen model behind `twin.`; the factors of a matrix are `<matrix>.lora_a` (rank, in) and
`<matrix>.lora_b` (out, rank).
"""

import math
from typing import NamedTuple

import numpy as np

from core import rng
from core.checks import require
from core.model.config import ModelConfig
from core.model.layer import KINDS, Layer
from core.model.table import Init, Rows, below, vector
from core.twin.settings import TwinConfig

JOINED = {"delta": (("q", "k", "v"),)}
"""By mixer, matrices that share one pair of factors, as one matrix: Qwen3.5 has these of the delta rule in one."""
MASK = "twin.mask"
"""The vector of a mask, as wide as the embedding."""
BLOCKS = "twin.blocks."


class LowRank(NamedTuple):
    """Matrices below one another that a twin changes by two factors."""

    members: tuple[str, ...]  # the frozen matrices' names
    sizes: tuple[int, ...]  # rows of each


def scale(twin: TwinConfig) -> float:
    """Return what the product of both factors is multiplied by: variances then do not depend on the rank (rsLoRA)."""
    return twin.alpha / math.sqrt(twin.rank)


def twin_rows(model: ModelConfig, twin: TwinConfig) -> Rows:
    """Return the parameter table of a twin; ConfigError for settings without a use."""
    return _tables(model, twin)[0]


def low_rank(model: ModelConfig, twin: TwinConfig) -> dict[str, LowRank]:
    """Return by name (of the factors, without their endings) what a twin changes by two factors."""
    return _tables(model, twin)[1]


def _tables(model: ModelConfig, twin: TwinConfig) -> tuple[Rows, dict[str, LowRank]]:
    twin.check(model)
    rows: Rows = {}
    low: dict[str, LowRank] = {}
    for block in range(model.shared_blocks or model.layers):
        mixer = KINDS[model.kind(block)].mixer
        own, factors = _mixer(mixer, Layer(block).mixer(model).rows(model), twin)
        rows |= below(f"{BLOCKS}{block}.mixer", own)
        for name, (members, sizes) in factors.items():
            named = tuple(f"blocks.{block}.mixer.{member}.weight" for member in members)
            low[f"{BLOCKS}{block}.mixer.{name}"] = LowRank(named, sizes)
    where = f"twin.rank={twin.rank}: two factors would be no smaller than any matrix"
    where = f"{where} beside twin.full={twin.full}" if twin.full else where
    require(not twin.rank or bool(low), f"{where}; lower it, or leave it out")
    if twin.learned_mask:
        rows[MASK] = vector(model.embedding.dim or model.dim)
    return rows, low


def _mixer(mixer: str, rows: Rows, twin: TwinConfig) -> tuple[Rows, dict[str, tuple]]:
    """Return the twin's own rows of a mixer, and by name what has two factors: (members, rows of each)."""
    if not twin.rank or mixer in twin.full:
        return rows, {}
    own, factors = {}, {}
    joined = {member: members for members in JOINED.get(mixer, ()) for member in members}
    for key, row in rows.items():
        name = key.removesuffix(".weight")
        members = joined.get(name, (name,))
        if row.group != "matrix" or len(row.shape) != 2:
            if len(row.shape) > 1 or twin.vectors:
                own[key] = row
            continue
        sizes = tuple(rows[f"{member}.weight"].shape[0] for member in members)
        out, into, together = sum(sizes), row.shape[1], "".join(members)
        if twin.rank * (out + into) >= out * into:
            own[key] = row
        elif together not in factors:
            factors[together] = members, sizes
            own[f"{together}.lora_a"] = row._replace(shape=(twin.rank, into), init=Init("normal", into**-0.5))
            own[f"{together}.lora_b"] = row._replace(shape=(out, twin.rank), init=Init("constant", 0.0))
    return own, factors


def twin_start(
    model: ModelConfig, twin: TwinConfig, weights: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return what a twin of a model with `weights` begins with, the frozen model itself, and what of matrices with two
    factors stays frozen, by the factors' name; float64.

    The second follows from the frozen weights alone: no file needs to hold it.
    """
    rows, low = _tables(model, twin)
    start, rest = _factors(twin, rows, low, weights), {}
    for name, one in low.items():
        rest[name] = _whole(one, weights) - scale(twin) * (start[f"{name}.lora_b"] @ start[f"{name}.lora_a"])
    for name in rows:
        if name == MASK:
            start[name] = mask_start(weights)
        elif name not in start:
            start[name] = np.asarray(weights[name.removeprefix("twin.")], np.float64)
    return {name: start[name] for name in rows}, rest


def mask_start(weights: dict[str, np.ndarray]) -> np.ndarray:
    """Return the mean of the embedding's rows, float64."""
    return np.asarray(weights["embed.weight"], np.float64).mean(axis=0)


def _whole(one: LowRank, weights: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(weights[member], np.float64) for member in one.members])


def _factors(twin: TwinConfig, rows: Rows, low: dict[str, LowRank], weights: dict[str, np.ndarray]) -> dict:
    factors = {}
    for name, one in low.items():
        a, b = f"{name}.lora_a", f"{name}.lora_b"
        if twin.pissa:
            left, sizes, right = np.linalg.svd(_whole(one, weights), full_matrices=False)
            root = np.sqrt(sizes[: twin.rank] / scale(twin))
            factors[a], factors[b] = root[:, None] * right[: twin.rank], left[:, : twin.rank] * root
        else:
            factors[a] = rng.normal(0, a, rows[a].size).reshape(rows[a].shape) * rows[a].init.scale
            factors[b] = np.zeros(rows[b].shape)
    return factors
