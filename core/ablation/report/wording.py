"""An ablation's findings in words and table cells: what report.html and report.md both say."""

from collections.abc import Sequence

from core.ablation.plan import Ablation
from core.ablation.stats.effects import VariantEffect, resolvable, seeds_needed
from core.ablation.stats.findings import Findings, Size, VariantSummary
from core.ablation.stats.results import Results
from core.config import differences

NONE = "–"
HEAD = (
    "variant", "verdict", "bits per byte", "difference", "95 % interval", "p", "Holm p", "bytes", "tokens/s",
    "parameters", "seeds",
)  # fmt: skip
"""The verdict comes second in every table: a phone shows two or three columns."""
PLACE_HEAD = ("variant", "verdict", "where", "figures", "difference", "95 % interval", "p", "Holm p", "seeds")
SIZE_HEAD = ("variant", "verdict", "bytes", "per 100,000 bytes", "at equal bytes", "95 % interval", "held against")
CURVES = (
    "Mean over seeds; the band reaches from the lowest to the highest seed. The first quarter of the training is left "
    "out. Grey: the reference."
)
BYTES = "Lower left is better. The reference at its mean over seeds, the others at that plus their paired difference."
GAPS = (
    "Variant − reference at the same place of the training, below 0 is better: mean over seeds, the band from the "
    "lowest to the highest seed. What all runs of a seed share has cancelled out."
)
METHOD = (
    "A variant and the reference are compared seed by seed: the same seed means the same start weights where shapes "
    "agree and the same batches, so that what both share cancels out. The difference is variant − reference in bits "
    "per byte; below 0 the variant is better.",
    "The interval is mean ± t(0.975, n − 1) × standard deviation of the differences / √n (Student), n the number of "
    "seeds with both runs; it holds for one variant by itself. p is two-sided.",
    "Holm p allows for having looked at all variants of a table at once; variants that are not finished count too. "
    "“Better” and “worse” need Holm p < 0.05. “Perhaps” means p < 0.05 by itself, but not among all variants.",
    "“Inside noise” means that the interval holds 0: differences like this one appear between seeds even if the "
    "change does nothing. It does not mean that the change does nothing; see what these seeds could have resolved.",
    "All of this takes the number of seeds as fixed beforehand; nothing corrects for looking early and stopping, or "
    "for more seeds after a look: where seeds are still to come, the verdict is marked as an early look, and where "
    "some came after a report, that is said. A seed that failed, or that cannot be compared, is "
    "left out and counted: what fails most is not left out by chance, so what is left may flatter it.",
    "What seeds can resolve is the true difference that a two-sided test at 5 % finds with a chance of 80 % "
    "(noncentral t), given the pooled spread of the paired differences. Pooling assumes that variants vary alike.",
    "Equal seconds and equal steps: each pair of variant and reference at the last place that all of its runs reached, "
    "on a straight line between validation estimates. Training curves are single batches, more noisy than scores: of "
    "them, the height of a line fitted to the quarter of the way before that place is taken. Rates fall towards each "
    "run’s own end: where one run had ended and the other had not, the one that had ended looks better than it is. "
    "Speed and seconds are what these runs measured: runs side by side slow each other down, and where variant and "
    "reference had different company or machines, that is said.",
    "Equal bytes: against a straight line between the reference and one other variant, the one that makes the line "
    "lowest. A curve of bits per byte against bytes bends, and a line between far points lies above it, which flatters "
    "the variant in between.",
)


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """Return a number with a true minus sign, or a dash for None."""
    return NONE if value is None else f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def chance(value: float | None) -> str:
    """Return a p value as a person would write it."""
    if value is None:
        return NONE
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"


def interval(one: VariantEffect | None) -> str:
    """Return `low to high` of an effect, or a dash."""
    if one is None or one.paired is None or one.paired.low is None:
        return NONE
    return f"{number(one.paired.low, sign=True)} to {number(one.paired.high, sign=True)}"


def verdict(one: VariantEffect) -> str:
    """Return the verdict, marked where fewer seeds are there than were planned."""
    return one.verdict + (f" ({one.short})" if one.short else "")


def ranked(effects: Sequence[VariantEffect]) -> list[VariantEffect]:
    """Return effects best first, those without a figure last."""
    return sorted(effects, key=lambda e: (e.paired is None, e.paired.mean if e.paired else 0.0))


def table(tables: Findings, reference: str) -> list[tuple[str, ...]]:
    """Return the rows under HEAD: the reference, then the variants, best first."""
    by_name = {one.variant: one for one in tables.summaries}
    rows = [_row(by_name[reference], None)]
    return rows + [_row(by_name[one.variant], one) for one in ranked(tables.ends)]


def _row(of: VariantSummary, one: VariantEffect | None) -> tuple[str, ...]:
    spread = "" if of.spread is None else f" ± {number(of.spread)}"
    test = one.paired if one else None
    return (
        of.variant, verdict(one) if one else "reference", number(of.bpb) + spread,
        number(test.mean, sign=True) if test else NONE, interval(one),
        chance(test.p if test else None), chance(one.holm if one else None), number(of.bytes, 0),
        number(of.tokens_per_second, 0), number(of.parameters, 0), str(of.n),
    )  # fmt: skip


