"""The head by hand."""

from core.config import ModelConfig
from shared_tests.oracle import Array, Stream, Weights
from shared_tests.reference.ops import linear, rms_norm, softcap

EXAMPLE = {"head.bias": True}


def head(config: ModelConfig, w: Weights, stream: Stream) -> Array:
    """Return the logits."""
    x = rms_norm(stream.x, config.norm_eps, True)
    logits = linear(linear(x, w["embed_down.weight"]) if config.embedding.dim else x, w["embed.weight"])
    logits = logits + w["head.bias"] if config.head.bias else logits
    return logits if config.head.softcap is None else softcap(logits, config.head.softcap, True)
