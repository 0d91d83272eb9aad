"""Second moments for GPTQ: from training text inside the training clock, or without any text of others."""

from core.checks import ConfigError
from core.config import RunConfig
from core.console import Console
from core.data.batches import batch
from core.data.dataset import Dataset
from core.decoding.generate import written_rows
from core.engine.protocol import Arrays, Engine
from core.engine.ranks import agree, share
from core.export.calibration import mean_moments, uniform_rows
from core.model.params import param_table
from core.model.storage import gridded
from core.training.run import Run


def calibrate(run: Run, engine: Engine, dataset: Dataset, step: int, taken: int, say: Console) -> None:
    """Keep the moments of training text in the run folder, if GPTQ is to have those: for what comes after the clock.

    A clock that ended in an earlier start, with no step `taken` in this one, stays where it is.
    """
    export, clock = run.config.export, run.config.train.seconds is not None
    if export.method == "gptq" and export.calibration == "train" and (taken or not clock):
        run.keep_moments(_gathered(run.config, engine, dataset, say), _key(run.config, step))


def check_kept(run: Run, step: int) -> None:
    """Raise what `moments_of` would for the weights of `step`, before anything is given up for them."""
    export, clock = run.config.export, run.config.train.seconds is not None
    if (
        export.method == "gptq"
        and export.calibration == "train"
        and clock
        and run.kept_moments(_key(run.config, step)) is None
    ):
        raise _too_late(run)


def moments_of(run: Run, engine: Engine, dataset: Dataset, step: int, say: Console) -> Arrays:
    """Return the moments that GPTQ is to have for the weights of `step`; on ranks other than 0 maybe none.

    ConfigError where they are of training text, were not kept and the training clock has ended; RunError for a file of
    moments that is damaged.
    """
    config, train = run.config, run.config.export.calibration == "train"
    kept = run.kept_moments(_key(config, step)) if train else None
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


def _key(config: RunConfig, step: int) -> str:
    """Return what the moments of training text depend on, beside the settings that a run cannot change."""
    return f"step {step}, {config.export.calibration_tokens} tokens"
