"""What the matrices of a trained model get to read: second moments over training text, for `skc info --statistics`."""

from typing import Any, NamedTuple

import numpy as np

from core.config import ConfigError, RunConfig
from core.data.batches import batch
from core.data.dataset import Dataset
from core.engine.loading import load_engine
from core.engine.memory import enough_memory
from core.engine.protocol import Engine
from core.export.calibration import AT_ONCE, summed
from core.verbs.common import Backend, Context, check_tokenizer, open_named, open_subject

TOKENS = 1 << 16
"""Tokens of training text that are read."""


class Reader(NamedTuple):
    """Trained weights and the text that they are to read."""

    engine: Engine
    dataset: Dataset
    config: RunConfig


def open_reader(path: str | None, config: RunConfig, backend: Backend) -> Reader:
    """Return the weights of a run or artifact and its training text; ConfigError unless `config` is of its model."""
    if path is None:
        raise ConfigError(f"--statistics are of trained weights, not of preset {config.preset}: name a run instead")
    subject = open_subject(path, None)
    if subject.config.model != config.model:
        raise ConfigError(f"--statistics are of the model that {path} holds: leave out other settings of it")
    dataset = open_named(path, config, None, option="--data.path")
    check_tokenizer(subject, dataset, "--data.path")
    return Reader(load_engine(backend, config, subject.weights, quantise=subject.quantise), dataset, config)


def statistics(reader: Reader, context: Context) -> dict[str, Any]:
    """Show trace, largest and mean diagonal of the sum of a a^T of what enters each matrix; return them as JSON."""
    (engine, dataset, config), say = reader, context.say
    seq = config.train.seq
    rows = max(1, AT_ONCE // seq)
    count = max(1, min(TOKENS, len(dataset.train)) // (rows * seq))
    text = batch(dataset.train, 0, count * rows, seq, config.seed).tokens
    with enough_memory(config.model, rows, seq, "--train.seq", training=False):
        moments = summed(engine, text, rows, say.progress("reading training text"))
    tokens, matrices = count * rows * seq, {}
    for name, moment in moments.items():
        sums = np.diagonal(moment)
        matrices[name] = {"trace": float(sums.sum()), "largest": float(sums.max()), "mean": float(sums.mean())}
    say()
    say(f"second moments of what enters each matrix: sums of a a^T over {tokens:,} tokens of {dataset.path}")
    table = [(n, len(moments[n]), *(f"{value:.4g}" for value in row.values())) for n, row in matrices.items()]
    say.table(("matrix", "inputs", "trace", "largest", "mean"), table)
    return {"tokens": tokens, "backend": engine.backend, "matrices": matrices}
