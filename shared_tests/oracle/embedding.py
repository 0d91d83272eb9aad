"""The embedding by hand."""

from core.config import ModelConfig
from shared_tests.oracle import Stream, Text, Weights
from shared_tests.reference.ops import linear, rms_norm

EXAMPLE = {"embedding.dim": 16}


def embedding(config: ModelConfig, w: Weights, text: Text) -> Stream:
    """Return the stream before the first stage."""
    x = w["embed.weight"][text.tokens]
    x = linear(x, w["embed_up.weight"]) if config.embedding.dim else x
    values = rms_norm(x, config.norm_eps, True)
    entering = values if config.embedding.norm else x
    return Stream(entering, x, values, entering)
