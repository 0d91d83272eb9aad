"""U-net skips by hand."""

from core.config import ModelConfig
from core.model.trunk import Stage
from shared_tests.oracle import Stream, Text, Weights
from shared_tests.reference.ops import sigmoid

EXAMPLE = {"layers": 5, "skips.on": True, "skips.gates": True}
"""Two skips: with one, first in would be last in."""


def skips(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Keep the stream in the first half of the layers, add the one that was kept last in the second half."""
    if stage.row < 0:
        return stream._replace(skips=(*stream.skips, stream.x))
    row = len(w["weight"]) - len(stream.skips)  # the one that was kept last is the first
    x, added = stream.x, w["weight"][row] * stream.skips[-1]
    if config.skips.gates:
        share = sigmoid(w["gate"][row], True)
        x, added = share * x, (1 - share) * added
    return stream._replace(x=x + added, skips=stream.skips[:-1])
