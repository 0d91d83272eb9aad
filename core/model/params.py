"""THE parameter table: name -> shape, start value, optimizer group, storage class; and what follows from it.

Names are the dotted attribute paths that both frameworks produce by themselves; linear weights are (out, in).
The order of the table is the order of the artifact. Changing a name changes its start value.
"""

from typing import NamedTuple

import numpy as np

from core import rng
from core.checks import require
from core.model.config import ModelConfig
from core.model.orthogonal import orthogonal
from core.model.storage import Storage
from core.model.table import GROUPS, Group, Param, Part, Rows, below

MOST_VALUES = 1 << 30
"""Most parameters of a model: several times what an artifact holds, and a little more than Qwen3.5-0.8B has."""
MOST_DRAWN = 1 << 28
"""Most parameters that start from drawn values: larger models are imported, with theirs."""


def named_parts(config: ModelConfig) -> dict[str, Part]:
    """Return prefix -> part of everything that has parameters beside embedding and head, in the order of the table."""
    order = {name: place for place, name in enumerate(config.parts)}
    # The order of the settings, not of the stages: a part that moves in the trunk changes no artifact.
    order["layer"] = order["attention"]
    stages = {stage.name: stage for stage in config.stages(True)}
    return {s.name: config.part(s) for s in sorted(stages.values(), key=lambda stage: order[stage.part])}


def param_table(config: ModelConfig) -> dict[str, Param]:
    """Return the table of `config`, in artifact order; ConfigError for a model of more than MOST_VALUES."""
    table = config.embedding.rows(config)
    for name, part in named_parts(config).items():
        table |= below(name, part.rows(config))
    table |= below("head", config.head.rows(config))
    values = sum(row.size for row in table.values())
    require(values <= MOST_VALUES, f"model: {values:,} parameters, expected at most {MOST_VALUES:,}; make it smaller")
    return table


def start_values(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Return the float32 weights that every run of (config, seed) starts from, bit for bit on every platform.

    ConfigError for a model of more than MOST_DRAWN.
    """
    table = param_table(config)
    values = sum(row.size for row in table.values())
    require(values <= MOST_DRAWN, f"model: {values:,} parameters, at most {MOST_DRAWN:,} are drawn; import its weights")
    return {name: _start(row, seed, name).astype(np.float32) for name, row in table.items()}


def _start(row: Param, seed: int, name: str) -> np.ndarray:
    kind, scale, until = row.init
    if kind in ("normal", "uniform"):
        draw = rng.normal if kind == "normal" else rng.uniform
        return (draw(seed, name, row.size) * scale).reshape(row.shape)
    if kind == "orthogonal":
        high, wide = row.shape[0] // row.slices, row.shape[1]
        names = [name] if row.slices == 1 else [f"{name}/{i}" for i in range(row.slices)]
        return np.concatenate([orthogonal(seed, one, high, wide) for one in names]) * scale
    values = np.full(row.shape, scale)
    if kind == "rows":
        values[int(until) :] = 0.0
    elif kind == "columns":
        values[:, int(until) :] = 0.0
    elif kind == "rates":
        share = np.arange(row.shape[-1]) / max(row.shape[-1] - 1, 1)
        values[:] = np.log(np.expm1(1.0 / (scale * (until / scale) ** share)))
    return values


class ParamBank(NamedTuple):
    """Parameters of one group and rule of storage that lie together: what is done to one can be done to all at once.

    Of equal shapes they make a stack; vectors, of any shapes, lie in one row.
    """

    group: Group
    storage: Storage
    stacked: bool
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    scaffold: bool = False
    deviation: float | None = None
    slices: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        return (len(self.names), *self.shapes[0]) if self.stacked else (sum(sizes),)


def banks(config: ModelConfig, owner: dict[str, int] | None = None, scaffolding: Rows | None = None) -> list[ParamBank]:
    """Return the banks of all parameters; in a stack those of one `owner` (a rank, by name) are neighbours.

    Those of the scaffolding are the last.
    """
    table, members = param_table(config) | (scaffolding or {}), {}
    for name, row in table.items():
        shape = row.shape if row.group != "vector" else None
        key = row.group, row.storage, shape, row.scaffold, row.deviation, row.slices
        members.setdefault(key, []).append(name)
    stacks = []
    for (group, storage, shape, *others), names in members.items():
        if shape is None:  # so that each begins at a multiple of the power of two in its size, as devices like it
            names.sort(key=lambda name: -(table[name].size & -table[name].size))
        elif owner is not None:
            names.sort(key=lambda name: owner.get(name, 0))
        shapes = tuple(table[name].shape for name in names)
        stacks.append(ParamBank(group, storage, shape is not None, tuple(names), shapes, *others))
    return stacks


def by_group(config: ModelConfig) -> dict[Group, list[str]]:
    """Return the names of every optimizer group that has any."""
    rows = param_table(config).items()
    names: dict[Group, list[str]] = {g: [name for name, row in rows if row.group == g] for g in GROUPS}
    return {group: members for group, members in names.items() if members}


def check_arrays(arrays: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], what: str) -> None:
    """Raise a ValueError that names the first missing, extra or misshapen array of `arrays`."""
    for name, shape in shapes.items():
        if name not in arrays:
            raise ValueError(f"{what}: {name} is missing")
        if tuple(arrays[name].shape) != tuple(shape):
            raise ValueError(f"{what}: {name} has shape {tuple(arrays[name].shape)}, expected {tuple(shape)}")
    for name in arrays:
        if name not in shapes:
            raise ValueError(f"{what}: {name} is not a parameter of this model")


def count(config: ModelConfig) -> int:
    """Return the number of stored parameters."""
    return sum(row.size for row in param_table(config).values())
