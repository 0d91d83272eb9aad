"""The MLP by hand."""

from core.config import ModelConfig
from core.model.trunk import Stage
from shared_tests.oracle import Stream, Text, Weights, output
from shared_tests.reference.ops import leaky_relu2, linear, relu2, silu

EXAMPLE = {"mlp.hidden": 48}


def mlp(config: ModelConfig, w: Weights, stream: Stream, stage: Stage, text: Text) -> Stream:
    """Return down(activation(up(x))), or down(silu(gate(x)) * up(x))."""
    if config.mlp.activation == "swiglu":
        gate, up = (linear(stream.x, w[f"{name}.weight"]) for name in ("gate", "up"))
        return stream._replace(x=output(config, w, "down", silu(gate, True) * up))
    activation = {"relu2": relu2, "leaky_relu2": leaky_relu2}[config.mlp.activation]
    return stream._replace(x=output(config, w, "down", activation(linear(stream.x, w["up.weight"]), True)))
