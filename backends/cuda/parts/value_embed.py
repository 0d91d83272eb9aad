"""Value embeddings: what attention sums up also holds a vector of the token itself (docs/model.md)."""

import torch
import torch.nn as nn

from backends.cuda import ops
from backends.cuda.linear import Linear
from backends.cuda.parts import Part


class ValueEmbed(Part):
    """Say what chosen attention layers add to the values of every token. Letters: B rows, T positions, E width of the
    table, C channels of all key/value heads."""

    def __init__(self, config, exact):
        super().__init__()
        self._layers, width = config.value_embed.layers, config.value_embed.dim
        self.table = nn.Parameter(torch.zeros(config.vocab, width))
        self.proj = Linear(width, config.value_embed.width(config))
        self.scale = nn.Parameter(torch.zeros(1))
        self.gains = nn.Parameter(torch.zeros(len(self._layers)))

    def forward(self, stream, context, stage, state):
        ids_BT, _ = context.last_ids(0)
        rows_BTE = ops.embedding(ids_BT if context.draft is None else torch.clamp(ids_BT, min=0), self.table)
        rows_BTE = rows_BTE.to(stream.x.dtype)
        if context.draft is not None:  # a mask has no row
            rows_BTE = torch.where((ids_BT < 0)[..., None], 0.0, rows_BTE)
        shared_BTC = self.scale.to(rows_BTE.dtype) * self.proj(rows_BTE)
        gains = self.gains.to(rows_BTE.dtype)
        return stream._replace(to_values={layer: gains[i] * shared_BTC for i, layer in enumerate(self._layers)}), None
