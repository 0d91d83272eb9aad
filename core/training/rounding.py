"""How the weights of a run get their codes after training: plain rounding or GPTQ, on steps that may fit the budget."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

from core.config import RunConfig
from core.console import Console
from core.engine.protocol import Arrays, Engine
from core.export.gptq import Solver, compensate, compensated
from core.model.params import param_table
from core.model.storage import Stored, decode

Scalar = str | int | float


class Codes(NamedTuple):
    """What an artifact is to hold."""

    stored: dict[str, Stored]
    plain: Arrays | None
    """Where codes are GPTQ's: the weights that plain rounding would have stored, on the same steps."""
    provenance: dict[str, Scalar]
    """What the artifact says of how they were chosen."""

    def weights(self, config: RunConfig) -> Arrays:
        """Return the float32 weights that the codes stand for."""
        return decoded(self.stored, config)


def chosen_codes(
    engine: Engine, config: RunConfig, moments: Arrays, say: Console, size: Callable[[Codes], int]
) -> Codes:
    """Return the codes that config.export asks for, given moments for GPTQ; `size`: an artifact's bytes."""
    rounded, export = engine.quantised(), config.export
    if export.method == "round":
        return Codes(rounded, None, {})
    say(f"GPTQ chooses the codes of {len(moments)} matrices")
    table = param_table(config.model)
    stored = compensate(rounded, engine.weights(), moments, table, export.damping, solver(engine))
    about: dict[str, Scalar] = {"method": "gptq", "damping": export.damping, "calibration": export.calibration}
    about["calibration_tokens"] = export.calibration_tokens
    return Codes(stored, decoded(rounded, config), about)


def solver(engine: Engine) -> Solver:
    """Return what runs GPTQ beside an engine: PyTorch on its GPU, numpy elsewhere."""
    if engine.backend == "cuda" and not engine.device.startswith("CPU"):
        return importlib.import_module("backends.cuda.gptq").compensated
    return compensated


def decoded(stored: dict[str, Stored], config: RunConfig) -> Arrays:
    """Return the float32 weights that codes and scales stand for."""
    table = param_table(config.model)
    return {name: decode(kept, table[name].storage) for name, kept in stored.items()}
