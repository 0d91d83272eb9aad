"""U-net skips by hand."""

from core.config import ModelConfig
from core.model.trunk import Stage
from shared_tests.oracle import Stream, Text, Weights

EXAMPLE = {"layers": 5, "skips.on": True}
"""Two skips: with one, first in would be last in."""


def skips(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Keep the stream in the first half of the layers, add the one that was kept last in the second half."""
    if stage.layer < config.layers // 2:
        return stream._replace(skips=(*stream.skips, stream.x))
    scale = w["weight"][stage.layer - config.layers // 2]
    return stream._replace(x=stream.x + scale * stream.skips[-1], skips=stream.skips[:-1])
