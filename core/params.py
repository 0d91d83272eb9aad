"""THE parameter table: name -> shape, start value, optimizer group, storage class; and what follows from it.

Names are the dotted attribute paths that both frameworks produce by themselves; linear weights are (out, in).
The order of the table is the order of the artifact. Changing a name changes its start value.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from core import rng
from core.config import ModelConfig, TrainConfig
from core.storage import Storage, raw_bits, storage_class

Group = Literal["embed", "matrix", "vector"]
GROUPS: tuple[Group, ...] = ("embed", "matrix", "vector")


class Init(NamedTuple):
    """A start value: normal (scale = standard deviation), uniform (scale = bound) or constant (scale = value)."""

    kind: Literal["normal", "uniform", "constant"]
    scale: float


class Param(NamedTuple):
    """One row of the table."""

    shape: tuple[int, ...]
    init: Init
    group: Group
    storage: Storage = "float16"

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))


ZERO, ONE = Init("constant", 0.0), Init("constant", 1.0)


def _matrix(config: ModelConfig, out: int, into: int) -> Param:
    normal = config.matrix_init == "normal"
    drawn = Init("normal", config.matrix_std) if normal else Init("uniform", into**-0.5)
    return Param((out, into), drawn, "matrix", config.matrix_storage)


def _output(config: ModelConfig, name: str, into: int) -> dict[str, Param]:
    """Rows of an output projection back to the stream, which starts at 0, and of the gain of the norm before it."""
    rows = {f"{name}.weight": Param((config.dim, into), ZERO, "matrix", config.matrix_storage)}
    return rows | ({f"{name}.gain": Param((into,), ONE, "vector")} if config.output_norm == "gain" else {})


def _attention(config: ModelConfig) -> dict[str, Param]:
    """Rows of one `attention` layer's mixer."""
    kv = config.kv_heads * config.head_dim
    return {
        "mixer.q.weight": _matrix(config, config.dim, config.dim),
        "mixer.k.weight": _matrix(config, kv, config.dim),
        "mixer.v.weight": _matrix(config, kv, config.dim),
        **_output(config, "mixer.o", config.dim),
        "mixer.q_gain": Param((config.heads,), Init("constant", config.q_gain), "vector"),
        "mixer_scale": Param((config.dim,), ONE, "vector"),
    }


MIXERS: dict[str, Callable[[ModelConfig], dict[str, Param]]] = {"attention": _attention}
"""Layer kind -> the rows of its mixer."""


def _layer(config: ModelConfig, kind: str) -> dict[str, Param]:
    rows = MIXERS[kind](config)
    rows["mlp.up.weight"] = _matrix(config, config.mlp_hidden, config.dim)
    rows |= _output(config, "mlp.down", config.mlp_hidden)
    rows["mlp_scale"] = Param((config.dim,), ONE, "vector")
    if config.residual_mix:
        rows["stream_mix"] = Param((config.dim,), ONE, "vector")
        rows["embed_mix"] = Param((config.dim,), ZERO, "vector")
    return rows


def param_table(config: ModelConfig) -> dict[str, Param]:
    """Return the table of `config`, in artifact order."""
    width, stored = config.embed_dim or config.dim, config.table_storage
    table = {"embed.weight": Param((config.vocab, width), Init("normal", config.embed_std), "embed", stored)}
    if config.embed_dim is not None:
        table["embed_up.weight"] = _matrix(config, config.dim, width)._replace(storage=stored)
        table["embed_down.weight"] = _matrix(config, width, config.dim)._replace(storage=stored)
    for i, kind in enumerate(config.kinds):
        table |= {f"blocks.{i}.{name}": row for name, row in _layer(config, kind).items()}
    if config.unet_skips:
        table["skip_weights"] = Param((config.layers // 2, config.dim), ONE, "vector")
    if config.vocab_bias:
        table["vocab_bias"] = Param((config.vocab,), ZERO, "vector")
    return table


def start_values(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Return the float32 weights that every run of (config, seed) starts from, bit for bit on every platform."""
    draw = {"normal": rng.normal, "uniform": rng.uniform}
    values = {}
    for name, row in param_table(config).items():
        if row.init.kind == "constant":
            values[name] = np.full(row.shape, row.init.scale, np.float32)
        else:
            flat = draw[row.init.kind](seed, name, row.size) * row.init.scale
            values[name] = flat.astype(np.float32).reshape(row.shape)
    return values


def optimizer_slots(config: ModelConfig, train: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every optimizer state, `<param>.<slot>`: m and v of AdamW, m alone of Muon; ema: average."""
    slots, averages = {}, averaged(config, train)
    for name, row in param_table(config).items():
        muon = row.group == "matrix" and train.matrix_rule == "muon"
        kept = ("m",) if muon else ("m", "v")
        slots |= {f"{name}.{slot}": row.shape for slot in (*kept, *(("ema",) if name in averages else ()))}
    return slots


def averaged(config: ModelConfig, train: TrainConfig) -> tuple[str, ...]:
    """Return the parameters whose running average is scored and stored in place of the weight."""
    if train.average_from is None:
        return ()
    rows = param_table(config).items()
    return tuple(name for name, row in rows if train.average_ternary or storage_class(row.storage) != "ternary")


def exported(config: ModelConfig, train: TrainConfig, params: dict, state: dict) -> dict:
    """Return the one set of weights that is scored and stored: averages where the run keeps them, else the weights.

    `params` and `state` are keyed by name; their values may be arrays of any library.
    """
    averages = averaged(config, train)
    return {name: state[f"{name}.ema"] if name in averages else value for name, value in params.items()}


def same_shapes(config: ModelConfig, group: Group) -> list[list[str]]:
    """Return the names of a group, those of one shape together: a rule may treat them as one stack."""
    stacks: dict[tuple[int, ...], list[str]] = {}
    for name, row in param_table(config).items():
        if row.group == group:
            stacks.setdefault(row.shape, []).append(name)
    return list(stacks.values())


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


def bytes_by_storage(config: ModelConfig) -> dict[str, float]:
    """Return the bytes of every storage class in use, before compression."""
    totals: dict[str, float] = {}
    for row in param_table(config).values():
        totals[row.storage] = totals.get(row.storage, 0.0) + raw_bits(row.storage, row.shape) / 8
    return totals


def matmul_params(config: ModelConfig) -> int:
    """Return how many weights multiply each token: all matrices and the tied head."""
    table = param_table(config)
    matrices = sum(row.size for row in table.values() if row.group == "matrix")
    return matrices + table["embed.weight"].size


FLOP_RULE = "training FLOPs per token = 3 * (2 * matmul weights, head included + 2 * seq * dim per attention layer)"


def flops_per_token(config: ModelConfig, seq: int) -> int:
    """Return training FLOPs per token (forward and backward) by FLOP_RULE: causal attention counts half the square."""
    attention = sum(2 * seq * config.dim for kind in config.kinds if kind == "attention")
    return 3 * (2 * matmul_params(config) + attention)


def state_per_token(config: ModelConfig) -> int:
    """Return the floats that one more token of context adds to the decoding state (keys and values)."""
    return sum(2 * config.kv_heads * config.head_dim for kind in config.kinds if kind == "attention")
