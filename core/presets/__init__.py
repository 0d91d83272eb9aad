"""Named runs. A preset is a RunConfig with one line of purpose and the counts that a test holds it to."""

import dataclasses
import math
from typing import NamedTuple

from core.checks import closest
from core.config import ConfigError, RunConfig
from core.presets import skc, transformers


class Preset(NamedTuple):
    """One named run."""

    purpose: str
    config: RunConfig
    params: int
    """Expected number of parameters."""


PRESETS: dict[str, Preset] = {
    name: Preset(purpose, dataclasses.replace(config, preset=name), params)
    for name, (purpose, config, params) in (*transformers.PRESETS.items(), *skc.PRESETS.items())
}
assert len(PRESETS) == len(transformers.PRESETS) + len(skc.PRESETS), "two presets of one name"


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
    heads = min(model.heads, 4)
    dim, layers = min(model.dim, 16 * heads), min(model.layers, 4)
    kv_heads = max(1, heads * model.kv_heads // model.heads)
    rotated = max(2, round(dim // heads * model.rope_dims / model.head_dim / 2) * 2) if model.rope_dims else 0
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            model,
            vocab=min(model.vocab, 97),
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            rope_dims=rotated,
            mlp_hidden=max(1, model.mlp_hidden * dim // model.dim),
            embed_dim=None if model.embed_dim is None else max(1, model.embed_dim * dim // model.dim),
            mixer_dim=min(model.mixer_dim, 32),
            capsules=min(model.capsules, 8),
            capsule_block=min(model.capsule_block, 8),
            bank_capsules=min(model.bank_capsules, 4),
            engram_buckets=min(model.engram_buckets, 211),
            engram_dim=min(model.engram_dim, 2 * model.engram_orders * model.engram_heads) or model.engram_dim,
            engram_layer=min(model.engram_layer, 1),
            shared_blocks=None if model.shared_blocks is None else min(model.shared_blocks, 4),
            repeat_layers=tuple(sorted({min(i, layers - 1) for i in model.repeat_layers})),
            capsule_heads=min(model.capsule_heads, 4),
            bank_heads=math.gcd(model.bank_heads, dim),
        ),
        train=dataclasses.replace(
            config.train, batch=4, seq=37, steps=50, micro_batch=None, seconds=None, seq_stages=(), seq_until=()
        ),
        eval=dataclasses.replace(config.eval, seq=32, stride=None, windows="plain", batch=4),
    )
