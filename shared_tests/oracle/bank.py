"""The bank, token by token."""

from core.config import ModelConfig
from core.model.trunk import Stage
from shared_tests.oracle import Stream, Text, Weights, below
from shared_tests.oracle.capsules import capsules
from shared_tests.reference.ops import linear, rms_norm

EXAMPLE = {"bank.at": "both", "bank.heads": 2, "bank.capsules": 3, "bank.ahead": True}


def bank(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return the stream, in front of the head its norm, with what the bank reads for each token."""
    f = rms_norm(stream.x, config.norm_eps, True)
    read, store = linear(f, w["route.weight"]), config.bank.store(config)
    write = read + w["write_bias"]
    y, losses = capsules(store, config.norm_eps, below(w, "capsules."), write, read, stream.values, text)
    x = f if stage.name == "bank_head" else stream.x
    x = x + w["gate"] * rms_norm(y, config.norm_eps, True)
    return stream._replace(x=x, auxiliary=stream.auxiliary + losses)
