"""Verb `skc eval PATH`: a run or an artifact is scored on validation text."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import FlagConversionOff, Positional, Suppress

from core.audit.claims import SECONDS
from core.config import ConfigError, RunConfig, from_json, to_json
from core.console import Console
from core.data.dataset import Dataset
from core.engine.heartbeat import Heartbeat
from core.engine.loading import choose_backend, load_engine
from core.engine.memory import enough_memory
from core.engine.protocol import DType, Engine, EngineOptions
from core.engine.ranks import Ranks, agree, join, share_arrays
from core.export.artifact import unreadable
from core.scoring.accounting import byte_note
from core.scoring.gain import check_gain, measure_gain
from core.training.finish import describe, final_score
from core.training.run import Run
from core.verbs.common import (
    Backend,
    Context,
    Outcome,
    Subject,
    check_tokenizer,
    open_named,
    open_subject,
    same_start,
)
from core.verbs.scoring_options import Unchecked, judged


@dataclass(frozen=True)
class Eval:
    """Options of `skc eval`; those left out are the run's own. --seq is short for --eval.seq, and others alike."""

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
    gain: int | None = None
    """Score this many documents twice, without and with what adapts or changes predictions, and show the difference."""
    ledger: str | None = None
    """Keep the cost of every target in this file, and go on from it if an evaluation was killed."""
    eval: FlagConversionOff[Unchecked] = field(default_factory=Unchecked)
    step: int | None = None
    """Step of a checkpoint that train.keep_every kept; None: the last one."""
    backend: Backend = "auto"
    """auto: MLX on a Mac, PyTorch elsewhere, as installed."""
    dtype: DType | None = None
    """Compute type; None: bfloat16 on a GPU that has it (not M1, M2), else float32. float16: MLX only."""
    given: Suppress[tuple[str, ...]] = ()
    """Options that the command line has."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


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
    if options.gain is not None:
        clash = {"--ledger": options.ledger, "--documents": options.documents}
        clash["--eval.documents"] = "--eval.documents" in options.given or None
        other = next((name for name, value in clash.items() if value is not None), None)
        if other:
            raise ConfigError(f"--gain {options.gain} makes two scores of so many documents: leave out {other}")
    subject = _shared(ranks, open_subject(options.path, options.data, options.step) if ranks.rank == 0 else None)
    config = dataclasses.replace(subject.config, eval=judged(subject.config.eval, options, options.path))
    if options.gain is not None:
        check_gain(config.eval, options.gain)
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
    value = {"path": options.path, "step": subject.step, "backend": engine.backend, "data": dataset.path}
    value["quantise"] = subject.quantise
    rows, seq = config.eval.batch, config.eval.seq
    began = time.monotonic()
    with enough_memory(config.model, rows, seq, f"--batch (now {rows:,} windows) or --seq", training=False):
        if options.gain is not None:
            value |= _gain(engine, dataset, config, options.gain, context.say)
        else:
            ledger = None if options.ledger is None or ranks.rank else Path(options.ledger)
            score = final_score(engine, dataset, config, context.say, "scoring", ledger, plugins=True, keep=True)
            context.say(describe(score))
            value["score"] = score.to_json()
    value["seconds"] = _times(began, context, options.path if subject.step is not None else None)
    return Outcome(True, value)


def _gain(engine: Engine, dataset: Dataset, config: RunConfig, documents: int, say: Console) -> dict[str, Any]:
    """Score documents without and with what learns, and say what it gains."""
    gain = measure_gain(engine, dataset.val, config, documents, say)
    for name, score, seconds in zip(("without", "with"), (gain.before, gain.after), gain.seconds, strict=True):
        say(f"{name + ':':8} {describe(score)}; {1e6 * seconds / score.targets:,.1f} s per million tokens")
    spread = "" if gain.error is None else f" ± {gain.error:.4f}"
    say(
        f"{gain.difference:+.4f}{spread} bits per byte on the same {gain.after.documents} documents (below 0: better; "
        "the error is that of other documents like them)"
    )
    return {"score": gain.after.to_json(), "gain": gain.to_json()}


def _times(began: float, context: Context, run: str | None) -> dict[str, float | None]:
    """Say how long it took by both clocks, beside the challenge's limits (docs/challenge.md, D2 and D3)."""
    now = time.monotonic()
    strict, timer = now - context.began, now - began
    context.say(
        f"time {strict:.1f} s strict (from the start of the program: imports, loading, compilation), {timer:.1f} s by "
        f"the timer (scoring alone); limit of an evaluation {SECONDS:.0f} s on 8 H100"
    )
    trained = Run.open(run).last("clock/seconds") if run is not None else None
    if trained is not None:
        context.say(f"the run was trained for {trained:.1f} s; limit of a training {SECONDS:.0f} s on 8 H100")
    return {"strict": strict, "timer": timer, "limit": SECONDS, "training": trained, "training_limit": SECONDS}
