"""What the verbs share: options of a preset, and how a run, an artifact or a text is opened and checked."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from tyro.conf import FlagConversionOff, Suppress

from core import presets
from core.checks import in_words
from core.config import (
    MOST_TOKENS,
    ConfigError,
    DataConfig,
    EvalConfig,
    ExportConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    require,
    to_json,
)
from core.console import Console
from core.data.batches import batch
from core.data.bundled import SAMPLES, open_data
from core.data.dataset import Dataset, identity
from core.data.tokenizer import Tokenizer
from core.data.user_text import DEFAULT, Cutting, is_text, prepare_user_text
from core.engine.loading import load_engine
from core.engine.optimizer_state import exported
from core.engine.protocol import Arrays, Engine
from core.engine.ranks import Ranks, check_same
from core.export.artifact import ArtifactError, read_artifact
from core.scoring.accounting import count_bytes
from core.training.environment import code_version
from core.training.run import Run, RunError

Backend = Literal["auto", "mlx", "cuda", "torch"]
TOKENS = ("vocab", "bos")
"""Fields of a model that say which tokenizer it reads."""


class Context(NamedTuple):
    """What a verb gets beside its options."""

    say: Console
    command: str
    """The command line, as it could be typed again."""
    load: Callable[..., Engine] = load_engine
    """How `skc train` gets its engine; the worker of an ablation hands out the same one for every seed."""
    began: float = 0.0
    """When the program began, by time.monotonic."""
    verbs: Collection[str] = ()
    """The verbs that there are, of which a verb may name those that come next."""


class Outcome(NamedTuple):
    """What a verb returns: the exit code is 0 if `ok`, else 1, and `value` is its JSON object."""

    ok: bool
    value: dict[str, Any]


@dataclass(frozen=True)
class PresetOptions:
    """The settings of a preset, each of which an option may replace."""

    preset: Suppress[str] = "debug"
    seed: int = RunConfig.seed
    """Seed of the start values and of the order of the data."""
    model: FlagConversionOff[ModelConfig] = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: FlagConversionOff[TrainConfig] = field(default_factory=TrainConfig)
    eval: FlagConversionOff[EvalConfig] = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    given: Suppress[tuple[str, ...]] = ()
    """Options that the command line has; all others are the preset's."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """Return the options that stand for `config`."""
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(RunConfig)})

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the options that stand for preset `name`; ConfigError."""
        return cls.of(presets.get(name).config)

    def config(self) -> RunConfig:
        """Return the run that the options describe."""
        return RunConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(RunConfig)})


class Subject(NamedTuple):
    """A trained model, out of a run folder or a bare artifact."""

    what: str
    config: RunConfig
    weights: Arrays
    tokenizer_sha256: str
    step: int | None
    quantise: bool
    """Whether forward passes use the stored form of the weights; an artifact's already are that."""


def open_subject(path: str, data: str | None, step: int | None = None) -> Subject:
    """Read a run's checkpoint (the last one, or the one kept of `step`) or an artifact; RunError, ArtifactError.

    `data` replaces the text it is judged on.
    """
    if os.path.isfile(path):
        if step is not None:
            raise RunError(f"{path}: is an artifact, which has one set of weights: leave out --step {step}")
        subject = open_artifact(path, None)
    elif os.path.isdir(path):
        run = Run.open(path)
        saved = run.checkpoint(step)
        if saved is None:
            raise RunError(f"{path}: has no checkpoint yet; train it first: skc train {run.config.preset} --out {path}")
        sha256 = hashlib.sha256(run.tokenizer()).hexdigest()
        weights = exported(run.config.model, run.config.train, saved.params, saved.optimizer)
        what = f"run {path}, step {saved.step}"
        subject = Subject(what, run.config, weights, sha256, saved.step, saved.quantise)
    else:
        raise RunError(f"{path}: no such run folder or artifact; make one with: skc train tiny --out {path}")
    if data is None:
        return subject
    return subject._replace(config=dataclasses.replace(subject.config, data=DataConfig(data)))


def open_artifact(path: str, data: str | None) -> Subject:
    """Read an artifact; ArtifactError. `data` replaces the text it is judged on."""
    artifact = read_artifact(path)
    seq: Any = artifact.provenance.get("train_seq", EvalConfig.seq)
    if type(seq) is not int or not 1 <= seq <= MOST_TOKENS:
        expected = f"expected a whole number from 1 to {MOST_TOKENS:,}; write it again with: skc export RUN"
        raise ArtifactError(f"{path}: provenance: train_seq={in_words(seq)}: {expected}")
    name = str(artifact.provenance.get("preset", "artifact"))
    config = RunConfig(preset=name, model=artifact.model, train=TrainConfig(batch=1, seq=seq), eval=EvalConfig(seq=seq))
    if data is not None:
        config = dataclasses.replace(config, data=DataConfig(data))
    return Subject(f"artifact {path}", config, artifact.weights, artifact.tokenizer_sha256, None, False)


