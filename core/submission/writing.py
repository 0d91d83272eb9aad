"""Writes the folder that one would send: from finished runs, the program that made them, and what audits found."""

import json
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.audit.claims import LIMIT, SECONDS
from core.config import to_json
from core.data.published import DOCUMENTS
from core.files import check_name, new_file, open_file, place_file, read_file, replace_file
from core.submission.audits import audit_json, audit_of, legality
from core.submission.checks.form import secrets_in
from core.submission.folder import MAX_FILE, TRACKS, SubmissionError
from core.submission.log_values import Log, parse_log
from core.submission.logs import Program, log_lines, program_described, program_of
from core.submission.readme import Page, readme
from core.submission.requirements import requirements
from core.submission.submission_json import SEEDS, Author, compliance_of, submission_json
from core.submission.unpack import unpack_program
from core.training.run import Run, config_digest

PROGRAM = "train_gpt.py"
Say = Callable[[str], None]


class SubmissionOrder(NamedTuple):
    """What is to be written, and where."""

    runs: tuple[Run, ...]
    about: Author
    out: Path
    """Place in which records/<track>/<date>_<Name> is made, and the artifacts."""
    form: Literal["text", "zip"]
    program: Path | None = None
    """The packed program; None: that of the run folders, or packed from their settings."""
    replace: bool = False


class Written(NamedTuple):
    """What was written."""

    folder: Path
    artifacts: tuple[Path, ...]
    track: str
    why: tuple[str, ...]
    """Why it is not in the record track."""


def write_submission(order: SubmissionOrder, say: Say) -> Written:
    """Write the folder, and the artifacts beside it; SubmissionError, RunError, FileError, OSError.

    Nothing is written if something in it must not be sent, and nothing that is there is touched unless told.
    """
    runs = order.runs
    _check_runs(runs)
    program, made_by = _program(order, say)
    _check_artifacts(runs)
    logs = [parse_log(f"train_seed{run.config.seed}.log", log_lines(run)) for run in runs]
    bad = [problem for log in logs for problem in log.problems]
    if bad:
        raise SubmissionError(f"the records of a run hold what no log can say: {bad[0]}")
    audits, silent = _audits(runs)
    why = _not_a_record(logs, made_by is not None, len(program))
    track = TRACKS[1] if why else TRACKS[0]
    code = {
        "bytes": len(program),
        "sha256": program_described(program, "").sha256,
        "form": unpack_program(program).form,
    }
    values = submission_json(order.about, track, logs, len(program), compliance_of(logs, list(audits.values())))
    page = Page(
        order.about, track, tuple(why), runs[0].config, logs, {**code, "ran": made_by is not None}, values, silent
    )
    files: dict[str, bytes] = {
        "README.md": readme(page).encode(),
        "submission.json": _json(values),
        PROGRAM: program,
        "requirements.txt": requirements(program, logs[0].versions or {}).encode(),
        "tokenizer.model": runs[0].tokenizer(),
        "audit.json": _json(audit_json(logs, audits, code)),
        "legality.md": legality(audits, silent).encode(),
        **{f"train_seed{run.config.seed}.log": "\n".join([*log_lines(run), ""]).encode() for run in runs},
    }
    _refuse_secrets(files, order)
    title = re.sub(r"[^A-Za-z0-9.+]+", "_", order.about.name).strip("_.")[:80]
    if not title:
        raise SubmissionError(f"--name {order.about.name[:40]!r}: no letter or digit that a folder can be named by")
    name = f"{order.about.date}_{title}"
    folder = order.out / "records" / f"track_{track}" / name
    artifacts = tuple(order.out / f"{name}_seed{run.config.seed}.skc" for run in runs)
    _place(folder, files, artifacts, order)
    return Written(folder, artifacts, track, tuple(why))


