"""Second moments for GPTQ: from training text inside the training clock, or without any text of others."""

from pathlib import Path

import numpy as np

from core.checks import ConfigError
from core.config import RunConfig
from core.console import Console
from core.data.dataset import Dataset, batch
from core.decoding.generate import written_rows
from core.engine.protocol import Arrays, Engine
from core.engine.ranks import agree, share
from core.export.calibration import mean_moments, uniform_rows
from core.files import FileError
from core.formats.tensors import read_tensors, write_tensors
from core.model.params import check_arrays, param_table
from core.model.storage import gridded
from core.training.records import RunError
from core.training.run import Run

SLACK = 1 << 16


def calibrate(run: Run, engine: Engine, dataset: Dataset, step: int, taken: int, say: Console) -> None:
    """Keep the moments of training text in the run folder, if GPTQ is to have those: for what comes after the clock.

    A clock that ended in an earlier start, with no step `taken` in this one, stays where it is.
    """
    export, clock = run.config.export, run.config.train.seconds is not None
    if export.method == "gptq" and export.calibration == "train" and (taken or not clock):
        moments = _gathered(run.config, engine, dataset, say)
        if engine.ranks.rank == 0:
            write_tensors(_place(run), moments, {"of": _key(run.config, step), "tensors": str(len(moments))})


def check_kept(run: Run, step: int) -> None:
    """Raise what `moments_of` would for the weights of `step`, before anything is given up for them."""
    export, clock = run.config.export, run.config.train.seconds is not None
    if export.method == "gptq" and export.calibration == "train" and clock and _kept(run, step) is None:
        raise _too_late(run)


def moments_of(run: Run, engine: Engine, dataset: Dataset, step: int, say: Console) -> Arrays:
    """Return the moments that GPTQ is to have for the weights of `step`; on ranks other than 0 maybe none.

    ConfigError where they are of training text, were not kept and the training clock has ended; RunError for a file of
    moments that is damaged.
    """
    config, train = run.config, run.config.export.calibration == "train"
    kept = _kept(run, step) if train and engine.ranks.rank == 0 else None
    if agree(engine.ranks, kept is not None):
        return kept or {}
    if train and config.train.seconds is not None:
        raise _too_late(run)
    return _gathered(config, engine, dataset, say)


def _too_late(run: Run) -> ConfigError:
    return ConfigError(
        f"{run.path}: export.calibration=train reads training text inside train.seconds, which have passed without "
        "it: take random, or self, which read none"
    )


def _gathered(config: RunConfig, engine: Engine, dataset: Dataset, say: Console) -> Arrays:
    """Return the moments over this run's calibration text, of matrices with grids."""
    export, seq, ranks = config.export, config.train.seq, engine.ranks
    total = max(1, ranks.world, export.calibration_tokens // seq)
    part = share(total, ranks)
    if export.calibration == "train":
        rows, what = batch(dataset.train, 0, total, seq, config.seed, part).tokens, "training text"
    elif export.calibration == "random":
        rows, what = uniform_rows(total, seq, config.model.vocab, config.seed, part), "random tokens"
    else:
        rows, what = written_rows(engine, total, seq, config.model.bos, config.seed, part), "text of its own"
    say(f"GPTQ learns what matrices multiply from {total * seq:,} tokens of {what}")
    means = mean_moments(engine, rows, total, say.progress(f"reading {what}"))
    table = param_table(config.model)
    return {name: moment for name, moment in means.items() if gridded(table[name].storage)}


def _place(run: Run) -> Path:
    return run.path / "state" / "moments.safetensors"


def _key(config: RunConfig, step: int) -> str:
    """Return what the moments of training text depend on, beside the settings that a run cannot change."""
    return f"step {step}, {config.export.calibration_tokens} tokens"


def _kept(run: Run, step: int) -> Arrays | None:
    """Return the moments of `step` that the run folder keeps, None if it keeps none of them; RunError."""
    path = _place(run)
    if not path.exists():
        return None
    table = {name: row.shape for name, row in param_table(run.config.model).items() if gridded(row.storage)}
    squares = {name: (shape[-1],) * 2 for name, shape in table.items()}
    try:
        metadata, arrays = read_tensors(path, SLACK + sum(512 + 4 * np.prod(s, dtype=int) for s in squares.values()))
        check_arrays(arrays, {name: squares.get(name, ()) for name in arrays}, str(path))
        if metadata.get("tensors") != str(len(arrays)):
            raise ValueError(f"{path}: {len(arrays)} tensors, expected {metadata.get('tensors')}")
    except (FileError, ValueError) as error:
        raise RunError(f"{error}; delete it and export again, or take another export.calibration") from error
    return arrays if metadata.get("of") == _key(run.config, step) else None
