"""Verb `skc train PRESET`: train or go on training, then score, export and report; or show the plan of that."""

import contextlib
import shlex
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core import presets
from core.audit.claims import SECONDS
from core.config import ConfigError, RunConfig, changed
from core.console import Console, duration
from core.data.bundled import open_data
from core.data.dataset import Dataset, identity
from core.data.user_text import Cutting
from core.engine.heartbeat import Heartbeat
from core.engine.loading import check_dtype, choose_backend
from core.engine.memory import enough_memory
from core.engine.protocol import DType, Engine, EngineOptions
from core.engine.ranks import Ranks, agree, check_same, join
from core.engine.scaffolding import standing
from core.export.artifact import check_limits
from core.export.budget import predicted_bytes
from core.export.fit import COARSEST
from core.forecast.forecast import Forecast, check_steps, forecast
from core.forecast.probe import probe
from core.model.deviations import MOST
from core.model.params import count
from core.scoring.accounting import byte_note
from core.scoring.adapt.phases import phases_of
from core.scoring.evaluation import Evaluation
from core.scoring.plugins import load_plugins
from core.scoring.score import check_plugins
from core.training import trackers
from core.training.calibrate import calibrate, check_kept
from core.training.environment import environment
from core.training.finish import close_training, finish
from core.training.follower import Follower
from core.training.loop import check_rows, done, train
from core.training.loss_plot import LossPlot, letters_for
from core.training.pruning import start_weights
from core.training.run import Run, config_digest
from core.training.spans import rooms
from core.training.writer import hold
from core.verbs.common import (
    Backend,
    Context,
    Outcome,
    PresetOptions,
    check_data,
    fit_tokens,
    same_start,
    with_text,
)


@dataclass(frozen=True)
class Train(PresetOptions):
    """Options of `skc train`."""

    backend: Backend = "auto"
    """auto: MLX on a Mac, PyTorch elsewhere, as installed."""
    out: str | None = None
    """Run folder; a run there with the same settings is resumed. None: runs/<preset>-<backend>-<seed>."""
    dtype: DType | None = None
    """Compute type; None: bfloat16 on a GPU that has it (not M1, M2), else float32. float16: MLX only, for M1, M2."""
    wire: Literal["bfloat16"] | None = None
    """Type in which several ranks send their gradients: half the bytes of float32, and rounded. None: as computed."""
    track: tuple[trackers.Name, ...] = ()
    """Copy every recorded line to tensorboard, wandb or both, in the run folder."""
    tokenizer: str | None = None
    """What cuts text that is given as data: a SentencePiece .model, a tokenizer.json, or bytes; None: trains one."""
    vocab: int | None = None
    """Pieces of the tokenizer that is trained on such text; None: 1024, or as many as a small text allows."""
    again: bool = False
    """Score a finished run once more, and write its artifact and report anew; without it, what is there is shown."""
    plot: bool = False
    """On a terminal: draw the loss below the moving line, and once more at the end."""
    dry_run: bool = False
    """Build everything, time some steps and scoring passes, show the plan of the run, and write nothing."""


def train_run(options: Train, context: Context) -> Outcome:
    """Train, or go on training, then score, export and report; on every rank that a launcher started."""
    config, say = options.config(), context.say
    backend = choose_backend(options.backend)
    check_dtype(backend, options.dtype)
    ranks = join(backend)
    if ranks.rank:
        say.mute()
    if options.wire and ranks.world == 1:
        raise ConfigError(
            f"--wire {options.wire}: one process sends no gradients: leave it out, or start several ranks"
        )
    out = options.out or f"runs/{config.preset}-{backend}-{config.seed}"
    with Heartbeat(ranks, hint=f"the same command goes on from the last checkpoint in {out}"):
        with enough_memory(config.model, config.train.rows, config.train.seq, _lower(config), training=True):
            outcome = _train(options, config, backend, out, ranks, context)
        ranks.close()
    return outcome


