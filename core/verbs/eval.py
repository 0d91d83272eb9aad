"""Verb `skc eval PATH`: a run or an artifact is scored on validation text."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from core.config import EvalConfig, RunConfig, from_json, to_json
from core.engine.heartbeat import Heartbeat
from core.engine.loading import choose_backend, load_engine
from core.engine.memory import enough_memory
from core.engine.protocol import DType, EngineOptions
from core.engine.ranks import Ranks, agree, join, share_arrays
from core.export.artifact import unreadable
from core.scoring.accounting import byte_note
from core.training.finish import describe, final_score
from core.training.run import Run
from core.verbs.common import (
    Backend,
    Context,
    Outcome,
    Subject,
    check_tokenizer,
    judged,
    open_named,
    open_subject,
    same_start,
)


@dataclass(frozen=True)
class Eval:
    """Options of `skc eval`; those left out are the run's own."""

    path: Positional[str]
    """Run folder (its checkpoint is scored) or artifact."""
    data: str | None = None
    """Prepared folder, sample or sample-case; None: what the run was trained on (a bare artifact: sample)."""
    windows: Literal["plain", "sliding", "documents", "stateful"] | None = None
    """plain: consecutive windows; sliding: overlapping; documents: inside documents; stateful: with exact carry."""
    seq: int | None = None
    """Longest context of a window, in tokens."""
    stride: int | None = None
    """Targets scored per window after the first; None: the run's, or a quarter of a sliding window."""
    documents: int | Literal["all"] | None = None
    """Score only this many documents: an estimate with an error bar, never a score."""
    batch: int | None = None
    """Windows per forward pass."""
    plugins: tuple[str, ...] | None = None
    """What else has a part in the score: temperature, counts, or package.module:Class; docs/legality.md says more."""
    ledger: str | None = None
    """Keep the cost of every target in this file, and go on from it if an evaluation was killed."""
    step: int | None = None
    """Step of a checkpoint that train.keep_every kept; None: the last one."""
    backend: Backend = "auto"
    """auto: MLX on a Mac, PyTorch elsewhere, as installed."""
    dtype: DType | None = None
    """Compute type; None: bfloat16 on a GPU that has it (not M1, M2), else float32. float16: MLX only."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""

    def config(self, base: EvalConfig) -> EvalConfig:
        """Return `base` with what was given replaced."""
        documents = base.documents if self.documents is None else None if self.documents == "all" else self.documents
        return dataclasses.replace(judged(base, self, self.path), documents=documents)


def evaluate(options: Eval, context: Context) -> Outcome:
    """Score a run or an artifact; every rank that a launcher started scores its share."""
    ranks = join(choose_backend(options.backend))
    if ranks.rank:
        context.say.mute()
    with Heartbeat(ranks, hint="the same command goes on from its --ledger, if it has one"):
        outcome = _evaluate(options, ranks, context)
        ranks.close()
    return outcome


def _shared(ranks: Ranks, subject: Subject | None) -> Subject:
    """Return rank 0's model on every rank: another one's folder may be missing, or an older copy."""
    if ranks.world == 1:
        assert subject is not None
        return subject
    rest = subject and {**subject._asdict(), "config": to_json(subject.config), "weights": None}
    value = agree(ranks, rest)
    config = from_json(RunConfig, value["config"])
    return Subject(**{**value, "config": config, "weights": share_arrays(ranks, subject and subject.weights)})


def _evaluate(options: Eval, ranks: Ranks, context: Context) -> Outcome:
    subject = _shared(ranks, open_subject(options.path, options.data, options.step) if ranks.rank == 0 else None)
    config = dataclasses.replace(subject.config, eval=options.config(subject.config.eval))
    dataset = open_named(options.path, config, options.data, train=False)
    check_tokenizer(subject, dataset)
    choices = EngineOptions(dtype=options.dtype)
    same_start(ranks, config, dataset, dtype=options.dtype)
    engine = load_engine(options.backend, config, subject.weights, choices, subject.quantise, ranks)
    used = "stored form of the weights" if subject.quantise else "weights as they are"
    context.say(f"{subject.what} ({used}) on {engine.backend}, {engine.device}, {engine.dtype}; data {dataset.path}")
    if note := byte_note(dataset.tokenizer, dataset.manifest["splits"]["val"]):
        context.say(note)
    if not ranks.rank and subject.step is not None and (why := unreadable(Run.open(options.path).artifact_path)):
        context.say(f"careful: {why}")
    ledger = None if options.ledger is None or ranks.rank else Path(options.ledger)
    rows, seq = config.eval.batch, config.eval.seq
    with enough_memory(config.model, rows, seq, f"--batch (now {rows:,} windows) or --seq", training=False):
        score = final_score(engine, dataset, config, context.say, "scoring", ledger, plugins=True, keep=True)
    context.say(describe(score))
    value = {"path": options.path, "step": subject.step, "backend": engine.backend, "data": dataset.path}
    value["quantise"] = subject.quantise
    return Outcome(True, {**value, "score": score.to_json()})
