"""What a model takes, part by part and all together: parameters, bytes, FLOPs, decoding state."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from core.model.attention import Exclusion
from core.model.config import ModelConfig
from core.model.layer import Layer
from core.model.params import named_parts, param_table
from core.model.storage import raw_bits
from core.model.table import Param, Part, State


def bytes_by_storage(config: ModelConfig) -> dict[str, float]:
    """Return the bytes of every storage class in use, before compression."""
    totals: dict[str, float] = {}
    for row in param_table(config).values():
        totals[row.storage] = totals.get(row.storage, 0.0) + raw_bits(row.storage, row.shape) / 8
    return totals


FLOP_RULE = (
    "training FLOPs per token = 3 * (2 * matmul weights, head included and a repeated layer's once per pass "
    f"+ per layer: {'; '.join(part.FLOPS for part in ModelConfig().parts.values() if part.FLOPS)})"
)


class Share(NamedTuple):
    """What one part takes of a model, in all the places where it stands."""

    parameters: int = 0
    bytes: float = 0.0
    """Before compression, scales included."""
    flops: int = 0
    """Of training, per token, by FLOP_RULE."""
    state: State = State()


def shares(config: ModelConfig, seq: int) -> dict[str, Share]:
    """Return part -> its share, in the order of the table; `layer` is what a layer has beside its mixer and MLP."""
    totals: dict[str, Share] = {}
    for name, part, rows, uses in _pieces(config):
        weights = sum(row.size for row in rows.values() if row.group == "matrix")
        before, state = totals.get(name, Share()), part.state(config)
        totals[name] = Share(
            before.parameters + sum(row.size for row in rows.values()),
            before.bytes + sum(raw_bits(row.storage, row.shape) for row in rows.values()) / 8,
            # The backward pass takes two products for each one of the forward pass.
            before.flops + 3 * uses * (2 * weights + part.flops(config, seq)),
            State(before.state.fixed + uses * state.fixed, before.state.per_token + uses * state.per_token),
        )
    return totals


def _pieces(config: ModelConfig) -> Iterator[tuple[str, Part, dict[str, Param], int]]:
    """Yield every part wherever it stands: its name, the part, its rows, and how often it is used."""
    yield "embedding", config.embedding, config.embedding.rows(config), 1
    kinds = {stage.name: stage.part for stage in config.stages(True)}
    uses = Counter(stage.name for stage in config.stages(True))
    for name, part in named_parts(config).items():
        rows = part.rows(config)
        if isinstance(part, Layer):
            for inside in (part.mixer(config), part.mlp(config)):
                owner = next(key for key, value in config.parts.items() if value is inside)
                yield owner, inside, inside.rows(config), uses[name]
            beside = {key: row for key, row in rows.items() if not key.startswith(("mixer.", "mlp."))}
            yield "layer", Part(), beside, uses[name]
        else:
            yield kinds[name], part, rows, uses[name]
    passes = [stage.layer for stage in config.stages(True) if stage.part == "layer"]
    excluding = sum(config.attention.excludes(config, layer) for layer in passes)
    if excluding:  # not all attention layers do, so that it is no FLOP of the part
        yield "attention", Exclusion(), {}, excluding
    yield "head", config.head, config.head.rows(config), 1


def flops_per_token(config: ModelConfig, seq: int) -> int:
    """Return training FLOPs per token (forward and backward) by FLOP_RULE: causal attention counts half the square."""
    return sum(share.flops for share in shares(config, seq).values())


def decoding_state(config: ModelConfig) -> State:
    """Return the floats that decoding keeps of one sequence: a fixed number, and so many for every token of context."""
    states = [share.state for share in shares(config, 1).values()]
    return State(sum(state.fixed for state in states), sum(state.per_token for state in states))


def decoding_tape(config: ModelConfig) -> int:
    """Return the floats that decoding keeps for every token of a chunk until it is known how many stay."""
    return sum(uses * part.tape(config) for _, part, _, uses in _pieces(config))
