"""The verb audit: does a score keep the rules?"""

import contextlib
import dataclasses
import json
import math
import shutil
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import FlagConversionOff, Positional, Suppress

from core.audit.auditor import audit
from core.audit.claims import Plan
from core.audit.legality import headline, markdown
from core.audit.rules import Finding
from core.config import ConfigError
from core.engine.loading import choose_backend
from core.engine.protocol import DType
from core.files import own_folder, replace_file
from core.training.records import of_a_run
from core.training.run import Run, RunError
from core.training.writer import hold, sole_writer
from core.verbs.common import Backend, Context, Outcome, check_tokenizer, open_artifact, open_named
from core.verbs.scoring_options import Unchecked, judged


@dataclass(frozen=True)
class Audit:
    """Options of `skc audit`; those left out are the run's own."""

    path: Positional[str]
    """Run folder (its artifact is audited) or artifact."""
    data: str | None = None
    """Prepared folder, sample or sample-case; None: what the run was trained on (a bare artifact: sample)."""
    tokens: int | None = None
    """Score only the first documents, about so many tokens: quicker; no rule about the whole set is checked."""
    windows: Literal["plain", "sliding", "documents", "stateful"] | None = None
    """As in `skc eval`."""
    seq: int | None = None
    """Longest context of a window, in tokens."""
    stride: int | None = None
    """Targets scored per window after the first; None: the run's, or a quarter of a sliding window."""
    batch: int | None = None
    """Windows per forward pass."""
    plugins: tuple[str, ...] | None = None
    """What else has a part in the score: temperature, counts, or package.module:Class; docs/legality.md says more."""
    eval: FlagConversionOff[Unchecked] = field(default_factory=Unchecked)
    flips: int = 4
    """Tokens that the flip test changes."""
    seed: int = 0
    """Seed of where the audit looks."""
    seeds: tuple[str, ...] = ()
    """Other runs of the same claim, one per seed."""
    program: str | None = None
    """The packed program that made the run (skc pack): its bytes count as code; None: this checkout's, packed."""
    reference: tuple[float, ...] = ()
    """Scores to beat, in bits per byte."""
    out: str | None = None
    """Folder of ledger, audit.json and legality.md; None: audit/ in the run folder, or ARTIFACT.audit."""
    backend: Backend = "auto"
    """auto: MLX on a Mac, PyTorch elsewhere, as installed."""
    dtype: DType | None = None
    """Compute type; None: bfloat16 on a GPU that has it (not M1, M2), else float32. float16: MLX only."""
    given: Suppress[tuple[str, ...]] = ()
    """Options that the command line has."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def audit_score(options: Audit, context: Context) -> Outcome:
    """Audit a run's artifact, or a bare one; not ok if a rule is broken."""
    if options.flips < 1 or (options.tokens is not None and options.tokens < 1):
        raise ConfigError(f"--flips {options.flips} --tokens {options.tokens}: expected at least 1")
    if not all(math.isfinite(score) and score > 0 for score in options.reference):
        raise ConfigError(f"--reference {options.reference}: expected bits per byte above 0")
    if "--eval.documents" in options.given and options.eval.documents is not None:
        raise ConfigError(
            f"--eval.documents {options.eval.documents}: an audit is of the whole text, or of its first --tokens N"
        )
    plan = _plan(options)
    with contextlib.ExitStack() as stack:
        with of_a_run():
            if plan.run is not None and plan.folder.parent == plan.run.path:
                stack.enter_context(hold(plan.run.path))
                own_folder(plan.folder)
            else:
                plan.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(sole_writer(plan.folder))
        return _audited(plan, context)


def _audited(plan: Plan, context: Context) -> Outcome:
    report, data = plan.folder / "legality.md", plan.folder / "audit.json"
    for old in (report, data):  # whatever happens now, an earlier verdict is not this one's
        old.unlink(missing_ok=True)
    result = audit(plan, context.say)
    value = result.to_json()
    replace_file(report, markdown(result).encode())
    replace_file(data, (json.dumps(value, indent=1) + "\n").encode())
    context.say(headline(result))
    for finding in result.findings:
        _show(finding, context)
    broken = [f.rule for f in result.findings if f.verdict == "FAIL"]
    fine = "no rule was found broken" if result.ok else "the evaluation did not come to its end"
    context.say(f"broken: {', '.join(dict.fromkeys(broken))}" if broken else fine)
    for path in (report, data):
        context.say(f"wrote {path}")
    return Outcome(result.ok, {**value, "files": [str(report), str(data)]})


def _show(finding: Finding, context: Context) -> None:
    """Print a finding, its evidence broken into lines that stay under each other."""
    width = max(60, shutil.get_terminal_size().columns)
    head = f"{finding.rule:<4} {finding.verdict:<12} "
    lines = textwrap.wrap(finding.evidence, width - len(head)) or [""]
    for i, line in enumerate(lines):
        context.say(f"{head if i == 0 else ' ' * len(head)}{line}")


def _plan(options: Audit) -> Plan:
    path = Path(options.path)
    run = Run.open(path) if path.is_dir() else None
    artifact = run.artifact_path if run else path
    if not artifact.is_file():
        cure = (
            f"train it to its end: skc train {run.config.preset} --out {path}" if run else "give a run or an artifact"
        )
        raise RunError(f"{artifact}: no such artifact; {cure}")
    subject = open_artifact(str(artifact), options.data)
    base = run.config if run else subject.config
    config = dataclasses.replace(
        base,
        model=subject.config.model,
        eval=dataclasses.replace(judged(base.eval, options, options.path), documents=None),
        data=base.data if options.data is None else subject.config.data,
    )
    dataset = open_named(options.path, config, options.data, train=False)
    check_tokenizer(subject, dataset)
    documents = None
    if options.tokens is not None and options.tokens < len(dataset.val):
        documents = max(1, int((dataset.val.document_starts <= options.tokens).sum()) - 1)
    places = {Path(other).resolve() for other in options.seeds} - {path.resolve()}
    others = [Run.open(place) for place in sorted(places)]
    return Plan(
        artifact=artifact,
        run=run,
        config=config,
        folder=Path(options.out) if options.out else path / "audit" if run else Path(f"{path}.audit"),
        backend=choose_backend(options.backend),
        dtype=options.dtype,
        documents=documents,
        flips=options.flips,
        seed=options.seed,
        seeds=tuple([run, *others] if run else others),
        reference=options.reference,
        program=None if options.program is None else Path(options.program),
    )
