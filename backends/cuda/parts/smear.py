"""Smear: every token's embedding knows a little of the token before (docs/model.md)."""

import torch
import torch.nn as nn

from backends.cuda import ops
from backends.cuda.parts import Part


class Smear(Part):
    """Mix a learned share of the previous token's embedding into every token's.

    Letters: B rows, T positions, X positions with the one before, D width, W channels that the gate reads.
    """

    def __init__(self, config, exact):
        super().__init__()
        self._form, self._exact = config.smear.form, exact
        if self._form == "window":
            self.gate = nn.Parameter(torch.zeros(config.smear.width))
            self.scale = nn.Parameter(torch.zeros(1))
        else:
            self.share = nn.Parameter(torch.zeros(config.dim))

    def forward(self, stream, context, stage, state):
        x_BTD = stream.x
        last_B1D = torch.zeros_like(x_BTD[:, :1]) if state is None else state
        rows_BXD = torch.cat([last_B1D, x_BTD], dim=1)
        share = self._share(x_BTD, context.wide).to(x_BTD.dtype)
        kept_BTD = (1 - share) * x_BTD if self._form == "lerp" else x_BTD
        y_BTD = kept_BTD + share * torch.where(context.continues[..., None], rows_BXD[:, :-1], 0.0)
        return stream._replace(x=y_BTD, embedded=y_BTD), rows_BXD

    def _share(self, x_BTD, wide):
        """Return the share of the token before: of every channel (D,), or of every token (B, T, 1)."""
        if self._form != "window":
            return ops.sigmoid(self.share, self._exact)
        # A sum of a few products: in bfloat16 it would be good to two digits.
        read_BTW = x_BTD[..., : self.gate.shape[0]].to(wide)
        return self.scale * ops.sigmoid(torch.sum(read_BTW * self.gate, dim=-1, keepdim=True), self._exact)

    def commit(self, tape, context, n_B):
        """Return the state after the first n tokens of each row of a chunk."""
        # The tape begins with the state's own row: at n it has the last that is kept.
        return ops.pick(tape, n_B)[:, None]
