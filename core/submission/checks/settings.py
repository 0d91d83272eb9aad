"""Checks of settings: the model that they describe, the README that repeats them, one configuration for all seeds."""

import json
import re
from typing import Any

from core.config import ConfigError, RunConfig, from_json
from core.model.params import count
from core.plain import flattened
from core.submission.checks.answers import Answer, Checked, claimed_number
from core.submission.folder import SubmissionFolder
from core.submission.log_values import Log
from core.submission.unpack import unpack_program
from core.training.run import config_digest

NAMED = re.compile(r"^[ \t]*`?([a-z_]+(?:\.[a-z0-9_]+)+)`? = (\S.{0,400})$", re.MULTILINE)
"""A setting of ours as our README writes it."""
VARIABLE = re.compile(r"(?<![\w$])([A-Z][A-Z0-9_]{2,40})=([\w.,+-]{1,60})(?![\w/])")
BLOCK = re.compile(r"^(```|~~~)[^\n]{0,80}\n(.{0,20000}?)^\1", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^(?: {4}|\t)(\S.{0,2000})$", re.MULTILINE)
FREE = ("seed", "run_id", "world_size", "rank", "local_rank", "is_main_process")
"""Hyper-parameters of public logs that differ from run to run; names of files do too."""
PLACES = re.compile(r"(path|dir|file|files|log|name)s?$")
CLAIMS = {
    "cosine": (re.compile(r"\bcosine\b[^\n]{0,40}(?:schedule|decay|anneal|warm-?down|\blr\b)", re.IGNORECASE),
               re.compile(r"\bcos\s*\(|cosine", re.IGNORECASE), 1),
    "variable-length attention": (re.compile(r"\bvar-?len\b", re.IGNORECASE), re.compile(r"varlen|cu_seqlens"), 2),
}  # fmt: skip
"""What a README may claim -> its words there, those in a program, and how often a program that uses it has them."""


def config_of(log: Log) -> RunConfig | None:
    """Return the settings that a log of ours holds, or None where they are no settings of ours."""
    if log.settings is None:
        return None
    try:
        return from_json(RunConfig, dict(log.settings), log.name)
    except (ConfigError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None


def check_parameters(subject: Checked) -> Answer:
    """Count the parameters of the model that the settings describe."""
    folder, problems, counted = subject.folder, [], {}
    claimed = claimed_number((folder.submission or {}).get("model_params"))
    for log in folder.logs:
        config = config_of(log)
        if log.settings is not None and config is None:
            problems.append(f"{log.name}: settings are none of this program's")
        if config is None:
            continue
        counted[log.name] = size = count(config.model)
        if log.parameters != size:
            problems.append(f"{log.name}: says {log.parameters} parameters, its settings have {size:,}")
    said = {log.parameters for log in folder.logs if log.parameters is not None}
    known = set(counted.values()) or said
    if len(said) > 1:
        problems.append(f"the logs have different sizes: {', '.join(f'{size:,}' for size in sorted(said))}")
    if claimed is not None and known and int(claimed) not in known:
        problems.append(f"submission.json: model_params {claimed:,.0f}, by the logs {max(known):,}")
    evidence = f"{', '.join(f'{size:,}' for size in sorted(known))} parameters" if known else ""
    if len(counted) == len(folder.logs) and counted:
        return Answer(f"{evidence}, counted from the settings of {len(counted)} logs", problems)
    return Answer(evidence, problems, "the logs hold no settings that a model can be built from")


def check_readme(subject: Checked) -> Answer:
    """Hold the settings that the README and its commands name to those of the logs."""
    folder = subject.folder
    if folder.readme is None or not folder.logs:
        return Answer("", unchecked="no README.md or no log that can be read")
    ours = _own_settings(folder, folder.readme)
    theirs = _variables(folder, folder.readme)
    problems = [*ours[0], *theirs[0], *_unused_claims(folder, folder.readme)]
    seen = ours[1] + theirs[1]
    return Answer(f"{seen} settings of the README compared", problems, "" if seen else "the README names no settings")


def _own_settings(folder: SubmissionFolder, readme: str) -> tuple[list[str], int]:
    """Return what is wrong with settings of ours that a README names, and how many it names."""
    problems, seen = [], 0
    for log in folder.logs:
        settings = flattened(log.settings) if log.settings else {}
        for name, text in NAMED.findall(readme):
            if name not in settings:
                continue
            seen += 1
            try:
                value: Any = json.loads(text.strip())
            except (ValueError, RecursionError):
                value = text.strip()
            if value != settings[name]:
                problems.append(f"README.md: {name} = {text.strip()[:60]}, {log.name} has {str(settings[name])[:60]}")
    return list(dict.fromkeys(problems)), seen


def _variables(folder: SubmissionFolder, readme: str) -> tuple[list[str], int]:
    """Return which VAR=value of a README's commands no log has, and how many were compared."""
    commands = "\n".join([*(block for _, block in BLOCK.findall(readme)), *INDENTED.findall(readme)])
    named: dict[str, set[str]] = {}
    for name, value in VARIABLE.findall(commands):
        named.setdefault(name.lower(), set()).add(value)
    problems, seen = [], 0
    for name, values in named.items():
        logged = {log.hyper[name] for log in folder.logs if name in log.hyper}
        if name in FREE or PLACES.search(name) or not logged:
            continue
        seen += 1
        if not any(_same(value, other) for value in values for other in logged):
            problems.append(f"README.md: {name.upper()}={'|'.join(sorted(values))}, the logs have {sorted(logged)}")
    return problems, seen


def _same(text: str, other: str) -> bool:
    """Return whether two spellings of a value are one: 0.10 and 0.1, 1 and True."""
    truths = {"true": "1", "false": "0"}
    text, other = (truths.get(word.lower(), word) for word in (text, other))
    try:
        return float(text) == float(other)
    except ValueError:
        return text == other


def _unused_claims(folder: SubmissionFolder, readme: str) -> list[str]:
    """Return what the README claims and the program has no use of."""
    if folder.program is None or len(folder.program) < 1024:
        return []
    text = "\n".join(unpack_program(folder.program).texts)
    problems = []
    for what, (claim, use, least) in CLAIMS.items():
        lines = [line for line in text.split("\n") if not line.lstrip().startswith(("#", "import ", "from "))]
        if claim.search(readme) and sum(len(use.findall(line)) for line in lines) < least:
            problems.append(f"README.md claims {what}, {folder.program_name} does not use it")
    return problems


def check_one_configuration(subject: Checked) -> Answer:
    """Judge that all logs have one configuration, but for the seed."""
    logs = subject.folder.logs
    if len(logs) < 2:
        return Answer("", unchecked=f"{len(logs)} logs, a comparison takes two")
    problems, hashes = [], {}
    for log in logs:
        config = config_of(log)
        if log.config_sha256 is not None:
            hashes[log.name] = log.config_sha256
            if config is not None and config_digest(config) != log.config_sha256:
                problems.append(f"{log.name}: config_sha256 is not that of its settings")
            if config is not None and config.seed != log.seed:
                problems.append(f"{log.name}: settings of seed {config.seed}, log of seed {log.seed}")
    if len(set(hashes.values())) > 1:
        problems.append(f"config_sha256 differ: {', '.join(f'{name} {value[:12]}' for name, value in hashes.items())}")
    judged = {json.dumps((log.settings or {}).get("eval"), sort_keys=True) for log in logs if log.settings}
    if len(judged) > 1:
        problems.append("the logs have different eval settings")
    if hashes and len(hashes) == len(logs):
        return Answer(f"{len(logs)} logs of configuration {next(iter(hashes.values()))[:12]}", problems)
    first, compared = logs[0], 0
    for log in logs[1:]:
        names = [n for n in first.hyper.keys() & log.hyper.keys() if n not in FREE and not PLACES.search(n)]
        compared += len(names)
        differ = [f"{n} {first.hyper[n]} and {log.hyper[n]}" for n in sorted(names) if first.hyper[n] != log.hyper[n]]
        if differ:
            problems.append(f"{first.name} and {log.name} differ in {', '.join(differ[:4])}")
    unchecked = "" if compared else "the logs name no settings"
    return Answer(f"{compared} settings compared over {len(logs)} logs", problems, unchecked)
