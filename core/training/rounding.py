"""How the weights of a run get their codes after training: plain rounding or GPTQ, on steps that may fit the budget."""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from core.config import RunConfig
from core.console import Console
from core.engine.protocol import Arrays, Engine
from core.export.fit import SLACK, fit_factor
from core.export.gptq import Solver, compensate, compensated
from core.model.params import param_table
from core.model.storage import LARGEST, Stored, decode, group_size, scales_of, storage_class
from core.model.table import Param

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
    """Return the codes that config.export asks for, given moments for GPTQ; `size`: an artifact's bytes.

    FitError where no step makes the artifact fit, RoundingError for a tensor whose codes GPTQ cannot choose.
    """
    export, rounded = config.export, engine.quantised()
    if export.method == "round" and not export.fit:
        return Codes(rounded, None, {})
    weights, table = engine.weights(), param_table(config.model)
    about: dict[str, Scalar] = {}
    if export.method == "gptq":
        say(f"GPTQ chooses the codes of {len(moments)} matrices")
        about = {"method": "gptq", "damping": export.damping, "calibration": export.calibration}
        about["calibration_tokens"] = export.calibration_tokens

    def codes(factor: float | None) -> Codes:
        own = {} if factor is None else {"step_factor": factor}
        plain = stored = rounded if factor is None else stepped(rounded, weights, table, factor)
        if export.method == "gptq":
            stored = compensate(plain, weights, moments, table, export.damping, solver(engine))
        return Codes(stored, decoded(plain, config) if stored is not plain else None, about | own)

    if not export.fit:
        return codes(None)
    room, fitting = export.budget - export.code_bytes, {}

    def bytes_at(factor: float) -> int:
        trial = codes(factor)
        taken = size(trial)
        say(f"steps x {factor:.4f}: {taken:,} bytes, room for {room:,}")
        if taken <= room:
            fitting.clear()  # the search answers with the last one that fits
            fitting[factor] = trial
        return taken

    fit = fit_factor(bytes_at, room, round(SLACK * export.budget))
    say(fit.words(room))
    return fitting[fit.factor]


def stepped(stored: dict[str, Stored], weights: Arrays, table: dict[str, Param], factor: float) -> dict[str, Stored]:
    """Return `stored` with all steps by deviations `factor` times as large, and codes rounded to them."""
    result = dict(stored)
    for name, row in table.items():
        if row.deviation is None:
            continue
        weight, columns, largest = weights[name], row.shape[1], LARGEST[storage_class(row.storage)]
        scales = scales_of(weight, row.storage, factor * row.deviation)
        steps = np.repeat(scales.astype(weight.dtype), group_size(row.storage, columns), 1)[:, :columns]
        result[name] = Stored(np.clip(np.rint(weight / steps), -largest, largest).astype(np.int8), scales)
    return result


def solver(engine: Engine) -> Solver:
    """Return what runs GPTQ beside an engine: PyTorch on its GPU, numpy elsewhere."""
    if engine.backend == "cuda" and not engine.device.startswith("CPU"):
        return importlib.import_module("backends.cuda.gptq").compensated
    return compensated


def decoded(stored: dict[str, Stored], config: RunConfig) -> Arrays:
    """Return the float32 weights that codes and scales stand for."""
    table = param_table(config.model)
    return {name: decode(kept, table[name].storage) for name, kept in stored.items()}
