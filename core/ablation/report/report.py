"""report.html, report.md and pictures of an ablation: views of its run folders, finished or not."""

from collections.abc import Sequence
from pathlib import Path

from core.ablation.locks import make
from core.ablation.report import pictures, search_wording, wording
from core.ablation.report.page import NARROW, WIDE, Drawn, page
from core.ablation.report.search_pictures import draw as draw_search
from core.ablation.search.search import Searched
from core.ablation.stats.findings import Findings, assess
from core.ablation.stats.results import Results
from core.files import replace_file, replace_text

PICTURES = ("difference", "curves", "gaps", "bytes")
SEARCHED = ("search", "search-fields")


def write_report(outcome: Results, folder: Path, searched: Searched | None = None) -> list[Path]:
    """Write report.html, report.md and their pictures, and return all paths.

    `searched` is the search that the outcome's variant `found` came from.
    """
    import matplotlib  # here: half a second to import, and few commands need it

    make(folder)
    with matplotlib.rc_context(pictures.STYLE):
        return _write(outcome, folder, searched)


def _write(outcome: Results, folder: Path, searched: Searched | None) -> list[Path]:
    findings = assess(outcome)
    drawn = [(draw(outcome, tables, WIDE), draw(outcome, tables, NARROW)) for tables in findings]
    images: list[list[Path]] = []
    for i, (wide, _) in enumerate(drawn):
        images.append([])
        for name in PICTURES:
            path = folder / (f"{name}-{findings[i].backend}.png" if i else f"{name}.png")
            path.unlink(missing_ok=True)  # that of an earlier report would now be wrong
            if name in wide:
                pictures.png(wide[name], path)
                images[-1].append(path)
    tried = draw_search(searched) if searched else {}
    images.append([])
    for path in (folder / f"{name}.png" for name in SEARCHED):
        path.unlink(missing_ok=True)
        if path.stem in tried:
            replace_file(path, tried[path.stem])
            images[-1].append(path)
    html, text = folder / "report.html", folder / "report.md"
    replace_text(html, page(outcome, findings, drawn, searched, tried))
    replace_text(text, _markdown(outcome, findings, images, searched))
    return [html, text, *(path for of in images for path in of)]


def draw(outcome: Results, tables: Findings, width: int) -> Drawn:
    """Return the pictures of one backend; those without data are left out."""
    reference, drawn = outcome.plan.reference, {}
    effects = wording.ranked(tables.ends)
    if any(one.paired for one in effects):
        drawn["difference"] = pictures.difference(effects, reference, width)
    order = [reference, *(one.variant for one in effects)]
    field = "seconds" if outcome.plan.budget[0] == "seconds" else "step"
    basis, *curves = pictures.learning(outcome, tables.backend, field)
    for name, lines, least in zip(("curves", "gaps"), curves, (1, 2), strict=True):
        if len(lines) >= least:
            lines.sort(key=lambda line: order.index(line.name))
            drawn[name] = pictures.curves(lines, f"{field} ({basis})", width)
    points = _points(tables, reference)
    if points:
        drawn["bytes"] = pictures.sizes(points, width)
    return drawn


def _points(tables: Findings, reference: str) -> list[tuple[str, float, float, str]]:
    """Return (name, bytes, bits per byte, colour), the reference first.

    A variant stands at the reference's mean plus its paired difference: its own mean is over other seeds where some
    are missing, and seeds differ by more than variants do.
    """
    summaries = {one.variant: one for one in tables.summaries}
    base, points = summaries[reference], []
    if base.bpb is not None and base.bytes is not None:
        points.append((reference, base.bytes, base.bpb, "ink"))
        for one in tables.ends:
            size = summaries[one.variant].bytes
            if one.paired and size is not None:
                colour = one.verdict if one.verdict in ("better", "worse") else "noise"
                points.append((one.variant, size, base.bpb + one.paired.mean, colour))
    return points


