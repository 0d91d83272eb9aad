"""`skc ablate FILE.toml --search`: rounds of trials, whose settings a sampler proposes and whose runs are trained.

The run folders are the source. A search has no database of its own: each start makes the sampler again and tells it
what is stored, round by round, which leads to the same trials, so that a killed search goes on where it was.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from core.ablation.plan import Ablation, Job
from core.ablation.search.space import FOUND, Field, Search
from core.ablation.stats.results import Result, Status
from core.ablation.store import Place, RunStore
from core.config import RunConfig, flattened, to_json

ATTEMPTS = 100
"""Suggestions in a row that may be of no use (tried already, or refused) before a search ends early."""


class SearchError(ValueError):
    """A search cannot be made: the message says what is missing."""


class Trial(NamedTuple):
    """One setting of the searched fields; trial 0 is the start as it is, which is not one of those to choose from."""

    number: int
    settings: dict[str, Any]
    """Of the searched fields."""
    status: Status = "waiting"
    figures: tuple[tuple[int, float], ...] = ()
    """(seed, bits per byte) of its finished runs."""
    bpb: float | None = None
    """Their mean over all seeds of the search; None if one of them failed or is not done."""
    message: str | None = None
    """What a failed run said last."""

    @property
    def name(self) -> str:
        """The name of its runs' variant."""
        return f"trial-{self.number}"


class Searched(NamedTuple):
    """What a search has found so far."""

    plan: Ablation
    """As the file has it."""
    search: Search
    trials: tuple[Trial, ...]
    """Trial 0, then the others in the order in which they were asked for."""
    places: tuple[Place, ...]
    """Of all their runs in this store."""
    short: str = ""
    """Why there are fewer trials than the file asks for; empty if there are not."""
    study: str = ""
    """Name of the study, if the trials are in a database that others work on too."""

    @property
    def elsewhere(self) -> int:
        """How many trials have ended whose runs are not in this store."""
        here = {place.job.variant for place in self.places}
        return sum(trial.status in ("done", "failed") and trial.name not in here for trial in self.trials)

    @property
    def start(self) -> Trial:
        """The settings that all trials start from."""
        return self.trials[0]

    @property
    def best(self) -> Trial | None:
        """The trial with the fewest bits per byte on the search's seeds; None if none has a figure."""
        return min((t for t in self.trials[1:] if t.bpb is not None), key=lambda t: t.bpb or 0.0, default=None)

    @property
    def complete(self) -> bool:
        """Whether all trials are there and have ended."""
        ended = all(trial.status in ("done", "failed") for trial in self.trials)
        return ended and (bool(self.short) or len(self.trials) > self.search.trials)

    @property
    def failed(self) -> list[Trial]:
        """The trials that gave no figure."""
        return [trial for trial in self.trials if trial.status == "failed"]

    @property
    def ranks(self) -> dict[int, int]:
        """Number of a trial -> its rank, 1 the best; trial 0 has none."""
        scored = sorted((t.bpb, t.number) for t in self.trials[1:] if t.bpb is not None)
        return {number: rank for rank, (_, number) in enumerate(scored, 1)}

    def confirming(self) -> Ablation:
        """Return the ablation with the best trial as a variant, to be trained on seeds that had no part in its choice.

        The plan as it is, where no trial has a figure or the search is not complete.
        """
        if self.best is None or not self.complete:
            return self.plan
        changed = {**self.plan.variants[self.search.variant], **self.best.settings}
        return self.plan._replace(variants={**self.plan.variants, FOUND: changed})


def run_search(
    plan: Ablation, search: Search, store: RunStore, place: Callable[[Job], Place],
    check: Callable[[RunConfig], object], train: Callable[[Sequence[Place]], object] | None, retry: bool = False,
    after_round: Callable[[Searched], object] = lambda _: None,
) -> Searched:  # fmt: skip
    """Run a search: ask the sampler for trials, train the runs that are not stored, and tell it the figures.

    `place` says where a run is kept, `check` raises ValueError for settings that cannot run (others are asked for
    then), `train` brings runs to their ends; None: nothing is trained, and the first round that is not done is the last
    one. A failed trial stays failed, since what came after it was asked for knowing that, unless `retry`.
    `after_round` gets what there is after every round that was trained. SearchError without optuna.
    """
    sampler = Sampler(search)
    searched = Searched(plan, search, (), ())
    had: set[str] = set()

    def fresh(settings: Mapping[str, Any]) -> bool:
        config = plan.of_trials(search, {"trial": dict(settings)}).config("trial", search.seeds[0])
        check(config)
        digest = json.dumps(to_json(config))
        new = digest not in had
        had.add(digest)
        return new

    fresh({})
    while len(searched.trials) <= search.trials and not searched.short:
        asked = [] if searched.trials else [Trial(0, start_of(plan, search))]
        for _ in range(min(search.round, search.trials + 1 - max(1, len(searched.trials)))):
            settings = sampler.ask(fresh)
            if settings is None:
                searched = searched._replace(short=sampler.useless)
                break
            asked.append(Trial(len(searched.trials) + len(asked), settings))
        runs = plan.of_trials(search, {trial.name: trial.settings for trial in asked})
        places = [place(job) for job in runs.jobs()]
        open_ = [p for p in places if retry or store.status(p)[0] != "failed"]
        trained = train is not None and any(store.status(p)[0] != "done" for p in open_)
        if train is not None and trained:
            train(open_)
        results = store.outcome(runs, places).results
        done = [ended(trial, [r for r in results if r.variant == trial.name]) for trial in asked]
        searched = searched._replace(trials=(*searched.trials, *done), places=(*searched.places, *places))
        if trained:
            after_round(searched)
        if any(trial.status not in ("done", "failed") for trial in done):
            break
        if done and done[0].number == 0:
            sampler.start(done[0])
        sampler.tell([trial.bpb for trial in done if trial.number])
    return searched


