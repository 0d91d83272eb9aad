"""Named runs. A preset is a RunConfig with one line of purpose and the counts that a test holds it to."""

import dataclasses
from typing import NamedTuple

from core.checks import closest
from core.config import NO_STAGES, ConfigError, RunConfig
from core.presets import original, records, skc, transformers


class Preset(NamedTuple):
    """One named run."""

    purpose: str
    config: RunConfig
    params: int
    """Expected number of parameters."""
    lacks: str = ""
    """What of the system that it stands for this project does not do yet."""


FAMILIES = (transformers.PRESETS, skc.PRESETS, original.PRESETS, records.PRESETS)
PRESETS: dict[str, Preset] = {
    name: Preset(purpose, dataclasses.replace(config, preset=name), *rest)
    for family in FAMILIES
    for name, (purpose, config, *rest) in family.items()
}
assert len(PRESETS) == sum(map(len, FAMILIES)), "two presets of one name"


def get(name: str) -> Preset:
    """Return preset `name`; ConfigError lists the known ones."""
    if name not in PRESETS:
        close = closest(name, PRESETS)
        hint = f"did you mean {close}?" if close else f"known: {', '.join(PRESETS)}"
        raise ConfigError(f"preset {name!r} does not exist; {hint} (see: skc presets)")
    return PRESETS[name]


def mini(config: RunConfig) -> RunConfig:
    """Return `config` shrunk for tests: same options, dim <= 64, at most 4 layers, short windows.

    Their 37 tokens end in the middle of a block of capsules and of a chunk of the recurrence.
    """
    model = config.model
    dim, layers = min(model.dim, 16 * min(model.attention.heads, 4)), min(model.layers, 4)
    # Of more kinds than layers those of layers that stand far apart.
    apart = tuple(model.kind((2 * i + 1) * model.layers // (2 * layers)) for i in range(layers))
    blocks = model.blocks if len(model.blocks) <= layers else apart
    last = layers - 1 if model.lanes.start is None else min(model.lanes.start, 3) - 1  # repeats end before the lanes
    shared = None if model.shared_blocks is None else min(model.shared_blocks, 4)
    again = tuple(range(max(0, last - 1), last + 1))[-len(model.repeat_layers) :] if model.repeat_layers else ()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            model,
            vocab=min(model.vocab, 97),
            dim=dim,
            layers=layers,
            shared_blocks=(layers + 1) // 2 if model.share_order == "mirror" else shared,
            blocks=blocks,
            repeat_layers=again,
            **{name: part.mini(model, dim) for name, part in model.parts.items()},
        ),
        train=dataclasses.replace(
            config.train, batch=4, seq=37, steps=50, micro_batch=None, seconds=None, reserve_seconds=0.0, **NO_STAGES
        ),
        eval=dataclasses.replace(config.eval.plain(), seq=32, stride=None, windows="plain", batch=4),
    )
