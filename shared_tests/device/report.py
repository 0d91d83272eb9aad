"""report.md: what a check found, rewritten after every item. Standard library only."""

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from shared_tests.device import records
from shared_tests.device.records import Line


def write_report(folder: Path, title: str, names: Sequence[str]) -> None:
    """Write report.md of what results.jsonl holds: a kill leaves the old one or the new one."""
    temporary = folder / "report.md.tmp"
    temporary.write_text("\n".join(lines(records.latest(records.read(folder)), title, names)) + "\n")
    os.replace(temporary, folder / "report.md")


def lines(runs: dict[str, list[Line]], title: str, names: Sequence[str]) -> list[str]:
    """Return the report as Markdown: what is wrong first, then the items in their order."""
    wrong = [
        (name, line) for name in names for line in records.bad(runs.get(name, [])) if "what" in line or "text" in line
    ]
    checks = [line for name in names for line in runs.get(name, []) if "ok" in line]
    out = [f"## `{title}` ({datetime.date.today()})", ""]
    out += [*table(["item", "", "s", "checks", "beyond"], [_row(name, runs.get(name, [])) for name in names]), ""]
    out += [f"Checks: {len(checks)}, {sum(not line['ok'] for line in checks)} beyond their limit.", ""]
    for name, line in wrong:
        what = line.get("what") or line.get("state")
        out += [f"**{name}: {what}**: " + (line.get("error") or line.get("text") or _limits(line)), ""]
        if "traceback" in line:
            out += ["```", line["traceback"].rstrip(), "```", ""]
    for name in names:
        run = [line for line in runs.get(name, []) if "what" in line and "error" not in line]
        short = [line for line in run if len(line.get("text", "")) <= 200 and "\n" not in line.get("text", "")]
        if short:
            out += [f"### {name}", "", *table(["what", "", "limit", ""], map(_cells, short)), ""]
        for line in run:
            if line not in short:
                out += [f"{line['what']}:", "", "```", line["text"].rstrip(), "```", ""]
    return out


def table(head: Sequence[str], rows: object) -> list[str]:
    """Return a Markdown table."""
    return [f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *rows)]  # type: ignore


def _row(name: str, run: list[Line]) -> list[object]:
    end = next((line for line in reversed(run) if "state" in line), {})
    checks = [line["ok"] for line in run if "ok" in line]
    said = {"": "not reached", "started": "not ended"}.get(end.get("state", ""), end.get("state", ""))
    seconds = f"{end['seconds']:.0f}" if "seconds" in end else ""
    return [name, end.get("text", said), seconds, len(checks) or "", checks.count(False) or ""]


def _cells(line: Line) -> list[object]:
    if "ok" in line:
        return [line["what"], _number(line["gap"]), _number(line["limit"]), "ok" if line["ok"] else "**BEYOND**"]
    return [line["what"], line.get("text") or f"{_number(line.get('value'))} {line.get('unit', '')}", "", ""]


def _limits(line: Line) -> str:
    return f"{_number(line.get('gap'))} is beyond {_number(line.get('limit'))}"


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return (
        f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 1e-3 or not value else f"{value:.1e}"
    )
