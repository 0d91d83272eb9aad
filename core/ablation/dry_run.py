"""`skc ablate FILE.toml --dry-run`: runs, time by a probe of every variant, and what the seeds can resolve."""

from collections.abc import Mapping, Sequence
from typing import Any

from core.ablation.plan import Ablation, Job
from core.ablation.search.search import Searched
from core.ablation.search.space import FOUND
from core.ablation.stats.effects import resolvable
from core.ablation.stats.findings import assess
from core.ablation.store import Place, RunStore
from core.console import Console, duration
from core.export.budget import predicted_bytes
from core.model.params import count

ASSUMED = 0.004
"""Standard deviation of paired differences in bits per byte that is assumed where no runs are there to measure it."""
HEAD = ("variant", "backend", "parameters", "bytes", "runs", "to do", "each takes")


def described(plan: Ablation) -> str:
    """Return a plan in one line."""
    kind, amount = plan.budget
    return (
        f"{len(plan.variants)} variants of {plan.base}, {len(plan.seeds)} seeds, {amount:,} {kind} each, "
        f"on {' and '.join(plan.backends)}"
    )


def to_time(plan: Ablation, store: RunStore, places: Sequence[Place], searched: Searched | None) -> list[Job]:
    """Return one run of every variant and backend with runs left to do, to be timed for all of them."""
    left = [place.job for place in places if store.status(place)[0] != "done"]
    if searched is not None:  # the probe of the variant that a search starts from stands for all of its trials
        wanted = [(searched.search.variant, backend) for _, backend, _, todo in _search_runs(searched, store) if todo]
        left += [p.job for p in places if (p.job.variant, p.job.backend) in wanted]
    jobs: dict[tuple[str, str], Job] = {}
    for job in left:
        jobs.setdefault((job.variant, job.backend), job)
    return list(jobs.values())


def dry_run(
    plan: Ablation,
    store: RunStore,
    places: Sequence[Place],
    searched: Searched | None,
    seconds_of: Mapping[tuple[str, str], float],
    parallel: int,
    say: Console,
) -> dict[str, Any]:
    """Print what would be run, how long it takes, and what the seeds can resolve; return that.

    `seconds_of`: (variant, backend) -> seconds of a run, for those of `to_time`. `searched` is what is there of a
    search.
    """
    states = [store.status(place)[0] for place in places]
    rows, seconds = [], 0.0
    for name in plan.variants:
        for backend in plan.backends:
            both = zip(places, states, strict=True)
            mine = [(p, s) for p, s in both if (p.job.variant, p.job.backend) == (name, backend)]
            config = mine[0][0].job.config
            left = sum(state != "done" for _, state in mine)
            each = seconds_of[name, backend] if left else None
            seconds += left * (each or 0.0)
            takes = "-" if each is None else duration(each)
            rows.append((name, backend, count(config.model), predicted_bytes(config.model), len(mine), left, takes))
    value: dict[str, Any] = {"name": plan.name, "runs": len(places), "to_do": len(places) - states.count("done")}
    if searched is not None:
        for name, backend, runs, left in _search_runs(searched, store):
            each = seconds_of[searched.search.variant, backend] if left else None
            seconds += left * (each or 0.0)
            takes = "-" if each is None else f"about {duration(each)}"
            rows.append((name, backend, "-", "-", runs, left, takes))
            value |= {"runs": value["runs"] + runs, "to_do": value["to_do"] + left}
    say(f"{plan.name}: {described(plan)}; held against {plan.reference}")
    say.table(HEAD, rows)
    seconds /= parallel
    say(f"about {duration(seconds)} in all, {parallel} at a time")
    spread, whence = _spread(store, plan, places)
    n = len(plan.seeds)
    smallest = resolvable(n, spread) if n > 1 else None
    text = "one seed resolves nothing: there is no interval" if smallest is None else (
        f"{n} seeds can resolve a difference of {smallest:.4f} bits per byte (5 % two-sided, 4 times in 5)"
    )  # fmt: skip
    say(f"{text}; standard deviation of paired differences {spread:.4f}, {whence}")
    return {**value, "seconds": seconds, "spread": spread, "resolvable": smallest}


def _search_runs(searched: Searched, store: RunStore) -> list[tuple[str, str, int, int]]:
    """Return (name, backend, runs, runs to do) of a search's trials, and of `found` until the search is complete."""
    plan, search = searched.plan, searched.search
    done = sum(store.status(place)[0] in ("done", "failed") for place in searched.places)
    done += searched.elsewhere * len(search.seeds)
    trials = len(searched.trials) if searched.complete else search.trials + 1
    runs = trials * len(search.seeds)
    rows = [(f"{trials - 1} trials, start", plan.backends[0], runs, runs - done)]
    if not searched.complete:
        rows += [(f"{FOUND}, not known yet", backend, len(plan.seeds), len(plan.seeds)) for backend in plan.backends]
    return rows


def _spread(store: RunStore, plan: Ablation, places: Sequence[Place]) -> tuple[float, str]:
    """Return the standard deviation of paired differences, and whether it was measured."""
    spreads = [f.spread for f in assess(store.outcome(plan, list(places))) if f.spread]
    if spreads:
        return max(spreads), "as measured on the runs that are done"
    return ASSUMED, "assumed: no differences that vary are there yet"
