"""Verb `skc export RUN`: the artifact of a run is written, read back and scored again, or its weights for others."""

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from core.audit.code import against_reserve, packed_code
from core.config import ConfigError, ExportConfig, RunConfig, require
from core.console import Console
from core.data.dataset import identity
from core.engine.loading import load_engine
from core.engine.optimizer_state import exported
from core.engine.protocol import EngineOptions
from core.scoring.plugins import foreign
from core.training.finish import finish
from core.training.run import Run, RunError
from core.training.writer import hold
from core.verbs.common import (
    Backend,
    Context,
    Outcome,
    check_data,
    open_named,
)


@dataclass(frozen=True)
class Export:
    """Options of `skc export`."""

    run: Positional[str]
    """Run folder; for --format other than artifact also an artifact."""
    format: Literal["artifact", "safetensors", "hf", "mlx-lm", "gguf"] = "artifact"
    """artifact: write, reload and score it; others: its weights in a folder for other libraries (docs/weights.md)."""
    out: str | None = None
    """The folder that is written; None: one of the format's name beside the artifact."""
    step: int | None = None
    """Step of a checkpoint that train.keep_every kept; None: the last one."""
    data: str | None = None
    """Where the run's data are now, or an artifact's tokenizer; None: where they were."""
    backend: Backend = "auto"
    """What scores the artifact."""
    method: Literal["round", "gptq"] | None = None
    """How weights that were trained as they are get their codes; None: by the run's export.method."""
    calibration: Literal["train", "random", "self"] | None = None
    """Text that GPTQ learns from; None: the run's export.calibration."""
    fit: bool = False
    """Make all steps of model.deviations finer or coarser by one factor, so that the artifact fills the budget."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def export_run(options: Export, context: Context) -> Outcome:
    """Write the artifact of a run's checkpoint; not ok if it is over the budget.

    That of an older step goes beside the run's own, whose results stay as they are.
    """
    if options.format != "artifact":
        return _weights(options, context)
    require(options.out is None, f"--out {options.out}: an artifact lies in its run; leave it out, or give --format")
    with hold(Run.open(options.run).path):
        return _export(options, context)


def _weights(options: Export, context: Context) -> Outcome:
    """Write the weights in another format; ConfigError for an option that is about the artifact."""
    from core.verbs.export_weights import export_weights

    own = {"run", "format", "out", "data", "json"}
    given = (f.name for f in dataclasses.fields(Export) if f.name not in own and getattr(options, f.name) != f.default)
    for name in given:
        raise ConfigError(
            f"--{name}: is about how an artifact is written, and --format {options.format} takes the one that is "
            "there: leave it out"
        )
    return export_weights(options.run, options.format, options.out, options.data, context)


def _export(options: Export, context: Context) -> Outcome:
    run = Run.open(options.run)
    run.check()
    run.config = dataclasses.replace(run.config, export=_asked(run.config.export, options))
    saved = run.checkpoint(options.step)
    if saved is None:
        raise RunError(
            f"{run.path}: has no checkpoint yet; train it first: skc train {run.config.preset} --out {run.path}"
        )
    dataset = open_named(options.run, run.config, options.data)
    check_data(run.config, dataset, "give the data that it was trained on with --data PATH")
    if dataset.tokenizer.model != run.tokenizer():
        raise ConfigError(f"{run.path}: its tokenizer.model is not that of {dataset.path}, which has changed since")
    if run.environment().get("data") not in (None, identity(dataset)):
        raise ConfigError(
            f"{run.path}: {dataset.path} holds another text than it was trained on: give that with --data"
        )
    last = run.checkpoint() if options.step is not None else saved
    path = None if last and last.step == saved.step else run.path / f"artifact-step-{saved.step}.skc"
    weights = exported(run.config.model, run.config.train, saved.params, saved.optimizer)
    dtype = "float64" if saved.dtype == "float64" else None  # codes come from the masters: they must not be rounded
    engine = load_engine(options.backend, run.config, weights, EngineOptions(dtype=dtype), saved.quantise)
    with run.open_log() as log, context.say.copied_to(log):
        if strangers := foreign(run.config.eval.plugins):
            again = f"{shlex.quote(str(path or run.artifact_path))} --plugins {shlex.join(run.config.eval.plugins)}"
            run.config = dataclasses.replace(run.config, eval=run.config.eval.plain())
            context.say(
                f"config.json names plug-ins that are not ours ({', '.join(strangers)}): the artifact is scored "
                f"without them; skc eval {again} scores it with them"
            )
        value = finish(run, engine, dataset, saved.step, context.say, path)
        code = _say_code(run.config, context.say)
    value["artifact"]["packed_code"] = code
    size = value["artifact"]["bytes"] + code
    return Outcome(value["artifact"]["within"] and size <= run.config.export.budget, value)


def _asked(export: ExportConfig, options: Export) -> ExportConfig:
    """Return the run's settings of the export with what this command has of its own; ConfigError."""
    own = {n: getattr(options, n) for n in ("method", "calibration") if getattr(options, n) is not None}
    if own.get("method") == "round" and "calibration" not in own:
        own |= {n: getattr(ExportConfig, n) for n in ("calibration", "calibration_tokens", "damping")}
    if options.fit or export.fit:
        code = max(export.code_bytes, *packed_code().values())
        require(
            code < export.budget,
            f"code takes {code:,} bytes, packed as the audit counts it, and export.budget={export.budget:,} leaves "
            "nothing for an artifact to fill: raise export.budget",
        )
        own |= {"fit": True, "code_bytes": code}
    return dataclasses.replace(export, **own)


def _say_code(config: RunConfig, say: Console) -> int:
    """Say how many bytes of code an audit would count, and return that."""
    code = max(packed_code().values())
    say(f"code {code:,} bytes, packed as the audit counts it: {against_reserve(code, config.export.code_bytes)}")
    return code