def places(effects: Sequence[VariantEffect]) -> list[tuple[str, ...]]:
    """Return the rows under PLACE_HEAD."""
    rows = []
    for one in ranked(effects):
        test = one.paired
        if test is None:
            rows.append((one.variant, one.note or one.verdict, *[NONE] * 6, "0"))
            continue
        figures = number(test.mean, sign=True), interval(one), chance(test.p), chance(one.holm)
        rows.append((one.variant, verdict(one), one.at, one.basis, *figures, str(test.n)))
    return rows


def same_end(effects: Sequence[VariantEffect]) -> str:
    """Return where all pairs ended together, so that the main table is this comparison; empty if some did not."""
    ends = {one.at for one in effects if one.paired}
    both = len(ends) == 1 and all(one.basis == "artifact" for one in effects)
    return ends.pop().removesuffix(", the end") if both else ""


def size_rows(sizes: Sequence[Size]) -> list[tuple[str, ...]]:
    """Return the rows under SIZE_HEAD."""
    rows = []
    for one in sorted(sizes, key=lambda s: s.bytes or 0.0):
        mean = one.equal.paired.mean if one.equal and one.equal.paired else None
        rows.append((
            one.variant, verdict(one.equal) if one.equal else NONE, number(one.bytes, 0, True),
            number(one.per_100kb, sign=True), number(mean, sign=True), interval(one.equal), one.note,
        ))  # fmt: skip
    return rows


def answers(tables: Findings, reference: str) -> list[tuple[VariantEffect, str]]:
    """Return one sentence a variant, best first: did it help, by how much, how sure, at what cost."""
    by_name = {one.variant: one for one in tables.summaries}
    return [
        (one, f"{_answer(one, tables)}{_cost(by_name[one.variant], by_name[reference])}.")
        for one in ranked(tables.ends)
    ]


def _answer(one: VariantEffect, tables: Findings) -> str:
    test = one.paired
    if test is None:
        return "nothing to compare yet: no seed has a finished run of both"
    way = "lower" if test.mean < 0 else "higher"
    amount = f"{number(abs(test.mean))} bits per byte {way}"
    if test.p is None:
        return f"{amount} in the one seed that both have: no interval, so chance cannot be told from effect"
    if test.low is None:
        return f"{amount} in each of {test.n} seeds alike: without any spread nothing can be tested"
    sure = f"95 % interval {interval(one)}, {test.n} seeds"
    if one.verdict == "inside noise":
        could = (
            f"; {test.n} seeds could have resolved {number(resolvable(test.n, tables.spread))}" if tables.spread else ""
        )
        return f"{amount}, which is inside noise ({sure}){could}"
    if one.verdict.startswith("perhaps"):
        among = f"among {len(tables.ends)} variants that is not rare (Holm p {chance(one.holm)})"
        return f"{amount} ({sure}): alone it would count, but {among}"
    return f"{amount} ({sure}, Holm p {chance(one.holm)})"


def _cost(of: VariantSummary, base: VariantSummary) -> str:
    parts = []
    if of.bytes is not None and base.bytes:
        change = of.bytes - base.bytes
        parts.append(f"{number(change, 0, True)} bytes ({number(100 * change / base.bytes, 1, True)} %)")
    if of.tokens_per_second is not None and base.tokens_per_second:
        parts.append(f"speed {number(100 * (of.tokens_per_second / base.tokens_per_second - 1), 0, True)} %")
    return f"; {', '.join(parts)}" if parts else ""


def resolution(tables: Findings, planned: int) -> str:
    """Return a sentence on what the planned seeds can resolve; empty as long as the spread is not known."""
    if not tables.spread:
        return ""
    known = f"Paired differences vary by {number(tables.spread)} from seed to seed (pooled over the variants)."
    if planned < 2:
        return f"{known} One seed resolves nothing."
    least = resolvable(planned, tables.spread)
    return (
        f"{known} {planned} seeds resolve a true difference of {number(least)} bits per byte with a chance of 80 %; "
        f"half of that would need {seeds_needed(least / 2, tables.spread)} seeds."
    )


def facts(outcome: Results) -> list[tuple[str, str]]:
    """Return what was run, and how much of it is done."""
    plan = outcome.plan
    states = {name: sum(r.status == name for r in outcome.results) for name in ("done", "failed", "running", "waiting")}
    counts = ", ".join(f"{n:,} {name}" for name, n in states.items() if n) or "none"
    return [
        ("base", plan.base),
        ("reference", plan.reference),
        ("budget of a run", f"{plan.budget[1]:,} {plan.budget[0]}"),
        ("seeds", ", ".join(map(str, plan.seeds))),
        ("backend", ", ".join(plan.backends) + (f", {plan.dtype}" if plan.dtype else "")),
        ("runs", counts),
    ]


def changes(plan: Ablation) -> dict[str, list[str]]:
    """Return variant -> the settings in which it differs from the reference."""
    base = plan.config(plan.reference, plan.seeds[0])
    return {
        name: differences(base, plan.config(name, plan.seeds[0])) for name in plan.variants if name != plan.reference
    }
