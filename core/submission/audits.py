"""What runs' audits found, told without the places of a machine: audit.json and legality.md of a folder."""

import re
from collections.abc import Sequence
from typing import Any

from core.audit.legality import MEANING
from core.audit.rules import RULES
from core.data.shards import file_sha256
from core.files import FileError, read_json
from core.formats.kinds import ANYTHING, COUNT, NUMBER, among, check_value, or_null, text
from core.submission.folder import SubmissionError
from core.submission.log_values import Log
from core.training.run import Run, config_digest

FINDING = {"rule": among(*RULES), "verdict": among(*MEANING), "evidence": text(1 << 16), "*": ANYTHING}
AUDIT = {
    "findings": [FINDING], "config_sha256": text(64), "artifact_sha256?": text(64), "seconds?": NUMBER,
    "evaluation??": {"clock?": NUMBER, "*": ANYTHING}, "error??": ANYTHING, "*": ANYTHING,
}  # fmt: skip
PLACE = re.compile(r"(?<![\w.])(?:~|\.{1,2})?/(?:[\w.+@-]{1,255}/){0,40}([\w.+@-]{1,255})")
ENTRY = {"bytes": COUNT, "sha256": text(64), "form?": or_null(text(20))}


def audit_of(run: Run, runs: Sequence[Run]) -> tuple[dict[str, Any] | None, str]:
    """Return what the audit of a run found, or None and why there is none; SubmissionError for a damaged one.

    It counts only if it was of this artifact and of these settings.
    """
    path = run.path / "audit" / "audit.json"
    if not path.exists():
        return None, "it was not audited (skc audit)"
    try:
        value = read_json(path)
        check_value(value, AUDIT, str(path), "audit the run again")
    except FileError as error:
        raise SubmissionError(str(error)) from error
    if value.get("artifact_sha256") != file_sha256(str(run.artifact_path)):
        return None, "its audit was of another artifact, or of an unnamed one (audit it again)"
    if value["config_sha256"] != config_digest(run.config):
        return None, "its audit was made with other settings (audit it again)"
    evaluation = value.get("evaluation") or {}
    findings = [
        {"rule": finding["rule"], "asks": RULES[finding["rule"]], "verdict": finding["verdict"],
         "evidence": without_places(finding["evidence"], runs)}
        for finding in value["findings"]
    ]  # fmt: skip
    result = {"findings": findings, "config_sha256": value["config_sha256"]}
    if "clock" in evaluation:
        result["eval_strict_seconds"] = evaluation["clock"]
    return result, ""


def without_places(words: str, runs: Sequence[Run]) -> str:
    """Return a text with runs named by their seeds, and of every other path its last name."""
    for run in runs:
        for place in {str(run.path.resolve()), str(run.path)} - {".", "/"}:
            words = re.sub(rf"(?<![\w./-]){re.escape(place)}(?![\w-])", f"the run of seed {run.config.seed}", words)
    return PLACE.sub(r"\1", words)


def audit_json(logs: Sequence[Log], audits: dict[int, dict[str, Any]], code: dict[str, Any]) -> dict[str, Any]:
    """Return the object of audit.json: sizes and hashes of the artifacts and the code, and the findings by seed."""
    artifacts = {str(log.seed): {"bytes": log.artifact_bytes, "sha256": log.artifact_sha256} for log in logs}
    return {"artifacts": artifacts, "code": code, "audits": {str(seed): audit for seed, audit in audits.items()}}


def legality(audits: dict[int, dict[str, Any]], silent: dict[int, str]) -> str:
    """Return legality.md: the findings of every audited seed."""
    lines = ["# What the audits found", ""]
    if not audits:
        lines += ["No seed of this submission was audited, so no claim of compliance is made.", ""]
    for seed, audit in audits.items():
        counts = {name: sum(finding["verdict"] == name for finding in audit["findings"]) for name in MEANING}
        lines += [
            f"## Seed {seed}",
            "",
            ", ".join(f"{count} {name} ({MEANING[name]})" for name, count in counts.items()) + ".",
            "",
            "| rule | asks for | verdict | evidence |",
            "|---|---|---|---|",
        ]
        for finding in audit["findings"]:
            cells = (finding["rule"], finding["asks"], f"**{finding['verdict']}**", finding["evidence"])
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |")
        lines.append("")
    lines += [f"* Seed {seed}: {why}." for seed, why in silent.items()]
    return "\n".join(lines).rstrip() + "\n"
