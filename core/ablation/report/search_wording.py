"""A search in words and table cells: what report.html, report.md and the console say of it."""

from importlib.metadata import version
from statistics import fmean
from typing import Any, NamedTuple

from core.ablation.report.wording import NONE, number
from core.ablation.search.search import Searched, Trial
from core.ablation.search.space import FOUND, Search
from core.ablation.stats.effects import Paired, paired
from core.ablation.stats.findings import scored
from core.ablation.stats.results import Results

GAIN_HEAD = ("figure", "seeds", "start", "found", "difference", "95 % interval", "note")
SELECTED = "selected"
CONFIRMED = "confirmed"
WARNING = (
    "The best of many trials is also a lucky one, so its own figure flatters it (the winner’s curse). Therefore it was "
    f"trained again, as variant {FOUND}, on the ablation’s seeds, which had no part in the choice: only that "
    "figure says what its settings bring."
)
PROGRESS = (
    "Each trial’s mean over the search’s seeds; the line is the best so far. It can only fall, whether by better "
    "settings or by luck. Failed trials, and those far above the best, are left out."
)
FIELDS = (
    "Bits per byte of every trial against one field at a time, all other fields differing too. Darker: later trials. "
    "Dashed: the start."
)


class Gain(NamedTuple):
    """The found settings against the start, on some seeds."""

    figure: str
    """SELECTED or CONFIRMED, and the backend where there are several."""
    seeds: tuple[int, ...]
    start: float | None
    found: float | None
    difference: float | None
    test: Paired | None
    """None where an interval would mean nothing."""
    note: str
    """What to think of the figure."""


def gains(searched: Searched, outcome: Results) -> list[Gain]:
    """Return how far the best trial leads the start: on the search's seeds, then on the plan's for each backend."""
    best, start = searched.best, searched.start
    if best is None or best.bpb is None:
        return []
    gap = None if start.bpb is None else best.bpb - start.bpb
    note = f"best of {len(searched.ranks)} on its own seeds: too good"
    rows = [Gain(SELECTED, searched.search.seeds, start.bpb, best.bpb, gap, None, note)]
    for backend in outcome.plan.backends:
        ours = {r.seed: r.bpb or 0.0 for r in scored(outcome, FOUND, backend)}
        base = {r.seed: r.bpb or 0.0 for r in scored(outcome, searched.search.variant, backend)}
        seeds = tuple(seed for seed in ours if seed in base)
        where = f" ({backend})" if len(outcome.plan.backends) > 1 else ""
        if not seeds:
            rows.append(Gain(CONFIRMED + where, (), None, None, None, None, "no seed has both yet"))
            continue
        test = paired([ours[seed] for seed in seeds], [base[seed] for seed in seeds])
        before, after = (fmean(of[seed] for seed in seeds) for of in (base, ours))
        note = "seeds without a part in the choice"
        if len(seeds) < len(outcome.plan.seeds):
            note += f"; early look, {len(seeds)} of {len(outcome.plan.seeds)}"
        rows.append(Gain(CONFIRMED + where, seeds, before, after, test.mean, test, note))
    return rows


def gain_rows(gains: list[Gain]) -> list[tuple[str, ...]]:
    """Return the rows under GAIN_HEAD."""
    rows = []
    for one in gains:
        interval = NONE
        if one.test is not None and one.test.low is not None:
            interval = f"{number(one.test.low, sign=True)} to {number(one.test.high, sign=True)}"
        seeds = ", ".join(map(str, one.seeds)) or "none yet"
        figures = number(one.start), number(one.found), number(one.difference, sign=True)
        rows.append((one.figure, seeds, *figures, interval, one.note))
    return rows


def leading(searched: Searched) -> str:
    """Return the best trial so far in words."""
    best = searched.best
    if best is None:
        return "none has a figure yet"
    return f"trial {best.number} leads with {number(best.bpb)} ({settings(best)})"


def summary(searched: Searched) -> str:
    """Return in words what was tried."""
    search, failed = searched.search, searched.failed
    tried = len(searched.trials) - 1
    fields = ", ".join(field.name for field in search.space)
    text = (
        f"{tried} trials of {fields}, from the settings of {search.variant}, each on {_seeds(search)}, "
        f"on {searched.plan.backends[0]}."
    )
    if searched.short:
        text += f" {search.trials} were asked for, but {searched.short}."
    if open_ := sum(trial.status == "running" for trial in searched.trials):
        text += f" {open_} of them are not done, here or elsewhere: start the command again when they are."
    if failed:
        text += f" Failed: {', '.join(map(title, failed))}."
    best = searched.best
    return f"{text} Best: trial {best.number}, {settings(best)}." if best else f"{text} None gave a figure."


def _seeds(search: Search) -> str:
    return f"seed{'s' if len(search.seeds) > 1 else ''} {', '.join(map(str, search.seeds))}"


def title(trial: Trial) -> str:
    """Return `trial 7`, or `start`."""
    return f"trial {trial.number}" if trial.number else "start"


def settings(trial: Trial) -> str:
    """Return the settings of a trial in one line."""
    return ", ".join(f"{name} = {shown(value)}" for name, value in trial.settings.items())


def shown(value: Any) -> str:
    """Return a value as a person would write it."""
    if isinstance(value, list):
        return " ".join(map(shown, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def head(searched: Searched) -> tuple[str, ...]:
    """Return the head of the table of trials."""
    return ("trial", *(field.name for field in searched.search.space), "bits per byte", "rank", "note")


def rows(searched: Searched) -> list[tuple[str, ...]]:
    """Return the table of trials: the start, then the trials, best first, failed ones last."""
    ranks = searched.ranks
    last = len(ranks) + 1
    lines = []
    for trial in sorted(searched.trials, key=lambda t: (t.number > 0, ranks.get(t.number, last), t.number)):
        cells = [shown(trial.settings[field.name]) for field in searched.search.space]
        note = {"done": "", "failed": f"failed: {trial.message}"}.get(trial.status, "not done")
        if trial.number == 0:
            note = f"{searched.search.variant} as it is" + (f"; {note}" if note else "")
        elif ranks.get(trial.number) == 1:
            note = "selected: its figure is too good"
        rank = str(ranks.get(trial.number, NONE))
        lines.append((title(trial), *cells, number(trial.bpb), rank, note))
    return lines


def method(searched: Searched) -> list[str]:
    """Return how the search was made."""
    search = searched.search
    how = f"sampler seed {search.sampler_seed}), {search.round} at a time, whatever ran side by side"
    again = "a killed search asks for the same ones again."
    if searched.study:
        how = f"a seed for each machine), in the study {searched.study}, on which several may work"
        again = "who is faster decides what is asked for next, so that another such search asks for others."
    return [
        f"Trials were drawn by optuna {version('optuna')} (TPE, all fields together, {how}; {again}",
        "A trial’s figure is the mean over the search’s seeds; it is only the ground on which one was chosen. A failed "
        "trial counts as infinitely bad, so that the search leaves where it failed.",
    ]


def to_json(searched: Searched, outcome: Results) -> dict[str, Any]:
    """Return a search as plain JSON values."""
    best = searched.best
    return {
        "trials": [trial._asdict() for trial in searched.trials],
        "best": best.number if best else None,
        "found": best.settings if best else None,
        "short": searched.short,
        "gains": [{**gain._asdict(), "test": gain.test and gain.test._asdict()} for gain in gains(searched, outcome)],
    }
