"""THE parameter table: name -> shape, start value, optimizer group, storage class; and what follows from it.

Names are the dotted attribute paths that both frameworks produce by themselves; linear weights are (out, in).
The order of the table is the order of the artifact. Changing a name changes its start value.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from core import rng
from core.checks import require
from core.config import ModelConfig, TrainConfig
from core.model.config import COUPLING, TAPS, Pass, Store
from core.model.storage import Storage, raw_bits, storage_class

Group = Literal["embed", "matrix", "vector", "hash"]
GROUPS: tuple[Group, ...] = ("embed", "matrix", "vector", "hash")
MOST_VALUES = 1 << 28
"""Most parameters of a model: several times what an artifact holds."""


class Init(NamedTuple):
    """A start value: normal (scale = standard deviation), uniform (scale = bound), constant (scale = value); rows and
    columns: the value in the first `until` of them, 0 in the others; rates: log(expm1(1 / t)), so that softplus gives
    1 / t back, with time constants t spread over the last axis from `scale` to `until` at equal ratios.
    """

    kind: Literal["normal", "uniform", "constant", "rows", "columns", "rates"]
    scale: float
    until: float = 0.0


class Param(NamedTuple):
    """One row of the table."""

    shape: tuple[int, ...]
    init: Init
    group: Group
    storage: Storage = "float16"

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


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
    identity = Param((config.dim, TAPS), Init("columns", 1.0, 1), "vector")
    return {
        **({"mixer.conv": identity} if config.attention_conv else {}),
        "mixer.q.weight": _matrix(config, config.dim, config.dim),
        "mixer.k.weight": _matrix(config, kv, config.dim),
        "mixer.v.weight": _matrix(config, kv, config.dim),
        **_output(config, "mixer.o", config.dim),
        "mixer.q_gain": Param((config.heads,), Init("constant", config.q_gain), "vector"),
    }


def _koopman(config: ModelConfig) -> dict[str, Param]:
    """Rows of one `koopman` layer's mixer (spec/causal_skc.md a1)."""
    width, small = config.mixer_dim, Init("normal", 0.01)
    return {
        "mixer.value.weight": _matrix(config, width, config.dim),
        "mixer.gate.weight": _matrix(config, width, config.dim),
        "mixer.decay.weight": _matrix(config, width, config.dim),
        "mixer.decay_bias": Param((width,), Init("rates", *config.mixer_times), "vector"),
        "mixer.conv": Param((width, TAPS), Init("constant", 1 / TAPS), "vector"),
        "mixer.couple_in": Param((width, COUPLING), small, "vector"),
        "mixer.couple_out": Param((width, COUPLING), small, "vector"),
        "mixer.state_gain": Param((width,), ONE, "vector"),
        **_output(config, "mixer.o", width),
    }


def _skc(config: ModelConfig) -> dict[str, Param]:
    """Rows of one SKC layer's mixer: the Koopman mixer's and its capsules' (spec/causal_skc.md a2)."""
    routes = config.capsule_heads * config.capsules
    return {
        **_koopman(config),
        "mixer.write.weight": _matrix(config, routes, config.dim),
        "mixer.write_bias": Param((routes,), ZERO, "vector"),
        "mixer.read.weight": _matrix(config, routes, config.dim),
        **_capsules(config.layer_store, "mixer.capsules"),
        "mixer.capsule_gain": Param((config.mixer_dim,), Init("constant", config.capsule_gain), "vector"),
    }


def _capsules(store: Store, name: str) -> dict[str, Param]:
    """Rows of a store of capsules."""
    heads, count, block = store.heads, store.capsules, store.block
    small = Init("normal", 0.01)
    rows = {"temperature": Param((2, heads), Init("constant", 2.0), "vector")}
    if store.bands:
        rows["bands"] = Param((block, count), Init("rows", block**0.5, 1), "vector")
    rows["rate"] = Param((heads, count), Init("rates", *store.times), "vector")
    rows["couple_in"] = Param((heads, COUPLING, count), small, "vector")
    rows["couple_out"] = Param((heads, count, COUPLING), small, "vector")
    return {f"{name}.{key}": row for key, row in rows.items()}


def _bank(config: ModelConfig, name: str) -> dict[str, Param]:
    """Rows of the associative bank at one of its places (spec/causal_skc.md a3)."""
    routes = config.bank_heads * config.bank_capsules
    return {
        f"{name}.route.weight": _matrix(config, routes, config.dim),
        f"{name}.write_bias": Param((routes,), ZERO, "vector"),
        **_capsules(config.bank_store, f"{name}.capsules"),
        f"{name}.gate": Param((config.dim,), Init("constant", config.bank_gate), "vector"),
    }