def _lower(config: RunConfig) -> str:
    """Return what to lower where a training run needs too much memory."""
    rows = f"--train.micro-batch (now {config.train.rows:,} rows)"
    return f"{rows}, --train.seq, or --eval.batch (now {config.eval.batch:,} windows of {config.eval.seq:,})"


def _train(options: Train, config: RunConfig, backend: str, out: str, ranks: Ranks, context: Context) -> Outcome:
    say, began = context.say, time.perf_counter()
    if options.dry_run and config.train.seconds is None:
        check_steps(config.train.steps)
    config = with_text(config, say, Cutting(options.tokenizer, options.vocab))
    dataset = open_data(config.data.path)
    config, changed = fit_tokens(config, dataset, options.given)
    for line in changed:
        say(line)
    check_data(config, dataset, "leave out --model.vocab and --model.bos, which then follow the data")
    check_limits(config.model)
    check_rows(config.train, ranks)
    trackers.check(options.track)
    if not options.dry_run:
        check_budget(config)
    check_plugins(config.eval, load_plugins(config.eval.plugins))  # now, not after the training
    phases_of(Evaluation.of(dataset.val, config, config.eval.documents, plugins=True))
    same_start(ranks, config, dataset, dry_run=options.dry_run, dtype=options.dtype, wire=options.wire, out=out)
    choices = EngineOptions(
        dtype=options.dtype,
        wire=options.wire,
        spans=rooms(dataset.train, config, ranks.world),
        micro_tokens=None if asks_for_rows(config, options.given) else EngineOptions.micro_tokens,
    )
    with contextlib.ExitStack() as stack:
        run = end = None
        if not options.dry_run:
            run, end = _begin(Path(out), config, dataset, options.again, ranks, stack)
        if end is not None:
            return _shown(Path(out), config, end, say)
        engine = context.load(backend, config, start_weights(config, dataset.train), choices, ranks=ranks)
        # Macs of several generations each have a type of their own: what they would train together is neither.
        check_same(ranks, {"compute type": engine.dtype}, "their chips differ: give all ranks one, as --dtype float32")
        if run is None:
            return _forecast(engine, dataset, config, out, time.perf_counter() - began, say)
        if not ranks.rank:
            stack.enter_context(say.copied_to(stack.enter_context(run.open_log())))
            saved = run.checkpoint()
            if saved is None or not done(saved.step, saved.seconds, config.train):  # else this start trains nothing
                run.record_environment(environment(engine, dataset, context.command, saved.step if saved else 0))
            _introduce(run, engine, dataset, context)
            run.copies = trackers.start(options.track, run.path, config, say)
            stack.callback(run.copies.close)
        plot = _plot(options, run, say)
        show = plot.show if plot else say.moving if say.terminal else None
        summary = train(run, engine, dataset, say, show)
        for line in plot.lines() if plot else ():
            say(line)
        calibrate(run, engine, dataset, summary.steps, summary.taken, say)
        close_training(run, dataset, summary, say)
        value = finish(run, engine, dataset, summary.steps, say)
        say(f"the whole run is in {run.path}")
        for command in next_commands(run.path, context.verbs):
            say(f"next: {command}")
    value |= {"seconds": summary.seconds, "backend": engine.backend, "parameters": count(config.model)}
    return Outcome(value["artifact"]["within"], value)


def _plot(options: Train, run: Run | Follower, say: Console) -> LossPlot | None:
    """Return the picture of the losses, which gets those that the run recorded before and records from here on."""
    if not options.plot:
        return None
    if not say.terminal or run.copies is None:
        say("--plot draws on a terminal only; curve.png will have the losses")
        return None
    plot = LossPlot(letters_for(getattr(say.stream, "encoding", None)), say.moving)
    saved = run.checkpoint()
    for row in run.metrics():
        if saved and row["step"] <= saved.step:
            plot.row(row["step"], row)
    run.copies.add("plot", plot)
    return plot


