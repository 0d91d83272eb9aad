"""Checks of form: what lies in the folder, what submission.json says of itself, and what must never be sent."""

import contextlib
import datetime
import getpass
import re
import socket
from pathlib import Path
from typing import Any

from core.console import shorten
from core.submission.checks.answers import Answer, Checked, claimed_number
from core.submission.folder import DATED, LOG_NAME, MAX_FILE, MAX_TEXTS, SEVERAL, TRACKS, SubmissionFolder
from core.submission.unpack import unpack_program

SPELLED = (*TRACKS, "non-record-16mb", "non-record-unlimited-compute-16mb")
"""Tracks as the public folders spell them."""
TEXTS = ("author", "github_id", "name", "blurb", "date", "track")
PER_SEED = ("val_bpb", "val_loss", "artifact_bytes", "steps", "step_avg_ms", "train_time_s", "eval_time_s")
WHOLE = ("artifact_bytes", "steps")
OPTIONAL = ("val_bpb_std", "val_loss_std", "pre_quant_val_bpb", "pre_quant_val_loss", "t_statistic", "p_value")
MIN_SEEDS = 3
COMPLIANCE = (
    "train_under_600s", "artifact_under_16mb", "eval_under_600s", "no_slot", "no_pre_quant_ttt", "no_etlb",
    "no_ngram_cache", "score_first_ttt", "three_seeds",
)  # fmt: skip
ADMITTED = ("three_seeds", "no_ngram_cache")
"""Those that may be false and break no rule."""
SECRETS = {
    "a home folder": re.compile(r"(?<![\w.])(?:/(?:home|Users|root)/|[A-Za-z]:\\\\?Users\\\\?)[\w.$-]{1,64}"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"),
    "an API key": re.compile(
        r"\b(?:sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|xox[abps]-[A-Za-z0-9-]{10,}|AIza[\w-]{30,})"
    ),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----"),
    "a password in an address": re.compile(r"\b[a-z][a-z+]{1,9}://[^\s/:@'\"]{1,64}:[^\s/:@'\"]{1,64}@"),
    "a credential": re.compile(
        r"(?i)\b(?:\w{0,30}(?:api_?key|secret|password|access_?token))\s{0,2}[=:]\s{0,2}['\"]?[A-Za-z0-9/+_-]{16,}"
    ),
    "a shell's prompt with a machine's name": re.compile(
        r"(?m)^(?:\([\w-]{1,20}\) ?)?[a-z][\w-]{0,30}@[\w.-]{2,60}:[~/]\S{0,200}[$#] "
    ),
    "an address of a machine": re.compile(r"\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2,3}:\d{2,5}\b"),
}  # fmt: skip
PLAIN_NAMES = ("root", "user", "users", "admin", "ubuntu", "debian", "runner", "localhost", "home", "main", "train")
"""Names of users and machines that say nothing."""


def check_layout(subject: Checked) -> Answer:
    """Judge names, places, sizes and kinds of what lies in the folder."""
    folder, place = subject.folder, subject.folder.path.resolve()
    problems = list(folder.problems)
    if not DATED.fullmatch(place.name):
        problems.append(f"the folder is named {place.name!r}, expected YYYY-MM-DD_Name")
    files = {entry.name for entry in folder.entries if entry.kind == "file"}
    for entry in folder.entries:
        if entry.kind in ("link", "other"):
            problems.append(f"{entry.name}: is {'a link' if entry.kind == 'link' else 'no file'}")
        elif entry.size > MAX_FILE:
            problems.append(f"{entry.name}: {entry.size:,} bytes, expected at most {MAX_FILE:,}")
        elif entry.kind == "file" and not entry.size:
            problems.append(f"{entry.name}: has 0 bytes")
    for name in ("README.md", "submission.json", "train_gpt.py"):
        if name not in files:
            other = {"submission.json": folder.submission_name, "train_gpt.py": folder.program_name}.get(name)
            problems.append(f"no {name}" + (f" (there is {other})" if other else ""))
    odd = [log.name for log in folder.logs if not LOG_NAME.fullmatch(log.name)]
    if odd:
        problems.append(f"logs are named {', '.join(odd)}, expected train_seed<N>.log")
    for log in (*folder.logs, *folder.spare):
        if (named := LOG_NAME.fullmatch(log.name)) and int(named[1]) != log.seed:
            problems.append(f"{log.name}: is the log of seed {log.seed}")
    if not folder.logs:
        problems.append("no log of a seed")
    if place.parent.name in SEVERAL and folder.track not in place.parent.name:
        problems.append(f"lies in {place.parent.name}, but submission.json names track {folder.track}")
    where = "" if place.parent.name in SEVERAL else f", not in a folder {' or '.join(SEVERAL)}"
    beside = f"{len(folder.entries)} names{where}; whether a pull request touches nothing else is not in the folder"
    return Answer(beside, problems)


def check_json(subject: Checked) -> Answer:
    """Judge the fields of submission.json: there, of their types, real dates, seeds as many as logs."""
    folder, values = subject.folder, subject.folder.submission
    if values is None:
        return Answer("", [f"no {folder.submission_name or 'submission.json'} that can be read"])
    problems = [f"key {shorten(key, 40)!r} is there twice" for key in folder.doubled]
    for name in TEXTS:
        value = values.get(name)
        if not isinstance(value, str) or not value.strip() or len(value) > 20_000:
            problems.append(_wrong(name, name in values, value, "a text"))
    for name in ("val_bpb", "val_loss", "bytes_total", "bytes_code"):
        value = values.get(name)
        if claimed_number(value) is None or (name.startswith("bytes") and type(value) is not int):
            problems.append(_wrong(name, name in values, value, "a number above 0"))
    for name in OPTIONAL:
        if name in values and claimed_number(values[name]) is None:
            problems.append(_wrong(name, True, values[name], "a number from 0 up"))
    problems += [*_dates(values), *_compliance(values), *_seeds(folder, values)]
    github = values.get("github_id")
    if isinstance(github, str) and github.startswith("@"):
        problems.append(f"github_id: {shorten(github, 40)!r}, expected it without @")
    track = values.get("track")
    if isinstance(track, str) and track not in SPELLED:
        problems.append(f"track: {shorten(track, 40)!r}, expected {' or '.join(TRACKS)}")
    return Answer(f"{folder.submission_name}: {len(values)} fields", problems)


def _wrong(name: str, there: bool, value: Any, expected: str) -> str:
    shown = "missing" if not there else "null" if value is None else shorten(repr(value)[:200], 60)
    return f"{name}: {shown}, expected {expected}"


def _dates(values: dict[str, Any]) -> list[str]:
    date = values.get("date")
    if not isinstance(date, str):
        return []
    try:
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date, re.ASCII):
            raise ValueError
        datetime.date.fromisoformat(date)
    except ValueError:
        return [f"date: {shorten(date, 40)!r}, expected a day as YYYY-MM-DD"]
    return []


