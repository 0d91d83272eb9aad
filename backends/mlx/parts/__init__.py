"""One file for each part of the model, of the name that it has in core/model.

A part is called with (stream, context, stage, state) and returns (stream, tape); `commit` makes its next state of the
tape. State and tape are None for a part that keeps nothing. The mixer and the MLP of a layer are parts too, which the
layer calls.
"""

import mlx.nn as nn


class Part(nn.Module):
    """A part that keeps nothing of what it has read."""

    def commit(self, tape, context, n_B):
        """Return the state after the first n tokens of each row of a chunk."""
        return None
