"""What an engine keeps beside the weights: the optimizer's state, and running averages that replace weights."""

from core.config import ModelConfig, TrainConfig
from core.engine.scaffolding import scaffolding, trained_table
from core.model.params import param_table
from core.model.storage import storage_class


def optimizer_slots(config: ModelConfig, train: TrainConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every optimizer state, `<param>.<slot>`: m and v of AdamW, m alone of Muon; ema: average.

    With train.snapshot_every also mean, the running mean of averages, and `snapshots`: how many are in it, (1,).
    """
    snapshots = train.snapshot_every is not None
    slots, averages = {}, averaged(config, train)
    for name, row in trained_table(config, train).items():
        muon = row.group == "matrix" and train.matrix_rule == "muon"
        moments = ("m",) if muon else ("m", "v")
        slots |= {f"{name}.{slot}": row.shape for slot in (*moments, *(("ema",) if name in averages else ()))}
    if snapshots:
        slots |= {f"{name}.mean": slots[f"{name}.ema"] for name in averages} | {"snapshots": (1,)}
    return slots


def averaged(config: ModelConfig, train: TrainConfig) -> tuple[str, ...]:
    """Return the parameters whose running average is scored and stored in place of the weight."""
    if train.average_from is None:
        return ()
    rows = param_table(config).items()
    return tuple(name for name, row in rows if train.average_ternary or storage_class(row.storage) != "ternary")


def exported(config: ModelConfig, train: TrainConfig, params: dict, state: dict) -> dict:
    """Return the one set of weights that is scored and stored: averages where the run keeps them, else the weights.

    Once there are snapshots of the averages their mean stands for them. The scaffolding is left out.

    `params` and `state` are keyed by name; their values may be arrays of any library.
    """
    averages, left = averaged(config, train), scaffolding(config, train)
    kept = {name: value for name, value in params.items() if name not in left}
    slot = "mean" if train.snapshot_every is not None and float(state["snapshots"][0]) > 0 else "ema"
    return {name: state[f"{name}.{slot}"] if name in averages else value for name, value in kept.items()}
