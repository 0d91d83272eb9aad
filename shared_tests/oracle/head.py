"""The head by hand."""

from core.config import ModelConfig
from shared_tests.oracle import Array, Stream, Weights
from shared_tests.reference.ops import linear, rms_norm, softcap

EXAMPLE = {"head.bias": True, "head.untied": True}


def head(config: ModelConfig, w: Weights, stream: Stream) -> Array:
    """Return the logits."""
    x = rms_norm(stream.x, config.norm_eps, True)
    x = x + x * w["head.norm_gain"] if config.norm_gains else x
    x = linear(x, w["embed_down.weight"]) if config.embedding.dim else x
    logits = linear(x, w["embed.weight"])
    logits = logits + linear(x, w["head.weight"]) if config.head.untied else logits
    logits = logits + w["head.bias"] if config.head.bias else logits
    return logits if config.head.softcap is None else softcap(logits, config.head.softcap, True)