def _memories(config: ModelConfig) -> dict[str, Param]:
    """Rows of what knows tokens by their neighbours: smear, hashed bigrams, EngramHash (spec/causal_skc.md a4)."""
    rows, small, stored = {}, Init("normal", 0.02), config.hash_storage
    if config.smear:
        rows["smear"] = Param((config.dim,), Init("constant", -3.0), "vector")
    if config.bigram_buckets:
        rows["bigram.table"] = Param((config.bigram_buckets, config.bigram_dim), small, "hash", stored)
        rows["bigram.value.weight"] = _matrix(config, config.dim, config.bigram_dim)._replace(init=ZERO)
    if config.engram_orders:
        tables = config.engram_orders * config.engram_heads
        shape = (tables * config.engram_buckets, config.engram_dim // tables)
        rows["engram.table"] = Param(shape, small, "hash", stored)
        rows["engram.value.weight"] = _matrix(config, config.dim, config.engram_dim)
        rows["engram.key.weight"] = _matrix(config, config.dim, config.engram_dim)
        rows["engram.sharpness"] = Param((1,), Init("constant", 0.541), "vector")
        rows["engram.bias"] = Param((1,), ZERO, "vector")
    return rows


MIXERS: dict[str, Callable[[ModelConfig], dict[str, Param]]] = {
    "attention": _attention,
    "koopman": _koopman,
    "skc": _skc,
    "skc_parallel": _skc,
}
"""Layer kind -> the rows of its mixer."""


def _block(config: ModelConfig, index: int, passes: list[Pass]) -> dict[str, Param]:
    """Rows of one block that its `passes` use; what belongs to a pass has one row per pass where there are several."""
    shape = (config.dim,) if len(passes) == 1 else (len(passes), config.dim)
    # A repeat's scales start at 0: switched on in the middle of a run, it changes nothing at first; one that never was
    # switched on changes nothing at all, so that scoring may always run the whole depth.
    scale = ONE if len(passes) == 1 else Init("rows", 1.0, sum(not p.again for p in passes))
    rows = MIXERS[config.kind(index)](config)
    rows["mixer_scale"] = Param(shape, scale, "vector")
    rows["mlp.up.weight"] = _matrix(config, config.mlp_hidden, config.dim)
    rows |= _output(config, "mlp.down", config.mlp_hidden)
    rows["mlp_scale"] = Param(shape, scale, "vector")
    if config.residual_mix:
        rows["stream_mix"] = Param(shape, ONE, "vector")
        rows["embed_mix"] = Param(shape, ZERO, "vector")
    return rows


def param_table(config: ModelConfig) -> dict[str, Param]:
    """Return the table of `config`, in artifact order; ConfigError for a model of more than MOST_VALUES."""
    width, stored = config.embed_dim or config.dim, config.table_storage
    table = {"embed.weight": Param((config.vocab, width), Init("normal", config.embed_std), "embed", stored)}
    if config.embed_dim is not None:
        table["embed_up.weight"] = _matrix(config, config.dim, width)._replace(storage=stored)
        table["embed_down.weight"] = _matrix(config, width, config.dim)._replace(storage=stored)
    table |= _memories(config)
    uses: dict[int, list[Pass]] = {}
    for step in config.passes(True):
        uses.setdefault(step.block, []).append(step)
    for i in range(config.shared_blocks or config.layers):
        table |= {f"blocks.{i}.{name}": row for name, row in _block(config, i, uses[i]).items()}
    for place in config.banks:
        table |= _bank(config, f"bank_{place}")
    if config.skips:
        table["skip_weights"] = Param((config.skips, config.dim), ONE, "vector")
    if config.vocab_bias:
        table["vocab_bias"] = Param((config.vocab,), ZERO, "vector")
    values = sum(row.size for row in table.values())
    require(values <= MOST_VALUES, f"model: {values:,} parameters, expected at most {MOST_VALUES:,}; make it smaller")
    return table


def start_values(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Return the float32 weights that every run of (config, seed) starts from, bit for bit on every platform."""
    return {name: _start(row, seed, name).astype(np.float32) for name, row in param_table(config).items()}


def _start(row: Param, seed: int, name: str) -> np.ndarray:
    kind, scale, until = row.init
    if kind in ("normal", "uniform"):
        draw = rng.normal if kind == "normal" else rng.uniform
        return (draw(seed, name, row.size) * scale).reshape(row.shape)
    values = np.full(row.shape, scale)
    if kind == "rows":
        values[int(until) :] = 0.0
    elif kind == "columns":
        values[:, int(until) :] = 0.0
    elif kind == "rates":
        share = np.arange(row.shape[-1]) / max(row.shape[-1] - 1, 1)
        values[:] = np.log(np.expm1(1.0 / (scale * (until / scale) ** share)))
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


class Bank(NamedTuple):
    """Parameters of one optimizer group and storage that lie together: what is done to one can be done to all at once.

    Of equal shapes they make a stack; vectors, of any shapes, lie in one row.
    """

    group: Group
    storage: Storage
    stacked: bool
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        return (len(self.names), *self.shapes[0]) if self.stacked else (sum(sizes),)


def banks(config: ModelConfig, owner: dict[str, int] | None = None) -> list[Bank]:
    """Return the banks of all parameters; in a stack those of one `owner` (a rank, by name) are neighbours."""
    table, found = param_table(config), {}
    for name, row in table.items():
        key = row.group, row.storage, row.shape if row.group != "vector" else None
        found.setdefault(key, []).append(name)
    made = []
    for (group, storage, shape), names in found.items():
        if shape is None:  # so that each begins at a multiple of the power of two in its size, as devices like it
            names.sort(key=lambda name: -(table[name].size & -table[name].size))
        elif owner is not None:
            names.sort(key=lambda name: owner.get(name, 0))
        made.append(Bank(group, storage, shape is not None, tuple(names), tuple(table[name].shape for name in names)))
    return made


def by_group(config: ModelConfig) -> dict[Group, list[str]]:
    """Return the names of every optimizer group that has any."""
    rows = param_table(config).items()
    names: dict[Group, list[str]] = {g: [name for name, row in rows if row.group == g] for g in GROUPS}
    return {group: found for group, found in names.items() if found}


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
    """Return how many weights multiply each token: the matrices of every pass, the embedding's and the tied head."""
    table = param_table(config)
    uses = Counter(p.block for p in config.passes(True))
    total = table["embed.weight"].size
    for name, row in table.items():
        if row.group == "matrix":
            total += row.size * (uses[int(name.split(".")[1])] if name.startswith("blocks.") else 1)
    return total


FLOP_RULE = (
    "training FLOPs per token = 3 * (2 * matmul weights, head included and a repeated layer's twice + per layer: "
    "attention 2 * seq * dim; Koopman mixer 4 * C^2 of its two Hadamard products; capsules 4 * N * C of write and "
    "read, the bank's too, and 2 * Q * (H * N + C) of a read of the open block)"
)


def flops_per_token(config: ModelConfig, seq: int) -> int:
    """Return training FLOPs per token (forward and backward) by FLOP_RULE: causal attention counts half the square."""
    width = config.mixer_dim
    koopman, capsules = 4 * width**2, _store_cost(config.layer_store, width)
    cost = {"attention": 2 * seq * config.dim, "koopman": koopman}
    mixers = sum(cost.get(config.kind(p.layer), koopman + capsules) for p in config.passes(True))
    banks = len(config.banks) * _store_cost(config.bank_store, config.dim)
    return 3 * (2 * matmul_params(config) + mixers + banks)


def _store_cost(store: Store, width: int) -> int:
    """Return forward FLOPs per token of a store of capsules for `width` channels."""
    inside = 2 * store.block * (store.heads * store.capsules + width) if store.intra else 0
    return 4 * store.capsules * width + inside


def state_per_token(config: ModelConfig) -> int:
    """Return the floats that one more token of context adds to the decoding state (keys and values)."""
    return sum(
        2 * config.kv_heads * config.head_dim for p in config.passes(True) if config.kind(p.layer) == "attention"
    )


def state_size(config: ModelConfig) -> int:
    """Return the floats of the decoding state of one sequence that do not grow with it (recurrent layers)."""
    koopman = TAPS * config.mixer_dim
    capsules = _store_size(config.layer_store, config.mixer_dim)
    sizes = {"attention": config.attention_conv * (TAPS - 1) * config.dim, "koopman": koopman}
    mixers = sum(sizes.get(config.kind(p.layer), koopman + capsules) for p in config.passes(True))
    return mixers + len(config.banks) * _store_size(config.bank_store, config.dim) + config.smear * config.dim


def _store_size(store: Store, width: int) -> int:
    """Return the floats of the state of a store of capsules for `width` channels."""
    kept = 2 + (store.intra > 0)
    return kept * store.capsules * width + (1 + store.shift) * store.heads * store.capsules
