"""legality.md: the findings of an audit, for a reader who wants to check them."""

from core.audit.auditor import AuditResult
from core.audit.rules import RULES

MEANING = {"PASS": "what software can check of it holds", "FAIL": "it is broken", "NOT CHECKED": "see the evidence"}


def markdown(result: AuditResult) -> str:
    """Return the report of an audit."""
    plan, process = result.plan, result.isolated
    counts = {verdict: sum(f.verdict == verdict for f in result.findings) for verdict in MEANING}
    lines = [
        f"# Audit of {plan.run.path if plan.run else plan.artifact}",
        "",
        headline(result),
        "",
        ", ".join(f"{count} {verdict} ({MEANING[verdict]})" for verdict, count in counts.items()) + ".",
        "",
        "| rule | asks for | verdict | evidence |",
        "|---|---|---|---|",
        *(f"| {f.rule} | {RULES[f.rule]} | **{f.verdict}** | {_cell(f.evidence)} |" for f in result.findings),
        "",
        "## How it was watched",
        "",
        *(f"* In force: {words}." for words in process.measures),
        *(f"* Not in force: {words}." for words in process.missing),
        f"* The evaluating process ran for {process.seconds:.1f} s, flip test included; "
        f"the audit {result.seconds:.1f} s.",
        "",
        "## Files of ours that the evaluation opened",
        "",
        "| file | kind | bytes | seen by |",
        "|---|---|---|---|",
        *(
            f"| {_cell(file.path)} | {file.kind} | {'gone' if file.size is None else f'{file.size:,}'} | "
            f"{', '.join(file.seen_by)} |"
            for file in process.files
            if file.kind in ("code", "input", "other")
        ),
        "",
        "## Packages",
        "",
        ", ".join(f"{name} {version}" for name, version in sorted(process.packages.items())) or "none",
        "",
        "docs/legality.md says how each rule is enforced and what cannot be checked.",
    ]
    return "\n".join(lines) + "\n"


def headline(result: AuditResult) -> str:
    """Return the audited score in words."""
    score = (result.isolated.value or {}).get("score")
    if not score:
        return "The evaluation gave no score."
    plugins = f", with {', '.join(score['plugins'])}" if score["plugins"] else ""
    plugins += f"; while it was scored there learned: {score['adaptation']}" if score.get("adaptation") else ""
    part = "" if result.plan.documents is None else f" of the first {result.plan.documents:,} documents"
    return (
        f"{score['bpb']:.4f} bits per byte{part} ({score['targets']:,} targets, {score['bytes']:,} bytes, rule "
        f"{score['byte_rule']}, windows {score['windows']}{plugins})."
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