def _markdown(
    outcome: Results, findings: Sequence[Findings], images: Sequence[Sequence[Path]], searched: Searched | None
) -> str:
    plan = outcome.plan
    lines = [f"# {plan.name}", "", *([_plain(plan.purpose), ""] if plan.purpose else [])]
    lines += ["; ".join(f"{name}: {_plain(value)}" for name, value in wording.facts(outcome)), ""]
    if not any(one.n for tables in findings for one in tables.summaries):
        lines += ["No run has finished yet. Nothing can be said so far.", ""]
    for tables, files in zip(findings, images[:-1], strict=True):
        name = f" on {tables.backend}" if len(findings) > 1 else ""
        if tables.ends and any(one.n for one in tables.summaries):
            lines += [f"## Answers{name}", ""]
            for one, sentence in wording.answers(tables, plan.reference):
                lines.append(f"* `{one.variant}`: **{wording.verdict(one)}**. {sentence[0].upper()}{sentence[1:]}")
            lines.append("")
        power = wording.resolution(tables, len(plan.seeds))
        lines += [power, ""] if power else []
        if tables.doubts:
            lines += ["Read with care:", "", *(f"* {_plain(doubt)}" for doubt in tables.doubts), ""]
        if any(one.n for one in tables.summaries):
            lines += [f"## Table{name}", "", *_table(wording.HEAD, wording.table(tables, plan.reference)), ""]
        lines += [text for path in files for text in (f"![{path.stem}]({path.name})", "")]
        if tables.ends and any(one.n for one in tables.summaries):
            for title, head, rows in (
                ("equal steps", wording.PLACE_HEAD, wording.places(tables.steps)),
                ("equal seconds", wording.PLACE_HEAD, wording.places(tables.seconds)),
                ("equal bytes", wording.SIZE_HEAD, wording.size_rows(tables.sizes)),
            ):
                lines += [f"## At {title}{name}", "", *_table(head, rows), ""]
    if searched:
        lines += _search(outcome, searched, images[-1])
    lines += ["## What each variant changes", ""]
    for name, changed in wording.changes(plan).items():
        lines += [f"`{name}`:", "", *_code("\n".join(changed)), ""]
    failed = [run for run in outcome.results if run.status == "failed"]
    lines += ["## Failed runs", ""] if failed else []
    for run in failed:
        lines += [f"`{run.variant}`, seed {run.seed}, {run.backend}:", ""]
        lines += [*_code(run.message or "it left no message; see log.txt in its folder"), ""]
    lines += ["## How it was computed", "", *(f"* {line}" for line in wording.METHOD), ""]
    lines += ["## To repeat it", "", f"Save this as {plan.name}.toml:", "", *_code(plan.text), ""]
    return "\n".join([*lines, *_code(plan.command(search=searched is not None)), ""])


def _search(outcome: Results, searched: Searched, images: Sequence[Path]) -> list[str]:
    lines = ["## Search", "", _plain(search_wording.summary(searched)), ""]
    gains = search_wording.gains(searched, outcome)
    if gains:
        lines += [search_wording.WARNING, "", *_table(search_wording.GAIN_HEAD, search_wording.gain_rows(gains)), ""]
    lines += [text for path in images for text in (f"![{path.stem}]({path.name})", "")]
    lines += ["### Trials", "", *_table(search_wording.head(searched), search_wording.rows(searched)), ""]
    return [*lines, *(f"* {_plain(line)}" for line in search_wording.method(searched)), ""]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [f"| `{first}` | {' | '.join(_plain(cell) for cell in rest)} |" for first, *rest in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *body]


def _code(text: str) -> list[str]:
    """Return an indented block: whatever the text holds, it ends only where the indent does."""
    return [f"    {line}" for line in text.splitlines()]


def _plain(text: str) -> str:
    """Return text on one line without anything that Markdown or HTML would read."""
    return "".join(f"\\{letter}" if letter in r"\`*_[]<>|#~" else letter for letter in " ".join(text.split()))
