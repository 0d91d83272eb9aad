"""Value embeddings by hand."""

from core.config import ModelConfig
from core.model.trunk import Stage
from shared_tests.oracle import Stream, Text, Weights
from shared_tests.reference.ops import linear

EXAMPLE = {"layers": 5, "value_embed.dim": 6, "value_embed.layers": (3,)}
"""Layer 3 is the attention layer of `everything`; test_value_embed.py takes several."""


def value_embed(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return the stream with what each chosen layer adds to its values: by the token alone, and by the layer's gain."""
    shared = w["scale"] * linear(w["table"][text.tokens], w["proj.weight"])
    gains = zip(config.value_embed.layers, w["gains"], strict=True)
    return stream._replace(to_values={layer: gain * shared for layer, gain in gains})