def next_commands(run: Path, verbs: Collection[str]) -> list[str]:
    """Return what one may do with a finished run, as command lines of the verbs that there are."""
    folder, artifact = shlex.quote(str(run)), shlex.quote(str(run / "artifact.skc"))
    commands = (f"skc sample {folder}", f"skc audit {folder}", f"skc serve {artifact}")
    return [command for command in commands if command.split()[1] in verbs]


def asks_for_rows(config: RunConfig, given: Sequence[str]) -> bool:
    """Return whether someone chose train.micro_batch for this run: here, or in an ablation; else it is the preset's."""
    theirs = presets.get(config.preset).config.train.micro_batch
    return "--train.micro-batch" in given or config.train.micro_batch != theirs


def _begin(
    out: Path, config: RunConfig, dataset: Dataset, again: bool, ranks: Ranks, stack: contextlib.ExitStack
) -> tuple[Run, dict[str, Any] | None]:
    """Hold the run folder and return the run, and its end if it has come to it and is not wanted `again`.

    What rank 0 finds wrong, before anything is trained, ends every rank.
    """
    run, problem, end = Follower(out, config), None, None
    if not ranks.rank:
        try:
            stack.enter_context(hold(out))
            run = Run.create(out, config, dataset.tokenizer.model, identity(dataset))
            end = run.finished()
            if end is not None and again:
                check_kept(run, end["step"])
                run.forget()
                end = None
        except (ValueError, OSError) as error:
            if ranks.world == 1:
                raise
            problem = error
    words, end = agree(ranks, [problem and str(problem), end])
    if words is not None:
        raise problem or ConfigError(words)
    return run, end


def _shown(out: Path, config: RunConfig, end: dict[str, Any], say: Console) -> Outcome:
    """Say that a run has come to its end, and what that was."""
    score, stored = end["final/score"], end["final/artifact"]
    seconds = end.get("clock/stopped", end.get("clock/seconds", 0.0))
    spread = f" ± {score['error']:.4f}" if score["error"] else ""
    say(f"{out}: already finished at step {end['step']}: {score['label']} {score['bpb']:.4f}{spread} bits per byte,")
    say(f"artifact {stored['bytes']:,} bytes; add --again to score it once more, or choose another --out")
    artifact = {"path": str(out / "artifact.skc"), **stored}
    value = {
        "run": str(out), "step": end["step"], "score": score, "artifact": artifact, "files": end["files"],
        "samples": end.get("samples", []), "seconds": seconds, "backend": end["backend"],
        "parameters": count(config.model), "already": True,
    }  # fmt: skip
    value |= {"plugins": end["final/plugins"]} if config.eval.learns else {}
    return Outcome(stored.get("within", True), value)


def _forecast(engine: Engine, dataset: Dataset, config: RunConfig, out: str, build: float, say: Console) -> Outcome:
    """Time a few steps and passes and show the plan of a whole run; not ok if it passes a limit of its own."""
    ranks = engine.ranks
    say(f"plan of a whole run, from step 0, {_purpose(config)}; nothing is written")
    machine = f"{_together(engine)}, {engine.dtype}"
    say(f"{engine.backend} on {machine}; " + "; ".join(engine.notes))
    if (Path(out) / "config.json").exists():
        say(f"{out} holds a run already: it is left as it is, and training would go on with it or refuse to")
    costs = probe(engine, dataset, config, say)
    if config.eval.adapt.kind != "none":
        say(f"eval.adapt.kind={config.eval.adapt.kind} is not timed: scoring with it takes several times as long")
    plan = forecast(
        config,
        costs,
        machine=machine,
        official=ranks.world == 8 and "H100" in engine.device,
        train_tokens=len(dataset.train),
        artifact_bytes=predicted_bytes(config.model),
        build=build,
        disk_free=_free(Path(out).absolute()),
        rule_seconds=SECONDS,
    )
    _show(plan, say)
    value = {**plan.to_json(), "parameters": count(config.model), "backend": engine.backend, "ranks": ranks.world}
    return Outcome(*agree(ranks, [plan.ok, value]))  # rank 0's disk decides for all


