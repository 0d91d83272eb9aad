"""An SKC mixer, token by token: a Koopman mixer and a store of capsules."""

from core.config import ModelConfig
from core.model.trunk import Stage
from shared_tests.oracle import Stream, Text, Weights, below
from shared_tests.oracle.capsules import capsules
from shared_tests.oracle.koopman import gated, recur
from shared_tests.reference.ops import linear, rms_norm

EXAMPLE = {
    "blocks": ("skc", "skc_parallel"), "koopman.dim": 16, "skc.capsules": 5, "skc.heads": 2, "skc.block": 8,
    "skc.intra": 0.25, "skc.ahead": True,
}  # fmt: skip


def skc(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return what an SKC mixer of the normalised stream puts out."""
    n = stream.x
    s, z = recur(config, w, n, text.starts)
    write, read = linear(n, w["write.weight"]) + w["write_bias"], linear(n, w["read.weight"])
    y, losses = capsules(config.skc.store(config), config.norm_eps, below(w, "capsules."), write, read, s, text)
    z = z + rms_norm(y, config.norm_eps, True) * w["capsule_gain"]
    return stream._replace(x=gated(config, w, n, z), auxiliary=stream.auxiliary + losses)
