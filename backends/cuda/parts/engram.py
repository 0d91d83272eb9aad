"""EngramHash: rows of hashed n-gram tables, added to the stream through a gate (docs/model.md)."""

import torch
import torch.nn as nn

from backends.cuda import ops
from backends.cuda.linear import Linear
from backends.cuda.parts import Part


class Engram(Part):
    """Add rows of hashed n-gram tables to the stream, through a gate that compares them with it. Letters: B rows,
    T positions, D width, W width of all tables together, N tables."""

    def __init__(self, config, exact):
        super().__init__()
        self._config, self._exact, engram = config, exact, config.engram
        tables = engram.orders * engram.heads
        width = engram.dim // tables
        self.table = nn.Parameter(torch.zeros(tables * engram.buckets, width))
        self.value = Linear(engram.dim, config.dim)
        self.key = Linear(engram.dim, config.dim)
        self.sharpness = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, stream, context, stage, state):
        config, exact, x_BTD = self._config, self._exact, stream.x
        kind = x_BTD.dtype
        ids, documents = context.last_ids(config.engram.orders)
        rows_BTN = ops.ngram_buckets(ids, documents, config.engram.multipliers, config.engram.buckets)
        m_BTW = ops.hashed_rows(self.table, rows_BTN).to(kind)
        # The gate is a mean of D products: in bfloat16 it would be good to two digits.
        x_norm_BTD = ops.rms_norm(x_BTD, config.norm_eps, exact).to(context.wide)
        key_BTD = ops.rms_norm(self.key(m_BTW), config.norm_eps, exact).to(context.wide)
        # Both normalised, it is a cosine: how large a row is says nothing about whether it fits.
        alike_BT1 = torch.mean(x_norm_BTD * key_BTD, dim=-1, keepdim=True)
        sharpness = 0.1 + 3.9 * ops.sigmoid(self.sharpness, exact)  # from 0.1 to 4: it never turns the gate round
        gate_BT1 = ops.sigmoid(sharpness * alike_BT1 + self.bias, exact)
        return stream._replace(x=x_BTD + gate_BT1.to(kind) * self.value(m_BTW)), None
