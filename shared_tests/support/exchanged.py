"""Artifacts and scores that one backend makes and the other reads."""

from pathlib import Path

import numpy as np

from core.config import RunConfig
from core.engine.protocol import Engine
from core.export.artifact import Artifact, read_artifact, write_artifact
from shared_tests.support.harness import tokens


def export(made: Engine, config: RunConfig, path: Path) -> Artifact:
    """Write what an engine stores and read it again."""
    words = {"tokenizer_sha256": "0" * 64, "provenance": {"preset": config.preset}}
    write_artifact(path, config.model, made.quantised(), **words)
    return read_artifact(path)


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], what: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value.dtype, value.tobytes()) == (theirs[name].dtype, theirs[name].tobytes()), f"{what}: {name}"


def rows_of(config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    rows = tokens("score", 8, 65, config.model.vocab, config.model.bos)
    return rows[:, :-1], rows[:, 1:]
