"""Two lanes: from some layer on attention reads one stream, the MLP another, and both write both."""

import mlx.core as mx

from backends.mlx.parts import Part


class Lanes(Part):
    """Begin the second lane, or add what a layer's branches computed to both. Letters: B rows, T positions, D width."""

    def __init__(self, config, exact):
        super().__init__()
        self._last = config.layers - 1
        self.write = mx.zeros((config.layers, 2, 2))
        self.keep = mx.zeros((config.layers, 2))

    def __call__(self, stream, context, stage, state):
        if stage.row < 0:
            return stream._replace(lane=stream.x), None
        mixed_BTD, changed_BTD = stream.branches
        write_22, keep_2 = (weight[stage.row].astype(stream.x.dtype) for weight in (self.write, self.keep))
        x_BTD, lane_BTD = (
            keep_2[i] * old_BTD + write_22[0][i] * mixed_BTD + write_22[1][i] * changed_BTD
            for i, old_BTD in enumerate((stream.x, stream.lane))
        )
        if stage.layer == self._last:
            x_BTD, lane_BTD = (x_BTD + lane_BTD) / 2, None
        return stream._replace(x=x_BTD, lane=lane_BTD, branches=()), None
