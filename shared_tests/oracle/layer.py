"""A layer by hand."""

import numpy as np

from core.config import ModelConfig
from core.model.layer import KINDS
from core.model.trunk import Stage
from shared_tests.oracle import Array, Stream, Text, Weights, below
from shared_tests.oracle.attention import attention
from shared_tests.oracle.delta import delta
from shared_tests.oracle.experts import experts
from shared_tests.oracle.koopman import koopman
from shared_tests.oracle.mlp import mlp
from shared_tests.oracle.skc import skc
from shared_tests.reference.ops import rms_norm

EXAMPLE = {
    "layers": 5, "shared_blocks": 4, "repeat_layers": (1, 2, 3), "residual_mix": True, "depth_damping": True,
    "output_norm": "gain", "norm_gains": True,
}  # fmt: skip
MIXERS = {"attention": attention, "koopman": koopman, "skc": skc, "delta": delta}


def layer(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return the stream after one pass through a layer."""
    kind, x = KINDS[config.kind(stage.layer)], stream.x
    damp = 1 / np.sqrt(stage.layer + 1) if config.depth_damping else 1.0

    def own(name: str) -> Array:
        """Return a vector: its row of this pass, if there is one for each."""
        return w[name] if w[name].ndim == 1 else w[name][stage.row]

    def normed(y: Array, branch: str) -> Array:
        y = rms_norm(y, config.norm_eps, True) * damp
        return y + y * w[f"{branch}_norm_gain"] if config.norm_gains else y

    def scaled(y: Array, branch: str) -> Array:
        return own(f"{branch}_scale") * y if config.residual_scales else y

    given = x
    if config.feedback.width and stage.layer == config.repeat_layers[0] and not stage.again:
        stream = stream._replace(entered=x)
    if config.residual_mix:
        x = own("stream_mix") * x + own("embed_mix") * stream.embedded
    n = normed(x, "mixer")
    stream = MIXERS[kind.mixer](config, below(w, "mixer."), stream._replace(x=n), stage, text)
    mixed = scaled(stream.x, "mixer")
    if kind.gated:
        mixed = own("gate") * mixed
    if not kind.parallel:
        n = normed(x + mixed if stream.lane is None else stream.lane, "mlp")
    changing = experts if config.experts.within(config, stage.block) else mlp
    stream = changing(config, below(w, "mlp."), stream._replace(x=n), stage, text)
    changed = scaled(stream.x, "mlp")
    if stream.lane is not None:
        return stream._replace(x=given, branches=(mixed, changed))
    if kind.gated:
        changed = changed - own("gate") * changed
    x = x + mixed + changed
    if config.repeat_blend and stage.again:
        x = given + w["blend"][stage.repeat] * (x - given)
    return stream._replace(x=x)
