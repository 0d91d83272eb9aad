"""A layer: a mixer and an MLP, each added to the stream through a scale per channel."""

import torch
import torch.nn as nn

from backends.cuda import ops
from backends.cuda.parts import Part
from backends.cuda.parts.attention import Attention
from backends.cuda.parts.koopman import Koopman
from backends.cuda.parts.mlp import MLP
from backends.cuda.parts.skc import SKC
from core.model.layer import KINDS

MIXERS = {"attention": Attention, "koopman": Koopman, "skc": SKC}


class Layer(Part):
    """One block of weights, which one or several layers use. Letters: B rows, T positions, D width."""

    def __init__(self, config, block, exact):
        super().__init__()
        self._config, self._exact = config, exact
        kind, passes = KINDS[config.kind(block)], sum(config.uses_of(block))
        shape = (config.dim,) if passes == 1 else (passes, config.dim)
        self._parallel = kind.parallel
        self.mixer = MIXERS[kind.mixer](config, exact)
        self.mixer_scale = nn.Parameter(torch.zeros(shape))
        self.mlp = MLP(config, exact)
        self.mlp_scale = nn.Parameter(torch.zeros(shape))
        if config.residual_mix:
            self.stream_mix = nn.Parameter(torch.zeros(shape))
            self.embed_mix = nn.Parameter(torch.zeros(shape))

    def norm(self, x_BTD, stage):
        """Return what enters mixer and MLP: a deeper layer's share of the stream is smaller, if damping is on."""
        x_BTD = ops.rms_norm(x_BTD, self._config.norm_eps, self._exact)
        return x_BTD * (stage.layer + 1) ** -0.5 if self._config.depth_damping and stage.layer else x_BTD

    def forward(self, stream, context, stage, state):
        x_BTD = stream.x

        def scale_D(weight):
            return (weight if weight.ndim == 1 else weight[stage.row]).to(x_BTD.dtype)

        if self._config.residual_mix:
            x_BTD = scale_D(self.stream_mix) * x_BTD + scale_D(self.embed_mix) * stream.embedded
        n_BTD = self.norm(x_BTD, stage)
        stream, tape = self.mixer(stream._replace(x=n_BTD), context, stage, state)
        x_BTD = x_BTD + scale_D(self.mixer_scale) * stream.x
        # Beside the mixer, the MLP reads the same input: neither waits for the other.
        n_BTD = n_BTD if self._parallel else self.norm(x_BTD, stage)
        stream, _ = self.mlp(stream._replace(x=n_BTD), context, stage, None)
        return stream._replace(x=x_BTD + scale_D(self.mlp_scale) * stream.x), tape

    def commit(self, tape, context, n_B):
        """Return the state after the first n tokens of each row of a chunk."""
        return self.mixer.commit(tape, context, n_B)