def open_twin(engine: Engine, path: str, file: str | None, config: RunConfig) -> Any:
    """Return the twin of a run's or an artifact's model on its engine: of `file`, or of what lies beside the artifact.

    SidecarError for a twin of another artifact, RunError where there is no twin.
    """
    from core.twin.sidecar import beside, read_sidecar

    artifact = Run.open(path).frozen_path if os.path.isdir(path) else path
    if artifact is None or not os.path.isfile(artifact):
        raise RunError(f"{path}: has no artifact yet, to which its twin would belong; write it: skc export {path}")
    name = str(beside(path)) if file is None else file
    if not os.path.exists(name):
        raise RunError(f"{name}: there is no twin; make it with skc distill {path}, or give its file with --twin")
    sidecar = read_sidecar(name, config.model, artifact)
    return engine.twin(sidecar.twin, sidecar.params)


def with_text(config: RunConfig, say: Console, cutting: Cutting = DEFAULT) -> RunConfig:
    """Return settings whose data is a prepared folder: text is prepared in the cache folder, as `cutting` says.

    ConfigError for a choice of tokens where the data has its own.
    """
    path = config.data.path
    if is_text(path):
        folder = prepare_user_text(path, say, cutting, say.stages())
        return dataclasses.replace(config, data=DataConfig(folder))
    for name, value in cutting._asdict().items():
        require(value is None, f"--{name} {value}: {path} has its tokens already: leave it out, or give a text")
    return config


def open_named(path: str, config: RunConfig, data: str | None, train: bool = True, option: str = "--data") -> Dataset:
    """Open the data of a run or artifact, or `data` instead; ConfigError where config.json names a folder not here.

    Text is refused: it would have to be prepared with the model's own tokenizer.
    """
    if data is not None and is_text(data):
        raise ConfigError(
            f"{data}: is no prepared folder; make one with the model's tokenizer: skc data prepare {data} --tokenizer "
            f"{path if os.path.isdir(path) else os.path.dirname(path) or '.'}/tokenizer.model --out FOLDER"
        )
    if data is None and config.data.path not in SAMPLES and not os.path.isdir(config.data.path):
        raise ConfigError(
            f"{path}: was trained on {config.data.path}, which is not here (in {os.getcwd()}): give its data with "
            f"{option} PATH, or start from the folder that it was trained from"
        )
    return open_data(config.data.path if data is None else data, train=train)


def open_tokenizer(subject: Subject, path: str, data: str | None) -> Tokenizer:
    """Return the tokenizer of a run or artifact: of `data`, its run folder, its own folder, or the data it names.

    ConfigError or DataError where none of them is there and the model's own.
    """
    if data is None and subject.step is not None:
        return Tokenizer.load(str(Run.open(path).tokenizer_path))
    beside = os.path.join(os.path.dirname(path), "tokenizer.model")
    if data is None and os.path.lexists(beside):
        tokenizer = Tokenizer.load(beside)
        if tokenizer.sha256 == subject.tokenizer_sha256:
            return tokenizer
    dataset = open_named(path, subject.config, data)
    check_tokenizer(subject, dataset)
    return dataset.tokenizer


def check_tokenizer(subject: Subject, dataset: Dataset, option: str = "--data") -> None:
    """Raise ConfigError unless the text was cut into tokens as the model learned it."""
    if dataset.tokenizer.sha256 != subject.tokenizer_sha256:
        raise ConfigError(
            f"{subject.what} was made with tokenizer {subject.tokenizer_sha256[:12]}, but {dataset.path} has "
            f"{dataset.tokenizer.sha256[:12]}: give the data it was trained on with {option} PATH"
        )


def fit_tokens(config: RunConfig, dataset: Dataset, given: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """Return a preset's settings with the data's vocabulary and BOS, unless an option gave them, and what changed."""
    theirs = {name: getattr(dataset.tokenizer, name) for name in TOKENS if f"--model.{name}" not in given}
    changed = [
        f"model.{name}={value}, as the data have it (the preset: {getattr(config.model, name)})"
        for name, value in theirs.items()
        if value != getattr(config.model, name)
    ]
    model = dataclasses.replace(config.model, **theirs) if changed else config.model
    return dataclasses.replace(config, model=model), changed


def check_data(config: RunConfig, dataset: Dataset, cure: str) -> None:
    """Raise ConfigError or DataError unless model and batches fit the data and its validation text can be scored.

    `cure` is what to do about another vocabulary.
    """
    for name in TOKENS:
        ours, theirs = getattr(config.model, name), getattr(dataset.tokenizer, name)
        if ours != theirs:
            raise ConfigError(f"model.{name}={ours}, but data.path={config.data.path} has {theirs}: {cure}")
    batch(dataset.train, 0, 1, config.train.seq, config.seed)
    if len(dataset.val) < 2 or not len(dataset.val.document_starts):
        raise ConfigError(f"data {dataset.name}: its validation text has no document; prepare it again")
    count_bytes(dataset.val, np.zeros(1, np.int64), np.array([len(dataset.val) - 1]), None)


def same_start(ranks: Ranks, config: RunConfig, dataset: Dataset, **options: Any) -> None:
    """Raise ConfigError, on every rank, unless all ranks were started alike: options, settings, code and data."""
    if ranks.world == 1:
        return
    kinds = {"options": options, "configuration": to_json(config), "data": identity(dataset)}
    check_same(ranks, {**{name: json.dumps(value) for name, value in kinds.items()}, "code": code_version()})
