"""Checks of what is shipped: the program, and the artifact that the audit names."""

import hashlib
import platform
import re
import sys
from typing import Any

from core.console import shorten
from core.data.shards import file_sha256
from core.files import FileError
from core.submission.checks.answers import Answer, Checked, claimed_number
from core.submission.submission_json import RULES, compliance_of
from core.submission.unpack import compile_problem, unpack_program

STUB = 1024
"""Bytes: a program that trains a model is longer, packed or not."""
FORWARD = re.compile(r"\bdef (?:forward|__call__)\b|\bmatmul\b|\beinsum\b|\bF\.linear\b")
"""Words of a program that has a model in it."""


def check_program(subject: Checked) -> Answer:
    """Judge that the program compiles, is a whole one, and is the one that the logs and submission.json name."""
    folder = subject.folder
    data, name = folder.program, folder.program_name
    if data is None:
        return Answer("", [f"no program: {name or 'train_gpt.py'} is not there, or cannot be read"])
    if not data.strip():
        return Answer("", [f"{name}: is empty"])
    size, unpacked = len(data), unpack_program(data)
    problems, newer = [f"{name}: {problem}" for problem in unpacked.problems], ""
    if unpacked.texts and (problem := compile_problem(unpacked)):
        words = f"{name}: does not compile under Python {platform.python_version()}: {problem}"
        if "f-string" in problem and sys.version_info < (3, 12):
            newer = f"{words}; Python 3.12 reads more of them"
        else:
            problems.append(words)
    if size < STUB:
        problems.append(f"{name}: {size} bytes, a stub")
    elif not any(FORWARD.search(text) for text in unpacked.texts):
        problems.append(f"{name}: no model in it or in what it unpacks to")
    problems += _claims(subject, size, hashlib.sha256(data).hexdigest())
    how = f"{unpacked.form}, {len(unpacked.texts)} sources, {sum(map(len, unpacked.texts)):,} letters unpacked"
    return Answer(f"{name}: {size:,} bytes ({how})", problems, newer)


def _claims(subject: Checked, size: int, sha256: str) -> list[str]:
    """Return in what the program is not the one that is claimed."""
    folder, problems = subject.folder, []
    claimed = claimed_number((folder.submission or {}).get("bytes_code"))
    if claimed is not None and int(claimed) != size:
        problems.append(f"bytes_code {claimed:,.0f}, {folder.program_name} has {size:,} bytes: what is shipped counts")
    for log in folder.logs:
        if log.code_form == "checkout":
            if "10min" in folder.track:
                problems.append(f"{log.name}: was made by a checkout, not by {folder.program_name}")
            continue
        if log.code_sha256 is not None and log.code_sha256 != sha256:
            problems.append(f"{log.name}: was made by another program ({log.code_sha256[:12]}, not {sha256[:12]})")
        if log.code_bytes is not None and log.code_bytes != size:
            problems.append(f"{log.name}: says {log.code_bytes:,} bytes of code, the file has {size:,}")
    return problems


def check_artifact(subject: Checked) -> Answer:
    """Hold the artifacts that audit.json names to the logs, and to a file that was given."""
    folder, audit = subject.folder, subject.folder.audit
    if audit is None and not any(entry.name == "audit.json" for entry in folder.entries):
        if not folder.ours and subject.artifact is None:
            return Answer("", unchecked="no audit.json, and the challenge asks for none")
        return Answer("", ["no audit.json"])
    named = (audit or {}).get("artifacts")
    if not isinstance(named, dict) or not all(isinstance(entry, dict) for entry in named.values()):
        return Answer("", ["audit.json: artifacts: expected an object of seeds, each with bytes and sha256"])
    problems = [*_of_logs(subject, named), *_of_code(subject), *_of_verdicts(subject)]
    seen = f"audit.json names {len(named)} artifacts"
    if subject.artifact is None:
        return Answer(f"{seen}; give one with --artifact FILE to compare it", problems)
    try:
        sha256 = file_sha256(str(subject.artifact))
    except FileError as error:
        return Answer(seen, [*problems, str(error)])
    seeds = [seed for seed, entry in named.items() if entry.get("sha256") == sha256]
    if not seeds:
        known = ", ".join(f"seed {seed} {str(entry.get('sha256'))[:12]}" for seed, entry in named.items())
        problems.append(f"{subject.artifact.name}: sha256 {sha256[:12]}, audit.json has {known}")
    return Answer(f"{seen}; {subject.artifact.name} is that of seed {shorten(', '.join(seeds), 60)}", problems)


def _of_code(subject: Checked) -> list[str]:
    """Return in what the program is not the one that audit.json names."""
    data, code = subject.folder.program or b"", (subject.folder.audit or {}).get("code")
    if code is None:
        return []
    found = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if isinstance(code, dict) and all(code.get(name) == value for name, value in found.items()):
        return []
    return [f"audit.json: code is not {subject.folder.program_name}: bytes and sha256 of another file"]


def _of_verdicts(subject: Checked) -> list[str]:
    """Return which claims of compliance no verdict in audit.json bears out; others' audits are in no form of ours."""
    folder, audits = subject.folder, (subject.folder.audit or {}).get("audits")
    claims = (folder.submission or {}).get("compliance")
    if not folder.ours or not isinstance(claims, dict):
        return []
    whole = []
    for audit in audits.values() if isinstance(audits, dict) else ():
        findings = audit.get("findings") if isinstance(audit, dict) else None
        findings = findings if isinstance(findings, list) else []
        named = [f for f in findings if isinstance(f, dict) and {type(f.get(n)) for n in ("rule", "verdict")} == {str}]
        whole.append({"findings": named})
    answers = compliance_of(folder.logs, whole)
    words = {False: "false", None: "not checked"}
    return [
        f"submission.json: compliance.{key} is true, by the findings of audit.json {words[answers.get(key)]}"
        for key in RULES
        if claims.get(key) is True and answers.get(key) is not True
    ]


def _of_logs(subject: Checked, named: dict[str, Any]) -> list[str]:
    problems = []
    for log in subject.folder.logs:
        entry = named.get(str(log.seed))
        if entry is None:
            problems.append(f"audit.json: no artifact of seed {log.seed}")
            continue
        for name, found in (("sha256", log.artifact_sha256), ("bytes", log.artifact_bytes)):
            if found is not None and entry.get(name) != found:
                shown = shorten(str(entry.get(name))[:100], 20)
                problems.append(f"audit.json: seed {log.seed}: {name} {shown}, {log.name} has {str(found)[:20]}")
    return problems
