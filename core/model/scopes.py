"""Scopes: which weights learn from scored text, as names, patterns over the parameter table, or words for several."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from core.checks import ConfigError, closest, in_words, require
from core.model.config import ModelConfig
from core.model.params import param_table

SCALES = (
    *("*.mixer_scale", "*.mlp_scale", "*.scale", "*.gain", "*_gain", "*.gains", "*.gate", "*_gate", "*.blend"),
    *("*.stream_mix", "*.embed_mix", "skips.weight", "smear.share", "lanes.*"),
)
SCOPES = {
    "scales": SCALES,
    "skc_safe": (*SCALES, "*.decay_bias", "*.conv", "*.bands", "*.rate"),
    "bank": ("bank_*",),
    "engram": ("engram.table",),
    "embed": ("embed.weight",),
    "feedback": ("feedback.*",),
    "all": ("*",),
}
"""Word -> patterns; feedback means the scales of the upper half of the layers, too."""


def loose_names(
    model: ModelConfig, params: Sequence[str], frozen: int = 0, where: str = "eval.adapt"
) -> tuple[str, ...]:
    """Return the weights that `params` (none: all) name, in the order of the table, without those of the first layers.

    The blocks of the first `frozen` layers are left out. ConfigError, for a setting of the section `where`, if a name
    or a pattern matches nothing, or if nothing is left.
    """
    table, chosen = param_table(model), set()
    require(frozen <= model.layers, f"{where}.frozen={frozen}: the model has {model.layers} layers")
    for param in params or ("all",):
        matching = _matching(model, list(table), param)
        if not matching:
            present = [scope for scope in SCOPES if _matching(model, list(table), scope)]
            close = closest(param, [*present, *table])
            hint = (
                f"did you mean {close}? Scopes"
                if close
                else "expected a name, a pattern such as *.q.weight, or one of the scopes"
            )
            raise ConfigError(
                f"{where}.params={in_words(param)}: this model has no such weights; {hint}: {', '.join(present)}"
            )
        chosen |= matching
    left = {f"blocks.{model.block_of(layer)}" for layer in range(frozen)}
    names = tuple(name for name in table if name in chosen and ".".join(name.split(".")[:2]) not in left)
    words = ", ".join(params) or "all"
    require(bool(names), f"{where}.frozen={frozen} leaves none of {where}.params={words}: freeze fewer layers")
    return names


def _matching(model: ModelConfig, names: Sequence[str], param: str) -> set[str]:
    """Return the names that a name, a pattern or a scope stands for."""
    matching = {name for name in names if any(fnmatchcase(name, one) for one in SCOPES.get(param, (param,)))}
    if param == "feedback" and matching:
        upper = {f"blocks.{model.block_of(layer)}." for layer in range(model.layers // 2, model.layers)}
        matching |= {name for name in _matching(model, names, "scales") if name.startswith(tuple(upper))}
    return matching