def _check_runs(runs: Sequence[Run]) -> None:
    """Raise SubmissionError unless the runs are several seeds of one configuration."""
    if not runs:
        raise SubmissionError("no run was given: skc submit RUN RUN RUN --out FOLDER ...")
    seeds = [run.config.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise SubmissionError(f"seeds {seeds}: two runs of one seed are one sample; give a run of each seed")
    first = runs[0]
    for run in runs[1:]:
        same = config_digest(run.config) == config_digest(first.config)
        if not same or to_json(run.config.eval) != to_json(first.config.eval):
            raise SubmissionError(f"{run.path}: has other settings than {first.path}; skc compare shows which")
        if run.tokenizer() != first.tokenizer():
            raise SubmissionError(f"{run.path}: has another tokenizer than {first.path}")


def _check_artifacts(runs: Sequence[Run]) -> None:
    """Raise SubmissionError for an artifact that has other bytes than the run recorded of the one that it scored."""
    for run in runs:
        recorded, path = run.last("final/artifact"), run.artifact_path
        if recorded is None or not path.is_file():  # log_lines says so
            continue
        if path.stat().st_size != recorded["bytes"]:
            raise SubmissionError(
                f"{path}: {path.stat().st_size:,} bytes, but the run scored an artifact of {recorded['bytes']:,}: this "
                "is another one; write it again: skc export"
            )


def _program(order: SubmissionOrder, say: Say) -> tuple[bytes, Program | None]:
    """Return the program that is shipped, and the one that made the runs if it is that one."""
    named = {program_of(run.environment()) for run in order.runs}
    if len(named) > 1:
        raise SubmissionError("the runs were made by different programs; one submission is of one program's runs")
    made_by = named.pop()
    path = order.runs[0].path.resolve()
    beside = [place / PROGRAM for place in (path, path.parent, path.parent.parent)] if made_by is not None else []
    copies = [read_file(place, MAX_FILE) for place in beside if place.is_file() and place.stat().st_size < MAX_FILE]
    known = [copy for copy in copies if made_by is not None and program_described(copy, "").sha256 == made_by.sha256]
    if order.program is not None:
        data = read_file(order.program, MAX_FILE)
    elif known:
        data = known[0]
    else:
        from core.submission.pack import pack_program

        backend = order.runs[0].environment().get("backend", "cuda")
        form = made_by.form if made_by is not None and made_by.form in ("text", "zip") else order.form
        say(f"packing {PROGRAM} of the runs' settings ({form})")
        data = pack_program(order.runs[0].config, backend, form)
    sha256 = program_described(data, "").sha256
    if made_by is not None and sha256 != made_by.sha256:
        raise SubmissionError(
            f"the runs were made by the program {made_by.sha256[:12]}, this one is {sha256[:12]}: give the one that "
            "ran with --program FILE"
        )
    return data, made_by


def _audits(runs: Sequence[Run]) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """Return seed -> what its audit found, and seed -> why it has none."""
    audits, silent = {}, {}
    for run in runs:
        audit, why = audit_of(run, runs)
        if audit is None:
            silent[run.config.seed] = why
        else:
            audits[run.config.seed] = audit
    return audits, silent


def _not_a_record(logs: Sequence[Log], packed: bool, code: int) -> list[str]:
    """Return why the runs are none of the record track; nothing: they are."""
    why = []
    if not packed:
        why.append("the runs were made by a checkout, not by the program in this folder")
    if len(logs) < SEEDS:
        why.append(f"{len(logs)} seeds, the track asks for {SEEDS}")
    for log in logs:
        step = (log.step_avg_ms or 0.0) / 1000
        trained = max(log.train_seconds or 0.0, log.closed_seconds or 0.0)
        evaluated = max(log.eval_seconds or 0.0, log.eval_strict_seconds or 0.0)
        if log.ranks != 8 or "H100" not in (log.device or ""):
            why.append(f"seed {log.seed} ran on {log.ranks} x {log.device}, not on 8 H100")
        if log.train_seconds is None or log.eval_seconds is None or max(trained - step, evaluated) > SECONDS:
            why.append(f"seed {log.seed} is not known to have trained and scored within {SECONDS:.0f} s each")
        if (log.artifact_bytes or 0) + code > LIMIT:
            why.append(f"seed {log.seed} has more than {LIMIT:,} bytes with the code")
        if not log.val_full or log.val_documents != DOCUMENTS:
            why.append(f"seed {log.seed} did not score the published validation text, all {DOCUMENTS:,} documents")
    return why


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _refuse_secrets(files: dict[str, bytes], order: SubmissionOrder) -> None:
    """Raise SubmissionError if a file has a path, a user, a machine or a credential in it: which, but never what."""
    known = f"{order.about.author} {order.about.github_id}"
    for name, data in files.items():
        text = data.decode("utf-8", "replace")
        if name == PROGRAM:
            text = "\n".join([text, *unpack_program(data).texts])
        for what in secrets_in(text, known):
            raise SubmissionError(f"{name}: {what}, which must not be sent: nothing was written")


def _place(folder: Path, files: dict[str, bytes], artifacts: Sequence[Path], order: SubmissionOrder) -> None:
    """Write the folder under a name of its own and rename it, then the artifacts."""
    check_name(folder)
    for path in (folder, *artifacts):
        if path.is_symlink() or (path.exists() and not order.replace):
            raise SubmissionError(f"{path}: is there already; choose another --out, or add --replace")
    if folder.exists() and not (folder / "submission.json").is_file():
        raise SubmissionError(f"{folder}: holds no submission, so it is not replaced: move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    fresh.mkdir()
    try:
        for name, data in files.items():
            replace_file(fresh / name, data)
        if folder.exists():
            shutil.rmtree(folder)
        place_file(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    for run, path in zip(order.runs, artifacts, strict=True):
        with open_file(run.artifact_path) as source, new_file(path) as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
