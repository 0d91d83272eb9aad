"""Verb `skc distill PATH`: a frozen model learns to draft for itself, and its twin is written beside its artifact."""

import contextlib
import os
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from tyro.conf import FlagConversionOff, Positional

from core.config import DataConfig, RunConfig
from core.console import Console
from core.data.dataset import Dataset, identity
from core.decoding.generate import context_limit
from core.engine.loading import check_dtype, choose_backend, load_engine
from core.engine.memory import enough_memory
from core.engine.protocol import DType, Engine, EngineOptions
from core.training.checkpoint import digest
from core.training.environment import environment
from core.training.loop import train, warm_up
from core.training.run import Run, RunError
from core.training.writer import hold, refuse_strangers
from core.twin import acceptance, own_text
from core.twin.distill_config import DistillConfig
from core.twin.distilling import RECORD, TwinLearner, TwinRun, check_frozen, reading
from core.twin.params import twin_rows
from core.twin.recipes import recipe
from core.twin.sidecar import Sidecar, artifact_sha256, beside, check_place, write_sidecar
from core.verbs.common import (
    Backend,
    Context,
    Outcome,
    Subject,
    check_data,
    check_tokenizer,
    open_artifact,
    open_named,
    open_subject,
)


@dataclass(frozen=True)
class Distill:
    """Options of `skc distill`."""

    path: Positional[str]
    """Run folder with an artifact or of skc import-hf, or artifact."""
    recipe: str | None = None
    """Named settings that take the place of the defaults below: orthrus_qwen35 (docs/import.md)."""
    distill: FlagConversionOff[DistillConfig] = field(default_factory=DistillConfig)
    out: str | None = None
    """Folder of the distillation; one of the same settings there goes on. None: distill, beside the artifact."""
    twin: str | None = None
    """Where the twin is written; None: twin.safetensors beside the artifact."""
    data: str | None = None
    """Prepared folder to learn from; None: the run's, or of a bare artifact sample."""
    dtype: DType | None = None
    """Compute type; None: bfloat16 on a GPU that has it, else float32."""
    backend: Backend = "auto"
    """auto: MLX on a Mac, PyTorch elsewhere, as installed."""
    dry_run: bool = False
    """Build everything, take one step, show the plan, and write nothing."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def by_recipe(name: str) -> Distill:
    """Return the options that a recipe stands for; ConfigError."""
    return Distill(tyro.MISSING, name, recipe(name))


class Frozen(NamedTuple):
    """What a twin is made of."""

    artifact: str
    """Of an import without one its checkpoint."""
    sha256: str
    subject: Subject
    weights_sha256: str
    """Of the decoded weights."""


def distill(options: Distill, context: Context) -> Outcome:
    """Make a twin of a model, or go on making it; then say what its drafts come to."""
    settings, say = options.distill, context.say
    frozen = open_frozen(options.path, options.data)
    subject, seq = frozen.subject, frozen.subject.config.train.seq
    model = subject.config.model
    settings.check(model, seq)
    schedule = settings.schedule(seq)
    config = RunConfig(subject.config.preset, settings.seed, model, subject.config.data, schedule)
    dataset = open_named(options.path, subject.config, options.data)
    check_tokenizer(subject, dataset)
    check_data(config, dataset, "give the data it was trained on with --data PATH")
    backend = choose_backend(options.backend)
    check_dtype(backend, options.dtype)
    out = Path(options.out or beside(options.path).with_name("distill"))
    refuse_strangers(out, RECORD)
    file = options.twin or str(beside(options.path))
    check_place(file, frozen.artifact)
    given = acceptance.held_out_rows(dataset.val, model.bos, settings, schedule.seq)
    lower = f"--distill.batch (now {settings.batch:,} rows) or --distill.anchors (now {settings.anchors:,})"
    with enough_memory(model, schedule.batch, schedule.seq, lower, training=True):
        engine = load_engine(backend, subject.config, subject.weights, EngineOptions(dtype=options.dtype))
        twin = engine.twin(settings.twin, None)
        learner: Any = TwinLearner(engine, twin, settings, model.bos)
        size = sum(row.size for row in twin_rows(model, settings.twin).values())
        _introduce(frozen, engine, settings, schedule.seq, size, say)
        value = {"path": options.path, "artifact": frozen.artifact, "backend": backend, "parameters": size}
        if options.dry_run:
            warm_up(learner, config)
            say("one step was taken on random tokens; nothing is written")
            return Outcome(True, value)
        with contextlib.ExitStack() as stack:
            stack.enter_context(hold(out, RECORD))
            origin = {"artifact_sha256": frozen.sha256, "data": identity(dataset), "dtype": engine.dtype}
            run = TwinRun.begin(out, config, settings, origin)
            stack.enter_context(say.copied_to(stack.enter_context(run.open_log())))
            saved = run.checkpoint()
            run.record_environment(environment(engine, dataset, context.command, saved.step if saved else 0))
            say(context.command)
            value |= _distil(run, engine, twin, learner, dataset, frozen, given, say)
            made = Sidecar(settings.twin, twin.params(), frozen.sha256, frozen.weights_sha256, value["step"])
            write_sidecar(file, made)
            shown = frozen.artifact if frozen.subject.step is None else options.path
            named = ["--twin", file] if options.twin else []
            again = shlex.join(["skc", "sample", shown, "--draft", "twin", *named])
            say(f"twin {file}: {again}; its training is in {out}")
    return Outcome(True, {**value, "run": str(out), "twin": file})


def open_frozen(path: str, data: str | None) -> Frozen:
    """Read the artifact of a run, or one that is given; RunError, ArtifactError."""
    artifact, config = path, None
    if os.path.isdir(path):
        run = Run.open(path)
        frozen, config = run.frozen_path, run.config
        if frozen is None:
            raise RunError(f"{path}: has no artifact yet, whose weights a twin is made of; write it: skc export {path}")
        if frozen != run.artifact_path:
            subject = open_subject(path, data)
            return Frozen(str(frozen), artifact_sha256(frozen), subject, digest(subject.weights))
        artifact = str(frozen)
    elif not os.path.isfile(path):
        raise RunError(f"{path}: no such run folder or artifact; make one with: skc train tiny --out {path}")
    subject = open_artifact(artifact, data)
    if config is not None:
        data_config = config.data if data is None else DataConfig(data)
        subject = subject._replace(config=replace(config, model=subject.config.model, data=data_config))
    return Frozen(artifact, artifact_sha256(artifact), subject, digest(subject.weights))


def _introduce(frozen: Frozen, engine: Engine, settings: DistillConfig, seq: int, size: int, say: Console) -> None:
    """Say what will be learned from what."""
    twin, blocks = settings.twin, settings.batch * settings.anchors
    form = f"rank {twin.rank}" if twin.rank else "mixers cloned in full"
    anchor = "exact anchor" if twin.exact_anchor else "anchor of its own"
    say(f"frozen: {frozen.subject.what}, artifact {frozen.sha256[:12]}, weights {frozen.weights_sha256[:12]}")
    say(f"twin of {size:,} parameters, {form}; block of {twin.block}, rule {twin.rule}, {anchor}")
    text = f"{settings.own_rows:,} rows of own text" if settings.text == "own" else "training text"
    limit = "" if settings.seconds is None else f", at most {settings.seconds:g} s"
    say(f"{settings.steps:,} steps of {blocks:,} blocks in {settings.batch:,} rows of {seq:,} tokens of {text}{limit}")
    say(f"{engine.backend} on {engine.device}, {engine.dtype}; " + "; ".join(engine.notes))


def _distil(
    run: TwinRun, engine: Engine, twin: Any, learner: Any, dataset: Dataset, frozen: Frozen, given: Any, say: Console
) -> dict[str, Any]:
    """Train the twin to the end of its run and measure it on `given`, held-out rows; return what is said of it."""
    settings, bos = run.settings, run.config.model.bos
    before, rows, spread = digest(engine.weights()), None, None
    if settings.text == "own":
        rows, spread = _own_rows(run, engine, dataset, frozen.sha256, say)
    summary = train(run, learner, reading(dataset, rows), say, say.moving if say.terminal else None)
    after = digest(engine.weights())
    check_frozen(before, after)
    step, limit = summary.steps, context_limit(frozen.subject.config)
    text = {} if spread is None else {"twin/text": {"rows": settings.own_rows, "distinct": spread}}
    run.log(step, {"twin/frozen": after, **text})
    say(f"the frozen weights are what they were ({after[:12]})")
    near, drafts = {}, {}
    for texts in acceptance.held_out(engine, given, settings):
        near[texts.kind] = acceptance.nearness(twin, texts, bos, settings)
        drafts[texts.kind] = acceptance.decoding(engine, dataset.tokenizer, twin, texts, settings, limit)
    run.log(step, {"twin/places": near, "twin/decoding": drafts})
    _show(near, drafts, say)
    own = {} if spread is None else {"distinct": spread}
    return {"step": step, "seconds": summary.seconds, "frozen": after, "places": near, "decoding": drafts, **own}


def _own_rows(run: TwinRun, engine: Engine, dataset: Dataset, artifact: str, say: Console) -> tuple[Any, float]:
    """Return the own text of a distillation and its share of new 8-grams: what was written before, or now."""
    settings, seq, model = run.settings, run.config.train.seq, run.config.model
    path, count = run.path / own_text.NAME, settings.own_rows
    made = {"artifact": artifact, "seed": settings.seed, "prompt": settings.prompt, "rows": count, "seq": seq}
    made |= {"data": identity(dataset)["sha256"], "dtype": engine.dtype, "backend": engine.backend}
    rows = own_text.read_own(path, count, seq, model.vocab, made)
    words = "read again"
    if rows is None:
        begun = own_text.prompts(dataset.train, model.bos, count, settings.prompt, settings.seed)
        rows, words = own_text.continued(engine, begun, seq, say.progress("own text")), "written"
        own_text.write_own(path, rows, made)
    share = own_text.distinct(rows[:, settings.prompt :].tolist())
    say(f"own text {words}: {count:,} rows of {seq:,} tokens, {share:.1%} of the 8-grams behind the prompts distinct")
    return rows, share


def _show(near: dict[str, Any], drafts: dict[str, Any], say: Console) -> None:
    """Print how near the twin is to the model, place by place, and what its drafts come to."""
    places = range(1, 1 + len(next(iter(near.values()))["agreement"]))
    rows = [(kind, *(f"{x:.3f}" for x in found["agreement"])) for kind, found in near.items()]
    say.table(("agreement at place", *map(str, places)), rows)
    rows = [(kind, *(f"{x:.3f}" for x in found["kl"])) for kind, found in near.items()]
    say.table(("KL, nats", *map(str, places)), rows)
    for kind, found in near.items():
        say(f"{kind}: cosine by layer " + ", ".join(f"{label} {x:.2f}" for label, x in found["cosine"].items()))
    rows = [
        (kind, draft, f"{one['tokens_per_cycle']:.2f}", f"{one['tpf']:.2f}", f"{one['seconds']:.2f}",
         f"{one['same']:.0f}/{one['texts']:.0f}", f"{one['distinct']:.0%}")
        for kind, arms in drafts.items() for draft, one in arms.items()
    ]  # fmt: skip
    head = ("text", "drafter", "tokens a cycle", "a forward pass", "seconds", "same text", "distinct 8-grams")
    say.table(head, rows)
