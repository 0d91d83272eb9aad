"""What is exported: a run's artifact or a bare one, with the tokenizer and what is recorded of it."""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.audit.legality import MEANING
from core.config import ModelConfig
from core.data.tokenizer import Tokenizer
from core.engine.protocol import Arrays
from core.export.artifact import Artifact, read_artifact
from core.files import read_file
from core.submission.audits import audit_of
from core.submission.folder import SubmissionError
from core.training.run import Run, RunError

MAX_ARTIFACT = 64 << 20


class Exported(NamedTuple):
    """A model that is exported."""

    name: str
    """What it is called: preset and seed."""
    artifact: Artifact
    sha256: str
    """Of the artifact's file."""
    weights: Arrays
    """float32: what is scored."""
    seq: int
    """Tokens of a row that it was trained on."""
    tokenizer: Tokenizer
    score: dict[str, Any] | None
    """What the run recorded of this artifact's score (core.scoring.score.Score); None: nothing."""
    audit: str
    """The verdict of the run's audit in words."""

    @property
    def model(self) -> ModelConfig:
        """The model's settings."""
        return self.artifact.model


def artifact_path(path: str) -> str:
    """Return the artifact that a run or a path means; RunError where there is none."""
    if os.path.isfile(path):
        return path
    run = Run.open(path)
    if not run.artifact_path.is_file():
        raise RunError(
            f"{path}: has no artifact yet, whose weights would be written; write it first: skc export {path}"
        )
    return str(run.artifact_path)


def read_exported(path: str, tokenizer: Tokenizer, seq: int) -> Exported:
    """Read the artifact at `path` and what is recorded beside it; ArtifactError, RunError."""
    artifact = read_artifact(path)
    sha256 = hashlib.sha256(read_file(path, MAX_ARTIFACT)).hexdigest()
    score, audit = _records(Path(path), len(read_file(path, MAX_ARTIFACT)))
    return Exported(_name(artifact.provenance), artifact, sha256, artifact.weights, seq, tokenizer, score, audit)


def narrowed(weights: Arrays) -> Arrays:
    """Return weights as float16 where that has all their values, else as float32: the same numbers in fewer bytes."""
    halves = {name: value.astype(np.float16) for name, value in weights.items()}
    return {name: halves[name] if (halves[name] == value).all() else value for name, value in weights.items()}


def _name(about: dict[str, Any]) -> str:
    """Return preset and seed, as words alone: an artifact comes from anyone, and pages show a card as it is written."""
    preset, seed = str(about.get("preset", "")), about.get("seed")
    name = preset if re.fullmatch(r"[\w.-]{1,64}", preset) else "model"
    return f"{name}, seed {seed}" if type(seed) is int else name


def _records(path: Path, size: int) -> tuple[dict[str, Any] | None, str]:
    """Return the recorded score of the artifact of a run, and the verdict of its audit, in words."""
    if path.name != "artifact.skc" or not (path.parent / "config.json").is_file():
        return None, "not audited: no run lies beside the artifact"
    run = Run.open(path.parent)
    row = next((row for row in reversed(run.metrics()) if "final/artifact" in row), None)
    stored = None if row is None else row["final/artifact"]
    score = stored["score"] if stored is not None and stored["bytes"] == size else None
    try:
        audit, why = audit_of(run, [run])
    except SubmissionError:
        return score, "not audited: its record cannot be read"
    if audit is None:
        return score, "not audited (skc audit)" if "not audited" in why else f"not audited: {why}"
    counts = Counter(finding["verdict"] for finding in audit["findings"])
    broken = [finding["rule"] for finding in audit["findings"] if finding["verdict"] == "FAIL"]
    words = ", ".join(f"{counts[verdict]} {verdict}" for verdict in MEANING)
    return score, words + (f" (broken: {', '.join(broken)})" if broken else "") + ", by skc audit"
