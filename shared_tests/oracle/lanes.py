"""Two lanes by hand."""

from core.config import ModelConfig
from core.model.trunk import Stage
from shared_tests.oracle import Stream, Text, Weights

EXAMPLE = {"layers": 5, "lanes.start": 2, "residual_mix": True, "depth_damping": True, "skips.on": True}
"""The lanes begin where the skips do. Layers of other kinds cannot have them: `everything` does not (`ALONE`)."""
ALONE = True


def lanes(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Begin with two equal lanes; behind a layer keep a share of each, and add what its mixer and its MLP computed."""
    if stream.lane is None:
        return stream._replace(lane=stream.x)
    (mixed, changed), keep, write = stream.branches, w["keep"][stage.layer], w["write"][stage.layer]
    one = keep[0] * stream.x + write[0][0] * mixed + write[1][0] * changed
    two = keep[1] * stream.lane + write[0][1] * mixed + write[1][1] * changed
    if stage.layer < config.layers - 1:
        return stream._replace(x=one, lane=two)
    return stream._replace(x=0.5 * one + 0.5 * two, lane=None)
