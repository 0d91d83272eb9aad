"""The oracle: the model in numpy float64, token by token, one file for each part. When the twins disagree, it decides.

No chunks, no blocks in parallel, no masks: a state that the start of a document sets to zero. A part's function has its
name and is called as in the backends, with its weights and the text; EXAMPLE is what switches the part on, in odd
shapes, by dotted names of ModelConfig's fields. Nobody keeps a list: a file here is a part.
"""

import importlib
import pkgutil
from typing import Any, NamedTuple

import numpy as np

from core.config import ModelConfig
from core.model.context import Stream as Stream
from shared_tests.reference.ops import linear, rms_norm

Array = np.ndarray
Weights = dict[str, Array]


class Text(NamedTuple):
    """What a model reads."""

    tokens: Array  # (B, T) int
    starts: Array  # (B, T) bool: where a document begins that the one before it may not reach
    auxiliary: frozenset[str] = frozenset()  # names of auxiliary losses that parts are to add to the stream


def text_of(config: ModelConfig, tokens: Array) -> Text:
    """Return rows of tokens with where documents begin."""
    return Text(tokens, (tokens == config.bos) & (config.documents == "isolated"))


def model(config: ModelConfig, weights: Weights, tokens: Array) -> Array:
    """Return the logits (B, T, V) of the whole model."""
    w, text = {name: np.asarray(value, np.float64) for name, value in weights.items()}, text_of(config, tokens)
    stream = PARTS["embedding"](config, w, text)
    for stage in config.stages(True):
        stream = PARTS[stage.part](config, below(w, f"{stage.name}."), stream, stage, text)
    return PARTS["head"](config, w, stream)


def below(w: Weights, prefix: str) -> Weights:
    """Return the weights whose names begin with `prefix`, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}


def output(config: ModelConfig, w: Weights, name: str, x: Array) -> Array:
    """Return the projection `name` of x back to the stream."""
    x = rms_norm(x, config.norm_eps, True) if config.output_norm != "none" else x
    return linear(x * w[f"{name}.gain"] if config.output_norm == "gain" else x, w[f"{name}.weight"])


FILES = [module.name for module in pkgutil.iter_modules(__path__)]
MODULES = {name: importlib.import_module(f"{__name__}.{name}") for name in FILES}
PARTS = {name: getattr(module, name) for name, module in MODULES.items()}
EXAMPLES: dict[str, dict[str, Any]] = {name: module.EXAMPLE for name, module in MODULES.items()}
ALONE = {name for name, module in MODULES.items() if hasattr(module, "ALONE")}


def everything() -> dict[str, Any]:
    """Return all examples together but those that stand ALONE: every mixer, every option that a preset leaves off."""
    merged: dict[str, Any] = {}
    for name in sorted(EXAMPLES.keys() - ALONE, reverse=True):
        for field, value in EXAMPLES[name].items():
            if field == "blocks":
                value = (*merged.get(field, ()), *value)
            assert field == "blocks" or merged.get(field, value) == value, f"{name}: {field}: another example disagrees"
            merged[field] = value
    return merged
