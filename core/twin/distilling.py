"""A twin in place of an engine, so that the training loop distils it: its steps, its folder, its checkpoints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from core.config import ConfigError, RunConfig, flattened, to_json
from core.data.batch import Batch
from core.data.dataset import Dataset, Split
from core.engine.plan import StepPlan
from core.engine.protocol import Arrays, Engine, StepResult
from core.files import own_folder
from core.training.checkpoint import Checkpoint, read_arrays
from core.training.records import RunError, of_a_run, read_object
from core.training.run import Run
from core.training.writer import refuse_strangers
from core.twin.anchors import draw_anchors
from core.twin.distill_config import DistillConfig
from core.twin.params import twin_rows
from core.twin.protocol import Twin

RECORD = "distill.json"
FREE = ("distill.log_every", "distill.save_every", "distill.report_")
"""Settings that may change when a distillation goes on."""


class Learned:
    """A step that is over when it was begun."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        """Return the step's numbers."""
        return self._result


class TwinLearner:
    """What the training loop asks of an engine, answered by a twin; the model itself never changes."""

    quantise = False

    def __init__(self, engine: Engine, twin: Twin, settings: DistillConfig, bos: int) -> None:
        self.backend, self.device, self.dtype, self.ranks = engine.backend, engine.device, engine.dtype, engine.ranks
        self._engine, self._twin, self._settings, self._bos = engine, twin, settings, bos

    def train_step(self, batch: Batch, plan: StepPlan) -> Learned:
        """Take one step on blocks of the rows; where they begin follows from the seed and the step."""
        how = self._settings
        anchors = draw_anchors(batch.tokens, self._bos, how.twin.block, how.anchors, how.seed, f"anchors/{plan.step}")
        weights = how.place_weights()
        return Learned(self._twin.step(batch.tokens, anchors, weights, how.loss, plan.lr_matrix, how.clip))

    def params(self) -> Arrays:
        """Return the twin's weights."""
        return self._twin.params()

    def load_params(self, params: Arrays, quantise: bool = False) -> None:
        """Replace the twin's weights; nothing of it is ever quantised."""
        self._twin.load_params(params)

    def optimizer(self) -> Arrays:
        """Return the state of the twin's optimizer, all of it floats, as checkpoints hold it."""
        state = self._twin.optimizer()
        return {**state, "steps": np.asarray(state["steps"], np.float64)}

    def load_optimizer(self, state: Arrays) -> None:
        """Replace the state of the twin's optimizer."""
        self._twin.load_optimizer({**state, "steps": np.asarray(state["steps"], np.int64)})

    def stats(self) -> dict[str, float]:
        """Return what the device tells."""
        return self._engine.stats()


class TwinRun(Run):
    """The folder of a distillation: distill.json, metrics.jsonl, log.txt, state/ and its own text."""

    def __init__(self, path: Path, config: RunConfig, settings: DistillConfig) -> None:
        super().__init__(path, config)
        self.settings = settings

    @classmethod
    def begin(cls, path: Path, config: RunConfig, settings: DistillConfig, origin: dict[str, Any]) -> "TwinRun":
        """Make the folder, or go on in the one that is there if it is of the same settings and `origin`.

        `origin`: what names the frozen artifact and the data. ConfigError lists what differs, RunError says what is
        damaged. Whoever calls this holds the folder.
        """
        refuse_strangers(path, RECORD)
        run, record = cls(path, config, settings), path / RECORD
        now = {"distill": to_json(settings), **origin}
        if record.exists() and run.checkpoint_path.exists():
            then = read_object(record)
            lines = [line for line in _differences(then, now) if not line.startswith(FREE)]
            if lines:
                raise ConfigError(
                    f"{path} holds a distillation with other settings ({'; '.join(lines)}): choose another --out, or "
                    "repeat them"
                )
        with of_a_run():
            own_folder(path / "state")
            run._write_json(record, now)
        run.metrics()
        return run

    def read(self, path: Path) -> Checkpoint:
        """Return a checkpoint of the twin; RunError, OSError."""
        table = {name: row.shape for name, row in twin_rows(self.config.model, self.settings.twin).items()}
        slots = {f"{name}.{slot}": shape for slot in "mv" for name, shape in table.items()} | {"steps": (1,)}
        return read_arrays(path, table, slots, self.config.train.tokens_per_step)


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what differs between two records, `name: old -> new`."""
    old, new = ({name: json.dumps(value) for name, value in flattened(record).items()} for record in (then, now))
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return [f"{name}: {old.get(name, 'null')} -> {new.get(name, 'null')}" for name in names]


def reading(dataset: Dataset, rows: np.ndarray | None) -> Dataset:
    """Return the data that a twin learns from: `rows` (count, seq) of own text in place of the training text, if any.

    Its manifest says nothing of bytes: a divergence is not in bits per byte.
    """
    train = dataset.train
    if rows is not None:
        stream = np.append(rows.reshape(-1), np.int32(dataset.tokenizer.bos))  # windows of seq + 1 then begin at rows
        train = Split([stream], dataset.tokenizer, "own text")
    manifest = {**dataset.manifest, "splits": {**dataset.manifest["splits"], "train": {}}}
    return dataclasses.replace(dataset, train=train, manifest=manifest)


def check_frozen(before: str, after: str) -> None:
    """Raise RunError if the frozen weights are not what they were: no twin may be trusted then."""
    if before != after:
        raise RunError(f"the frozen weights changed while the twin learned: {before[:12]} before, {after[:12]} after")
