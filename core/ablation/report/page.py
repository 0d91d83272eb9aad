"""report.html: one file without scripts or anything from elsewhere, for a screen, a phone, day and night."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType

from core.ablation.report import pictures, search_wording, wording
from core.ablation.report.pictures import Picture
from core.ablation.search.search import Searched
from core.ablation.stats.findings import Findings
from core.ablation.stats.results import Results
from core.decoding.generate import sample_lines

WIDE, NARROW = 900, 350
"""Widths that every picture is drawn for; the page shows the one that fits."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:78rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.5rem 0 .5rem}
h3{font-size:1rem;margin:1.25rem 0 .25rem}
p{margin:.5rem 0}
h1,h2,h3,p,li,summary,dd{overflow-wrap:anywhere}
p,li,.note,figcaption{max-width:52rem}
.quiet,figcaption,dt{color:var(--muted)}
figcaption{font-size:.875rem;margin-top:.25rem}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.5rem 1rem;margin:1rem 0}
dt{font-size:.8125rem}
dd{margin:0}
.answers{list-style:none;padding:0;margin:.75rem 0}
.answers li{background:var(--box);border-left:4px solid var(--noise);padding:.5rem .75rem;margin:.4rem 0}
.answers li.better{border-color:var(--better)}
.answers li.worse{border-color:var(--worse)}
b.better{color:var(--better)}
b.worse{color:var(--worse)}
b.noise{color:var(--noise)}
.note{background:var(--box);border:1px solid var(--grid);border-radius:6px;padding:.25rem .75rem;margin:.75rem 0}
.note ul{padding-left:1.1rem;margin:.5rem 0}
.note h3{margin-top:.5rem}
.scroll{overflow-x:auto;border:1px solid var(--grid);border-radius:6px;margin:.75rem 0}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--better)}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.875rem}
th,td{padding:.4rem .5rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid);
font-variant-numeric:tabular-nums}
tr:last-child>*{border-bottom:0}
thead tr:last-child>*{border-bottom:1px solid var(--grid)}
thead th{color:var(--muted);font-weight:600;background:var(--box)}
th:first-child,.words{text-align:left}
th:first-child{position:sticky;left:0;border-right:1px solid var(--grid)}
td.words{white-space:normal;min-width:8rem}
tbody th{font-weight:600;background:var(--page);max-width:14rem;overflow:hidden;text-overflow:ellipsis}
figure{margin:1rem 0}
svg{display:block;max-width:100%;height:auto}
svg text{font-family:inherit!important}
.scroll img{display:block;height:24rem;width:auto}
.narrow{display:none}
pre{background:var(--box);border:1px solid var(--grid);border-radius:6px;padding:.6rem .75rem;overflow-x:auto;
font-size:.8125rem;line-height:1.45;margin:.5rem 0}
pre.wrap{white-space:pre-wrap;overflow-wrap:anywhere}
details{margin:.5rem 0}
summary{cursor:pointer;font-weight:600}
code{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre code{font-size:inherit}
@media (max-width:700px){.wide{display:none}.narrow{display:block}.narrow svg{margin:0 auto}main{padding-top:.75rem}
h1{font-size:1.4rem}tbody th{max-width:9rem}}
@media print{.scroll{overflow:visible}td,th{white-space:normal}}
"""
TEXT_COLUMNS = {"variant", "verdict", "where", "figures", "held against", "figure", "note"}
Drawn = dict[str, Picture]
"""`difference`, `curves`, `gaps`, `bytes`: what there is something to draw for."""


def page(
    outcome: Results, findings: Sequence[Findings], drawn: Sequence[tuple[Drawn, Drawn]],
    searched: Searched | None = None, tried: Mapping[str, bytes] = MappingProxyType({}),
) -> str:  # fmt: skip
    """Return the whole page; `drawn` has each backend's (wide, narrow) pictures, `tried` a search's as PNG."""
    plan = outcome.plan
    parts = [f"<h1>{escape(plan.name)}</h1>", f"<p>{escape(plan.purpose)}</p>" if plan.purpose else "", _facts(outcome)]
    if not any(one.n for tables in findings for one in tables.summaries):
        total = len(outcome.results)
        parts.append(f'<p class="note">No run has finished yet: {total:,} are planned. Nothing can be said so far.</p>')
    for tables, both in zip(findings, drawn, strict=True):
        name = f" on {tables.backend}" if len(findings) > 1 else ""
        parts += _backend(outcome, tables, both, name)
    if searched:
        parts += _search(outcome, searched, tried)
    parts += [_changes(outcome), _failed(outcome), _samples(outcome), _method(), _repeat(outcome, searched)]
    head = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(plan.name)}: ablation</title><style>{pictures.css()}{STYLE}</style></head>"
    )
    return f"{head}\n<body><main>\n{chr(10).join(part for part in parts if part)}\n</main></body></html>\n"


def _facts(outcome: Results) -> str:
    return f"<dl>{''.join(f'<div><dt>{a}</dt><dd>{escape(b)}</dd></div>' for a, b in wording.facts(outcome))}</dl>"


def _backend(outcome: Results, tables: Findings, drawn: tuple[Drawn, Drawn], name: str) -> list[str]:
    plan, parts = outcome.plan, []
    if tables.ends and any(one.n for one in tables.summaries):
        parts += [f"<h2>Answers{name}</h2>", _answers(tables, plan.reference)]
    power = wording.resolution(tables, len(plan.seeds))
    parts.append(f"<p>{escape(power)}</p>" if power else "")
    if tables.doubts:
        lines = "".join(f"<li>{escape(doubt)}</li>" for doubt in tables.doubts)
        parts.append(f'<div class="note"><h3>Read with care</h3><ul>{lines}</ul></div>')
    if not any(one.n for one in tables.summaries):
        return parts
    parts.append(f"<h2>Table{name}</h2>{_table('All variants', wording.HEAD, wording.table(tables, plan.reference))}")
    about = "Bits per byte: mean ± standard deviation over seeds. A difference below 0 is better."
    parts.append(f'<p class="quiet">{about}</p>')
    caption = f"Difference to {plan.reference} in bits per byte: mean, 95 % interval, a ring for each seed."
    parts += _figure(f"Differences{name}", "difference", drawn, caption)
    if tables.ends:
        parts.append(f"<h2>At equal steps, seconds and bytes{name}</h2>")
        for title, effects in (("Equal steps", tables.steps), ("Equal seconds", tables.seconds)):
            end = wording.same_end(effects)
            same = f"<p>All of these runs ended at {escape(end)}: the table above is this comparison.</p>"
            shown = same if end else _table(title, wording.PLACE_HEAD, wording.places(effects))
            parts.append(f"<h3>{title}</h3>{shown}")
        parts.append(f"<h3>Equal bytes</h3>{_table('Equal bytes', wording.SIZE_HEAD, wording.size_rows(tables.sizes))}")
    parts += _figure(f"Learning curves{name}", "curves", drawn, wording.CURVES)
    parts += _figure(f"Difference while training{name}", "gaps", drawn, wording.GAPS)
    parts += _figure(f"Bytes against bits per byte{name}", "bytes", drawn, wording.BYTES)
    return parts


def _search(outcome: Results, searched: Searched, images: Mapping[str, bytes]) -> list[str]:
    parts = [f"<h2>Search</h2><p>{escape(search_wording.summary(searched))}</p>"]
    gains = search_wording.gains(searched, outcome)
    if gains:
        parts.append(f'<p class="note">{escape(search_wording.WARNING)}</p>')
        parts.append(_table("Selected and confirmed", search_wording.GAIN_HEAD, search_wording.gain_rows(gains)))
    captions = {"search": search_wording.PROGRESS, "search-fields": search_wording.FIELDS}
    parts += [_image(images[key], caption) for key, caption in captions.items() if key in images]
    table = _table("Trials", search_wording.head(searched), search_wording.rows(searched))
    lines = "".join(f"<li>{escape(line)}</li>" for line in search_wording.method(searched))
    few = len(searched.trials) <= 12
    return [*parts, f"<details{' open' if few else ''}><summary>All trials</summary>{table}<ul>{lines}</ul></details>"]


def _answers(tables: Findings, reference: str) -> str:
    items = []
    for one, sentence in wording.answers(tables, reference):
        kind = one.verdict if one.verdict in ("better", "worse") else "noise"
        head = f"<strong>{escape(one.variant)}</strong> · <b class={kind}>{escape(wording.verdict(one))}</b>"
        items.append(f'<li class="{kind}">{head}<br>{escape(sentence[0].upper() + sentence[1:])}</li>')
    return f'<ul class="answers">{"".join(items)}</ul>'


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    kinds = [' class="words"' if name in TEXT_COLUMNS else "" for name in head]
    top = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        body.append(f'<tr><th scope="row" class="words" title="{escape(first)}">{escape(first)}</th>{cells}</tr>')
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}">'
    return f"{box}<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _figure(title: str, key: str, drawn: tuple[Drawn, Drawn], caption: str) -> list[str]:
    wide, narrow = drawn
    if key not in wide:
        return []
    both = f'<div class="wide">{pictures.svg(wide[key])}</div><div class="narrow">{pictures.svg(narrow[key])}</div>'
    return [f"<h2>{escape(title)}</h2><figure>{both}<figcaption>{escape(caption)}</figcaption></figure>"]


def _image(png: bytes, caption: str) -> str:
    """Return a figure with an embedded PNG, which scrolls sideways on a narrow screen."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    box = f'<div class="scroll" tabindex="0"><img src="{source}" alt="{escape(caption)}"/></div>'
    return f"<figure>{box}<figcaption>{escape(caption)}</figcaption></figure>"


def _changes(outcome: Results) -> str:
    parts = []
    for name, lines in wording.changes(outcome.plan).items():
        fields = "<br>".join(f"<code>{escape(line)}</code>" for line in lines)
        parts.append(f"<p><strong>{escape(name)}</strong><br>{fields}</p>")
    note = f'<p class="quiet">Against {escape(outcome.plan.reference)}: field: its value → the variant’s.</p>'
    return f"<h2>What each variant changes</h2>{note}{''.join(parts)}" if parts else ""


def _failed(outcome: Results) -> str:
    parts = []
    for run in outcome.results:
        if run.status == "failed":
            where = f"{escape(run.variant)}, seed {run.seed}, {escape(run.backend)}"
            message = escape(run.message or "it left no message; see log.txt in its folder")
            parts.append(f'<h3>{where}</h3><pre class="wrap"><code>{message}</code></pre>')
    return f"<h2>Failed runs</h2>{''.join(parts)}" if parts else ""


def _samples(outcome: Results) -> str:
    parts = []
    for name in outcome.plan.variants:
        run = next((r for r in outcome.of(name) if r.samples), None)
        if run:
            texts = "".join(
                f'<p class="quiet">{escape(prompt)}</p><pre class="wrap"><code>{escape(text[:1000])}</code></pre>'
                for (prompt, _), text in zip(sample_lines(run.samples), run.samples, strict=False)
            )
            parts.append(f"<details><summary>{escape(name)}, seed {run.seed}</summary>{texts}</details>")
    return f"<h2>Samples</h2>{''.join(parts)}" if parts else ""


def _method() -> str:
    return f"<h2>How it was computed</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in wording.METHOD)}</ul>"


def _repeat(outcome: Results, searched: Searched | None) -> str:
    plan = outcome.plan
    command = plan.command(search=searched is not None)
    text = f"<pre><code>{escape(plan.text)}</code></pre><pre><code>{escape(command)}</code></pre>"
    return f"<h2>To repeat it</h2><p>Save this as {escape(plan.name)}.toml:</p>{text}"
