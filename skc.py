"""SKC lab as a library: train, list, load, score, sample, ablate. docs/python.md shows how."""

from core.ablation.records import StoreError
from core.ablation.search.search import SearchError
from core.config import ConfigError
from core.data.dataset import DataError
from core.decoding.text_state import TextState
from core.export.artifact import ArtifactError
from core.files import FileError
from core.library.model import Model, load
from core.library.work import AblationRows, TrainedRun
from core.library.work import ablate_plan as ablate
from core.library.work import train_preset as train
from core.runs.listing import list_runs as runs
from core.runs.row import RunRow
from core.scoring.score import Score
from core.training.loop import NonFiniteError
from core.training.run import RunError

__all__ = [
    "AblationRows", "ArtifactError", "ConfigError", "DataError", "FileError", "Model", "NonFiniteError", "RunError",
    "RunRow", "Score", "SearchError", "StoreError", "TextState", "TrainedRun", "ablate", "load", "runs", "train",
]  # fmt: skip
