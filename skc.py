"""SKC lab as a library: load a trained model, score text with it, let it write. docs/python.md shows how."""

from core.config import ConfigError
from core.data.dataset import DataError
from core.export.artifact import ArtifactError
from core.library import Model, load
from core.runs.listing import list_runs as runs
from core.runs.row import RunRow
from core.scoring.score import Score
from core.training.run import RunError

__all__ = ["ArtifactError", "ConfigError", "DataError", "Model", "RunError", "RunRow", "Score", "load", "runs"]
