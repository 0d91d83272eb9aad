"""A layer: a mixer and an MLP, each added to the stream through a scale per channel."""

import torch
import torch.nn as nn

from backends.cuda import ops
from backends.cuda.linear import Site
from backends.cuda.parts import Part
from backends.cuda.parts.attention import Attention
from backends.cuda.parts.delta import Delta
from backends.cuda.parts.experts import Experts
from backends.cuda.parts.koopman import Koopman
from backends.cuda.parts.mlp import MLP
from backends.cuda.parts.skc import SKC
from core.model.layer import KINDS, per_pass

MIXERS = {"attention": Attention, "koopman": Koopman, "skc": SKC, "delta": Delta}


class Layer(Part):
    """One block of weights, which one or several layers use. Letters: B rows, T positions, D width."""

    def __init__(self, config, block, exact):
        super().__init__()
        self._config, self._exact, self._kind = config, exact, KINDS[config.kind(block)]
        shape, repeats = per_pass(config, block, config.dim), config.uses_of(block)[1]
        self.mixer, self.block_mixer, self.block_mlp = MIXERS[self._kind.mixer](config, exact), Site(), Site()
        self.mlp = (Experts if config.experts.within(config, block) else MLP)(config, exact)
        if config.residual_scales:
            self.mixer_scale = nn.Parameter(torch.zeros(shape))
            self.mlp_scale = nn.Parameter(torch.zeros(shape))
        if config.norm_gains:
            self.mixer_norm_gain = nn.Parameter(torch.zeros(config.dim))
            if not self._kind.parallel:
                self.mlp_norm_gain = nn.Parameter(torch.zeros(config.dim))
        if config.residual_mix:
            self.stream_mix = nn.Parameter(torch.zeros(shape))
            self.embed_mix = nn.Parameter(torch.zeros(shape))
        if self._kind.gated:
            self.gate = nn.Parameter(torch.zeros(per_pass(config, block, 1)))
        if config.repeat_blend and repeats:
            self.blend = nn.Parameter(torch.zeros(repeats))

    def norm(self, x_BTD, stage, branch):
        """Return what enters mixer and MLP: a deeper layer's share of the stream is smaller, if damping is on."""
        gain_D = 1 + getattr(self, f"{branch}_norm_gain") if self._config.norm_gains else None
        x_BTD = ops.rms_norm(x_BTD, self._config.norm_eps, self._exact, gain_D)
        return x_BTD * (stage.layer + 1) ** -0.5 if self._config.depth_damping and stage.layer else x_BTD

    def forward(self, stream, context, stage, state):
        x_BTD = given_BTD = stream.x
        if self._config.feedback.width and stage.layer == self._config.repeat_layers[0] and not stage.again:
            stream = stream._replace(entered=given_BTD)  # where repeats begin again

        def own(weight):
            return (weight if weight.ndim == 1 else weight[stage.row]).to(x_BTD.dtype)

        def scaled(branch, y_BTD, which):
            y_BTD = own(getattr(self, f"{branch}_scale")) * y_BTD if self._config.residual_scales else y_BTD
            return _kept(y_BTD, context, stage, which)

        if self._config.residual_mix:
            x_BTD = own(self.stream_mix) * x_BTD + own(self.embed_mix) * stream.embedded
        n_BTD = self.norm(x_BTD, stage, "mixer")
        stream, tape = self.mixer(stream._replace(x=n_BTD), context, stage, state)
        if context.draft is not None and context.draft.mixed is not None:
            context.draft.mixed[stage.label] = stream.x
        mixed_BTD = scaled("mixer", self.block_mixer.beside(n_BTD, stream.x), 0)
        if self._kind.gated:
            mixed_BTD = own(self.gate) * mixed_BTD
        if stream.lane is None:
            x_BTD = x_BTD + mixed_BTD
        # Beside the mixer, the MLP reads the same input: neither waits for the other.
        if not self._kind.parallel:
            n_BTD = self.norm(x_BTD if stream.lane is None else stream.lane, stage, "mlp")
        stream, _ = self.mlp(stream._replace(x=n_BTD), context, stage, None)
        changed_BTD = scaled("mlp", self.block_mlp.beside(n_BTD, stream.x), 1)
        if stream.lane is not None:  # the stage behind the layer adds both to both
            return stream._replace(x=given_BTD, branches=(mixed_BTD, changed_BTD)), tape
        if self._kind.gated:
            changed_BTD = (1 - own(self.gate)) * changed_BTD
        x_BTD = x_BTD + changed_BTD
        if stage.again and self._config.repeat_blend:
            share = self.blend[stage.repeat].to(x_BTD.dtype)
            x_BTD = share * x_BTD + (1 - share) * given_BTD
        return stream._replace(x=x_BTD), tape

    def commit(self, tape, context, n_B):
        """Return the state after the first n tokens of each row of a chunk."""
        return self.mixer.commit(tape, context, n_B)


def _kept(branch_BTD, context, stage, which):
    """Return a pass' mixer (which = 0) or MLP (1), without the rows in which a training step leaves it out."""
    training = context.training
    if training is None or training.kept is None:
        return branch_BTD
    return branch_BTD * training.kept[stage.label][which][:, None, None].to(branch_BTD.dtype)