def _compliance(values: dict[str, Any]) -> list[str]:
    named = values.get("compliance", {})
    if not isinstance(named, dict) or not all(type(value) is bool for value in named.values()):
        return ["compliance: expected an object of true and false"]
    return [f"compliance.{name} is false" for name in COMPLIANCE if named.get(name) is False and name not in ADMITTED]


def _seeds(folder: SubmissionFolder, values: dict[str, Any]) -> list[str]:
    """Return what is wrong with the seeds, and with what is said of each."""
    problems, seeds, results = [], values.get("seeds"), values.get("seed_results")
    if isinstance(seeds, dict):
        problems.append("seeds is an object, expected a list of whole numbers and the figures in seed_results")
        seeds = [*folder.claimed]
    elif not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        problems.append(_wrong("seeds", "seeds" in values, seeds, "a list of whole numbers"))
        seeds = []
    if len(set(seeds)) < len(seeds):
        problems.append("seeds: a seed is there twice")
    if not isinstance(results, dict):
        problems.append(_wrong("seed_results", "seed_results" in values, results, "an object of seeds"))
    elif len(folder.claimed) < len(results):
        problems.append("seed_results: expected seeds as its names, and an object of figures for each")
    for seed, figures in list(folder.claimed.items())[:20]:
        for name in PER_SEED:
            value = figures.get(name)
            if claimed_number(value) is None or (name in WHOLE and type(value) is not int):
                problems.append(_wrong(f"seed_results.{seed}.{name}", name in figures, value, "a number"))
    logs = {log.seed for log in folder.logs}
    if not len(set(seeds)) == len(folder.claimed) == len(logs):
        problems.append(
            f"{len(set(seeds))} seeds, {len(folder.claimed)} results and logs of {len(logs)} seeds, "
            "expected as many of each"
        )
    elif set(seeds) != logs or set(folder.claimed) != logs:
        problems.append(f"seeds {sorted(seeds)}, but logs of seeds {sorted(s for s in logs if s is not None)}")
    if folder.track == TRACKS[0] and len(logs) < MIN_SEEDS:
        problems.append(f"logs of {len(logs)} seeds, the record track asks for {MIN_SEEDS}")
    return problems


def check_secrets(subject: Checked) -> Answer:
    """Look for home folders, credentials and names of machines in every file."""
    problems, texts, values = [], subject.folder.texts(), subject.folder.submission or {}
    known = f"{values.get('author')} {values.get('github_id')}"
    if subject.folder.program:
        texts += [(subject.folder.program_name, text) for text in unpack_program(subject.folder.program).texts]
    for name, text in texts:
        problems += [f"{name}: {what}" for what in secrets_in(text, known)]
    size = sum(entry.size for entry in subject.folder.entries if entry.kind == "file" and entry.size <= MAX_FILE)
    unchecked = f"{size:,} bytes of files, of which {MAX_TEXTS:,} were looked at" if size > MAX_TEXTS else ""
    seen = f"looked at {len(texts)} files for home folders, credentials, names of machines"
    return Answer(seen, [*dict.fromkeys(problems)], unchecked)


def secrets_in(text: str, known: str = "") -> list[str]:
    """Return what of a text must not be sent: each kind once, with its line, never the secret itself.

    `known`: what the author says of themselves, which is no secret.
    """
    found = []
    for what, pattern in [*SECRETS.items(), *_of_this_machine(known).items()]:
        if match := pattern.search(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"line {line} has {what}")
    return found


def _of_this_machine(known: str) -> dict[str, re.Pattern[str]]:
    """Return patterns of what names this machine and its user, where the names say anything."""
    names = {"the name of this machine": socket.gethostname().partition(".")[0]}
    with contextlib.suppress(OSError, KeyError):  # a user may have no name
        names["the name of this machine's user"] = getpass.getuser()
    patterns = {
        what: re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
        for what, name in names.items()
        if len(name) > 3 and name.lower() not in PLAIN_NAMES and name.lower() not in known.lower()
    }
    home = str(Path.home())
    if home.count("/") > 1:
        patterns["this user's home folder"] = re.compile(rf"{re.escape(home)}(?![\w-])")
    return patterns