def check_budget(config: RunConfig) -> None:
    """Raise ConfigError if the artifact is predicted to be over the budget: better now than after the training."""
    model, allowed = config.model, config.export.budget - config.export.code_bytes
    if config.export.fit:  # the end may take the coarsest step
        steps = {name: k for name, k in vars(model.deviations).items() if k is not None}
        model = changed(model, {f"deviations.{name}": min(COARSEST * k, MOST) for name, k in steps.items()})
    predicted = predicted_bytes(model)
    if predicted > allowed:
        raise ConfigError(
            f"the artifact would have about {predicted:,} bytes, {predicted - allowed:,} over what export.budget "
            f"leaves beside the code; make the model smaller (see: skc info {config.preset}), or raise --export.budget"
        )


def _introduce(run: Run, engine: Engine, dataset: Dataset, context: Context) -> None:
    """Say what is about to run, and how."""
    config, say = run.config, context.say
    say(f"{context.command}")
    say.note(f"settings sha256 {config_digest(config)} (all that decides the weights, but the seed)")
    size = f"{count(config.model):,}{standing(config.model, config.train)}"
    say(f"run {run.path}: {_purpose(config)}; {size} parameters, seed {config.seed}")
    model = config.model
    tables, quantise = model.embedding.storage, config.train.quantise
    say(f"stores matrices as {model.matrix_storage}, tables as {tables}; quantise {quantise}")
    say(f"{engine.backend} on {_together(engine)}, {engine.dtype}; " + "; ".join(engine.notes))
    train_tokens, val_tokens = len(dataset.train), len(dataset.val)
    say(f"data {dataset.path}: {train_tokens:,} tokens to train on, {val_tokens:,} to validate on")
    if note := byte_note(dataset.tokenizer, dataset.manifest["splits"]["val"]):
        say(note)


def _show(plan: Forecast, say: Console) -> None:
    """Print a plan as tables."""
    each = plan.seconds / plan.steps
    say()
    say(f"steps     {plan.steps:,} in {plan.seconds:,.1f} s of training ({duration(plan.seconds)})")
    say(f"tokens    {plan.tokens:,}, {plan.epochs:.3g} epochs of the training text")
    say(f"speed     {plan.tokens / plan.seconds:,.0f} tok/s, {1000 * each:,.1f} ms a step")
    say()
    kinds = [(kind["name"], kind["steps"], f"{1000 * kind['seconds']:,.1f}") for kind in plan.step_kinds]
    say.table(("kind of step", "steps", "ms each"), kinds)
    say()
    spans = [
        (p.name, f"{p.steps[0]:,} to {p.steps[1]:,}", f"{p.seconds[0]:,.1f} to {p.seconds[1]:,.1f}")
        for p in plan.phases
    ]
    say.table(("phase", "steps", "seconds of training"), spans)
    say()
    say.table(("beside training steps", "times", "seconds"), [(n, t, f"{took:,.2f}") for n, t, took in plan.works])
    say(f"all together {plan.total:,.1f} s ({duration(plan.total)}); start of Python, report and disk not counted")
    say()
    rows = []
    for limit in plan.limits:
        digits = 1 if limit.unit == "s" else 0
        left = limit.limit - limit.value
        verdict = f"OVER by {-left:,.{digits}f}" if limit.over else f"{left:,.{digits}f} left"
        figures = (f"{side:,.{digits}f} {limit.unit}" for side in (limit.value, limit.limit))
        rows.append((limit.what, *figures, verdict, limit.note))
    say.table(("limit", "expected", "at most", "", ""), rows)
    over = [limit.what for limit in plan.limits if limit.over and limit.binding]
    say(f"would exceed: {', '.join(over)}" if over else "exceeds no limit of the run")


def _free(path: Path) -> int:
    """Return the free bytes of the disk on which `path` would be."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def _together(engine: Engine) -> str:
    return f"{engine.ranks.world} ranks, each {engine.device}" if engine.ranks.world > 1 else engine.device


def _purpose(config: RunConfig) -> str:
    return f"preset {config.preset}, {presets.get(config.preset).purpose}"