def ended(trial: Trial, results: Sequence[Result]) -> Trial:
    """Return a trial with what its runs gave: failed if one of them did."""
    figures = tuple((r.seed, r.bpb) for r in results if r.status == "done" and r.bpb is not None)
    lost = next((r for r in results if r.status == "failed"), None)
    if lost:
        return trial._replace(status="failed", figures=figures, message=lost.message or "it left no message")
    if any(r.status != "done" for r in results):
        return trial._replace(figures=figures)
    if len(figures) < len(results) or not all(math.isfinite(bpb) for _, bpb in figures):
        return trial._replace(status="failed", message="its score is not finite")
    return trial._replace(status="done", figures=figures, bpb=fmean(bpb for _, bpb in figures))


def start_of(plan: Ablation, search: Search) -> dict[str, Any]:
    """Return the start's values of the searched fields, as a file would have them."""
    config = json.loads(json.dumps(to_json(plan.config(search.variant, search.seeds[0]))))
    return {field.name: flattened(config)[field.name] for field in search.space}


class Sampler:
    """Optuna's TPE over the fields of a search, the same at every start: it depends on what it was told, in order."""

    def __init__(self, search: Search) -> None:
        self._optuna = optuna = load_optuna()
        self._space = {field.name: field for field in search.space}
        self._distributions = {
            field.name: distribution(optuna, field, range(len(field.values))) for field in search.space
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # Trials that are asked for together keep away from each other (constant_liar).
            drawn = optuna.samplers.TPESampler(seed=search.sampler_seed, multivariate=True, constant_liar=True)
        self._study = optuna.create_study(sampler=drawn)
        self._open: list[Any] = []
        self.useless = ""
        """Why the last suggestion was of no use."""

    def ask(self, fresh: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any] | None:
        """Return settings that are `fresh` (not tried before, not refused); None if none of ATTEMPTS suggestions is."""
        for _ in range(ATTEMPTS):
            trial = self._study.ask(self._distributions)
            settings = {name: field.read(trial.params[name]) for name, field in self._space.items()}
            why = "it was tried before"
            try:
                if fresh(settings):
                    self._open.append(trial)
                    return settings
            except ValueError as error:
                why = str(error)
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)  # which TPE passes over
            self.useless = f"{ATTEMPTS} suggestions in a row were of no use; the last one: {why}"
        return None

    def start(self, trial: Trial) -> None:
        """Tell the sampler the start's figure, if the start lies in the space."""
        drawn = {name: field.draw(trial.settings[name]) for name, field in self._space.items()}
        if trial.bpb is None or None in drawn.values():
            return
        frozen = self._optuna.trial.create_trial(params=drawn, distributions=self._distributions, value=trial.bpb)
        self._study.add_trial(frozen)

    def tell(self, figures: Sequence[float | None]) -> None:
        """Tell the sampler the figures of all open trials, in the order in which they were asked for; None: failed.

        A failed one is told as infinitely bad, not as failed: TPE passes over failed trials, learns nothing from them
        and asks for more of their kind (docs/ablations.md has figures).
        """
        for trial, bpb in zip(self._open, figures, strict=True):
            self._study.tell(trial, math.inf if bpb is None else bpb)
        self._open.clear()


def load_optuna() -> Any:
    """Import optuna and silence its log; SearchError if it is not installed."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise SearchError("--search needs optuna: pip install -e '.[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def distribution(optuna: Any, field: Field, choices: Sequence[Any]) -> Any:
    """Return what optuna draws a field from; `choices` stand for its values, where it has some."""
    kinds = optuna.distributions
    if field.kind == "values":
        return kinds.CategoricalDistribution(tuple(choices))
    kind = kinds.IntDistribution if field.kind == "int" else kinds.FloatDistribution
    return kind(field.low, field.high, log=field.log, step=field.step)
