"""The verb submit: writes the folder that one would send, checks any such folder, runs its program again."""

import datetime
import math
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from core.console import printable, shorten
from core.files import decode_text, read_file
from core.submission.checks.answers import Checked, SubmissionCheck
from core.submission.checks.fourteen import run_checks
from core.submission.folder import (
    MAX_JSON,
    SubmissionError,
    find_folder,
    parse_object,
    read_folder,
)
from core.submission.reproduce import reproduce
from core.submission.submission_json import Author
from core.submission.writing import SubmissionOrder, write_submission
from core.training.run import Run
from core.verbs.common import Context, Outcome
from core.verbs.errors import UsageError


@dataclass(frozen=True)
class Submit:
    """Options of `skc submit`."""

    runs: Positional[tuple[str, ...]] = ()
    """Finished run folders, one of each seed, of one configuration and one program."""
    out: str | None = None
    """Place in which records/<track>/<date>_<Name> is made, with the artifacts beside."""
    author: str | None = None
    """Who sends it."""
    github_id: str | None = None
    """Their name on GitHub, without @."""
    name: str | None = None
    """Name of the submission; the folder is named by date and name."""
    blurb: str | None = None
    """What it is, in a sentence or two."""
    credits: tuple[str, ...] = ()
    """Whose work it builds on: a line each."""
    date: str | None = None
    """Day of the submission, YYYY-MM-DD; None: today."""
    program: str | None = None
    """The packed program that made the runs; None: the copy in the run folder, or packed from the runs' settings."""
    pack: Literal["text", "zip"] = "text"
    """Form of a program that is packed now: of runs that a checkout made."""
    replace: bool = False
    """Write in place of a submission that is there."""
    check: str | None = None
    """Check this submission folder, ours or anyone's, instead of writing one."""
    artifact: str | None = None
    """With --check: an artifact, whose hash audit.json must have."""
    against: str | None = None
    """With --check: scores to beat: a submission.json, or a JSON object of seed -> bits per byte."""
    reproduce: str | None = None
    """Run the program of this folder again and compare losses. It is executed: do that to programs you trust."""
    seed: int | None = None
    """With --reproduce: the seed; None: the first log's."""
    steps: int = 20
    """With --reproduce: steps."""
    data: str | None = None
    """With --reproduce: the program's DATA_PATH; None: that of this shell."""
    limit: float = 1800.0
    """With --reproduce: most seconds."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


MODES = {
    "--check": ("check", "artifact", "against"),
    "--reproduce": ("reproduce", "seed", "steps", "data", "limit"),
    "--out": ("runs", "out", "author", "github_id", "name", "blurb", "credits", "date", "program", "pack", "replace"),
}
"""What is done -> the options that have a use then."""


def submit(options: Submit, context: Context) -> Outcome:
    """Write a submission, check one, or run one again; not ok if a check fails."""
    modes = [mode for mode in MODES if getattr(options, mode[2:]) is not None]
    if len(modes) != 1:
        given = " and ".join(modes) or "none"
        raise UsageError(f"expected one of --out, --check and --reproduce, given: {given}")
    defaults = Submit()
    for name, value in vars(options).items():
        if name not in (*MODES[modes[0]], "json") and value != getattr(defaults, name):
            shown = "RUN" if name == "runs" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{shown} has no use with {modes[0]}: leave it out")
    if options.check is not None:
        return _check(options, options.check, context)
    if options.reproduce is not None:
        return _reproduce(options, options.reproduce, context)
    return _write(options, context)


def _write(options: Submit, context: Context) -> Outcome:
    missing = [name for name in ("author", "github_id", "name", "blurb") if not (getattr(options, name) or "").strip()]
    if missing or not options.runs:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in missing) or "RUN"
        raise UsageError(f"{names}: missing; skc submit RUN RUN RUN --out FOLDER --author --github-id --name --blurb")
    for name, most in (("author", 200), ("github_id", 200), ("name", 200), ("blurb", 2000)):
        text = str(getattr(options, name))
        if len(text) > most or (name != "blurb" and not text.isprintable()):
            given = f"{len(text):,} letters" if len(text) > most else shorten(printable(text), 60)
            raise UsageError(f"--{name.replace('_', '-')}: {given}; expected one line of at most {most:,} letters")
    date = options.date or datetime.date.today().isoformat()
    try:
        date = datetime.date.fromisoformat(date).isoformat()
    except ValueError as error:
        raise UsageError(f"--date {date}: expected a day as YYYY-MM-DD") from error
    about = Author(
        str(options.author), str(options.github_id).removeprefix("@"), str(options.name), str(options.blurb), date,
        options.credits,
    )  # fmt: skip
    runs = tuple(Run.open(path) for path in options.runs)
    program = Path(options.program) if options.program else None
    order = SubmissionOrder(runs, about, Path(str(options.out)), options.pack, program, options.replace)
    written = write_submission(order, context.say)
    context.say(f"wrote {written.folder}, track {written.track}")
    for reason in written.why:
        context.say(f"not in the record track: {reason}")
    for path in written.artifacts:
        context.say(f"wrote {path}")
    checks = run_checks(Checked(read_folder(written.folder), written.artifacts[0]))
    value = {"folder": str(written.folder), "track": written.track, "why": list(written.why)}
    return _shown(checks, context, {**value, "artifacts": [str(path) for path in written.artifacts]})


def _check(options: Submit, path: str, context: Context) -> Outcome:
    reference, unit = _reference(Path(options.against)) if options.against else (None, "bpb")
    artifact = Path(options.artifact) if options.artifact else None
    if artifact is not None and not artifact.is_file():
        raise SubmissionError(f"{artifact}: no such artifact")
    folder = read_folder(find_folder(Path(path)))
    return _shown(run_checks(Checked(folder, artifact, reference, unit)), context, {"folder": str(folder.path)})


def _shown(checks: list[SubmissionCheck], context: Context, value: dict[str, Any]) -> Outcome:
    """Print the checks as a table and return the outcome."""
    width = max(60, shutil.get_terminal_size().columns)
    for check in checks:
        head = f"{check.number:>2} {check.verdict:<12} "
        lines = textwrap.wrap(f"{check.asks}: {check.evidence}", width - len(head))
        for i, line in enumerate(lines):
            context.say(f"{head if i == 0 else ' ' * len(head)}{line}")
    failed = [check.number for check in checks if check.verdict == "FAIL"]
    counts = {verdict: sum(check.verdict == verdict for check in checks) for verdict in ("PASS", "FAIL", "NOT CHECKED")}
    context.say(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return Outcome(not failed, {**value, "checks": [check.to_json() for check in checks], "failed": failed})


def _reference(path: Path) -> tuple[dict[str, float], str]:
    """Return the scores of a reference by seed and their unit: loss (nats per token) or bpb; SubmissionError."""
    value, doubled = parse_object(str(path), decode_text(path, read_file(path, MAX_JSON)))
    if doubled:
        raise SubmissionError(f"{path}: {doubled[0]!r} is there twice")
    results = value.get("seed_results", value.get("seeds", value))
    if not isinstance(results, dict):
        raise SubmissionError(f"{path}: expected seed_results, or an object of seed -> bits per byte")
    inner = [entry for entry in results.values() if isinstance(entry, dict)]
    unit = "loss" if inner and all("val_loss" in entry for entry in inner) else "bpb"
    scores: dict[str, Any] = {
        str(seed)[:40]: entry.get("val_loss" if unit == "loss" else "val_bpb") if isinstance(entry, dict) else entry
        for seed, entry in results.items()
    }
    for seed, score in scores.items():
        if type(score) not in (int, float) or not 0 < score < 1e6 or not math.isfinite(score):
            raise SubmissionError(f"{path}: {seed}: {str(score)[:40]}, expected a score above 0")
    return {seed: float(score) for seed, score in scores.items()}, unit


def _reproduce(options: Submit, path: str, context: Context) -> Outcome:
    if options.steps < 1 or not 0 < options.limit < 1e6:
        raise UsageError(f"--steps {options.steps} --limit {options.limit}: expected at least 1, and above 0")
    folder = read_folder(find_folder(Path(path)))
    again = reproduce(folder, options.seed, options.steps, options.data, options.limit)
    rows = [(f"{step:,}", logged, now, f"{difference:+.6f}") for step, logged, now, difference in again.rows]
    context.say.table(("step", "log", "now", "difference"), rows)
    context.say(f"{again.verdict}: seed {again.seed}: {again.evidence}")
    return Outcome(again.verdict != "FAIL", {"folder": str(folder.path), **again.to_json()})
