"""What makes an ablation's figures less sure, or less comparable, than they look."""

import math
from collections.abc import Sequence
from statistics import fmean

from core.ablation.stats.results import Result, Results

COMPANY = 0.25
"""Runs side by side, on average, by which variant and reference may differ and still count as measured alike."""
UNLIKE = {"byte_rule": "byte rules", "label": "kinds of figure", "targets": "numbers of targets"}
"""Field -> what it is: where both runs have one and it differs, their figures are not comparable."""
MACHINE = {"device": "devices", "host": "machines", "threads": "numbers of CPU threads"}
"""Field -> what it is, of those that decide how fast a run is."""
SeedPair = tuple[Result, Result]
"""(ours, reference) of one seed."""


def alike(pair: SeedPair) -> bool:
    """Return whether two figures are of one kind: bits per byte of other bytes, or of other text, are not."""
    return not any(_differs(pair, field) for field in UNLIKE)


def _differs(pair: SeedPair, field: str) -> bool:
    """Return whether a pair differs in a field of UNLIKE; what is not known does not differ."""
    ours, base = (getattr(run, field) for run in pair)
    if field == "targets" and pair[0].data != pair[1].data and pair[0].documents == pair[1].documents:
        return False  # another tokenizer's cut of perhaps the same text
    return None not in (ours, base) and ours != base


def missing(outcome: Results, backend: str) -> list[str]:
    """Return sentences on the runs that gave no figure, and why."""
    caveats = []
    for status, words in (
        ("failed", "failed"), ("running", "still running"), ("waiting", "not started"),
    ):  # fmt: skip
        names = [f"{r.variant} seed {r.seed}" for r in outcome.results if (r.status, r.backend) == (status, backend)]
        if len(names) == sum(r.backend == backend for r in outcome.results):
            caveats.append(f"{words}: all of {len(names)} runs")
        elif names:
            caveats.append(f"{words}: {some(names)}; a seed counts only where variant and reference both have it")
    lost = [
        f"{r.variant} seed {r.seed}"
        for r in outcome.results
        if r.status == "done" and r.backend == backend and (r.bpb is None or not math.isfinite(r.bpb))
    ]
    return caveats + ([f"finished without a finite score, left out: {some(lost)}"] if lost else [])


def unlike(both: dict[str, list[SeedPair]]) -> list[str]:
    """Return a sentence for each variant whose pairs are left out, since their figures are not of one kind."""
    caveats = []
    for field, words in UNLIKE.items():
        for name, of in both.items():
            apart = [pair for pair in of if _differs(pair, field)]
            if apart:
                values = sorted({getattr(r, field) for pair in apart for r in pair})
                kinds = [f"{v:,}" if isinstance(v, int) else v for v in values]
                seeds = ", ".join(str(a.seed) for a, _ in apart)
                caveats.append(f"{name}: different {words} ({', '.join(kinds)}), seed {seeds} left out: not comparable")
    return caveats


def uneven(outcome: Results, pairs: dict[str, list[SeedPair]], runs: list[Result]) -> list[str]:
    """Return sentences on what makes a comparison less fair than it looks."""
    caveats, kind = [], outcome.plan.budget[0]
    if outcome.added:
        caveats.append(
            f"seed {some(outcome.added)} came after a report on the other seeds: if what it said was the reason, "
            "p is too small and intervals are too narrow"
        )
    estimates = [r.error for r in runs if r.label == "estimate" and r.error]
    if any(r.label == "estimate" for r in runs):
        about = f", standard error about {fmean(estimates):.4f} each" if estimates else ""
        caveats.append(
            f"the figures are estimates over some documents{about}: "
            "the intervals are about seeds, not about which documents were drawn"
        )
    for name, of in pairs.items():
        if kind != "seconds" and any(a.steps != b.steps for a, b in of):
            steps = " against ".join(f"{fmean(r.steps or 0 for r in side):,.0f}" for side in zip(*of, strict=True))
            caveats.append(f"{name}: {steps} steps of the reference")
        tokens = [[r.curve[-1].tokens for r in side if r.curve] for side in zip(*of, strict=True)]
        if kind == "steps" and all(tokens) and len(tokens) == 2 and fmean(tokens[0]) != fmean(tokens[1]):
            caveats.append(f"{name}: as many steps, but {fmean(tokens[0]):,.0f} tokens against {fmean(tokens[1]):,.0f}")
    return caveats


def company(name: str, of: list[SeedPair], kind: str) -> list[str]:
    """Return sentences on how the conditions of a variant's runs differ from the reference's.

    `kind` is that of the budget. What is not known of a run counts as alike.
    """
    timed = "tokens/s and seconds are not comparable"
    if kind == "seconds":
        timed = "with a budget in seconds, bits per byte are not comparable either"
    caveats = []
    known = [(a.beside, b.beside) for a, b in of if a.beside is not None and b.beside is not None]
    if known and abs(fmean(a - b for a, b in known)) > COMPANY:
        ours, base = (fmean(side) for side in zip(*known, strict=True))
        caveats.append(f"{name}: on average {ours:.1f} runs side by side against {base:.1f} of the reference: {timed}")
    for field, words in MACHINE.items():
        sure = "host" if field == "threads" else field  # None threads are known, where anything is
        apart = [
            (a, b)
            for a, b in of
            if None not in (getattr(a, sure), getattr(b, sure)) and getattr(a, field) != getattr(b, field)
        ]
        if apart:
            kinds = dict.fromkeys(str(getattr(r, field) or "as the libraries chose") for pair in apart for r in pair)
            seeds = some([a.seed for a, _ in apart])
            caveats.append(f"{name}: other {words} than the reference ({some([*kinds])}), seed {seeds}: {timed}")
    types = [(a, b) for a, b in of if None not in (a.dtype, b.dtype) and a.dtype != b.dtype]
    if types:
        kinds = dict.fromkeys(str(r.dtype) for pair in types for r in pair)
        seeds = some([a.seed for a, _ in types])
        caveats.append(f"{name}: computed in another type than the reference ({some([*kinds])}), seed {seeds}")
    return caveats


def some(names: Sequence[object], most: int = 6) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
