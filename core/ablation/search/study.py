"""`skc ablate FILE.toml --search --study URL`: the trials of a search in a database, which several machines work on.

Each asks for trials of its own, trains their runs in its own store and tells the others their figures; optuna-dashboard
shows the study too. Who is faster decides what is asked for next: only a search without a study repeats itself.
"""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from core.ablation.plan import Ablation, Job
from core.ablation.runner import HOST
from core.ablation.search.search import (
    ATTEMPTS,
    Searched,
    SearchError,
    Trial,
    distribution,
    ended,
    load_optuna,
    start_of,
)
from core.ablation.search.space import Search
from core.ablation.store import Place, RunStore
from core.config import RunConfig

KINDS = ("sqlite", "postgresql")
EXPECTED = "expected sqlite:///FILE or postgresql+psycopg2://USER@HOST/DATABASE"
WAIT = 60
"""Seconds that SQLite waits for another process that writes."""
BEGINNINGS, PAUSE = 20, 0.25
"""How often an empty database is opened while others make its tables, and seconds between."""


class SharedStudy:
    """The study of one search: its trials, whoever asked for them."""

    def __init__(self, url: str, search: Search, name: str, owner: str, look: bool = False) -> None:
        """Open the study at `url` as `owner` (one store of one machine), or make it; with `look` nothing is made.

        SearchError, without the password, for a database that cannot be used.
        """
        self.name, self._search, self._owner, self._optuna = name, search, owner, load_optuna()
        self._shown = ""
        self._secrets: list[str] = []
        self._space = {field.name: field for field in search.space}
        self._labels = {field.name: [json.dumps(value) for value in field.values] for field in search.space}
        self._distributions = {f.name: distribution(self._optuna, f, self._labels[f.name]) for f in search.space}
        self._study: Any = None
        self._storage: Any = None
        target = self._target(url)
        if look and target.get_backend_name() == "sqlite" and not os.path.exists(str(target.database)):
            return
        with self._reached():
            self._study = self._opened_after_others(target, look)

    def trials(self) -> list[Trial]:
        """Return the trials that were asked for, in their order; SearchError where the study holds something else."""
        return [self._read(trial) for trial in self._all() if trial.user_attrs.get("kept")]

    def open(self, everyone: bool) -> list[Trial]:
        """Return the trials that were asked for here and have no figure yet; of `everyone` if so wanted."""
        running = self._optuna.trial.TrialState.RUNNING
        return [
            self._read(trial)
            for trial in self._all()
            if trial.state == running and trial.user_attrs.get("kept")
            and (everyone or trial.user_attrs.get("owner") == self._owner)
        ]  # fmt: skip

    def ask(self, count: int, fresh: Callable[[Mapping[str, Any]], bool]) -> tuple[list[Trial], str]:
        """Ask for trials whose settings are `fresh`; return them, and why there are fewer than `count` if so."""
        asked: list[Trial] = []
        for _ in range(count):
            for _ in range(ATTEMPTS):
                trial, why = self._ask_one(fresh)
                if trial is not None:
                    asked.append(trial)
                    break
            else:
                return asked, f"{ATTEMPTS} suggestions in a row were of no use; the last one: {why}"
        return asked, ""

    def _ask_one(self, fresh: Callable[[Mapping[str, Any]], bool]) -> tuple[Trial | None, str]:
        """Ask for a trial; return it, or None and why it is of no use, which the study is told too."""
        why = "it was tried before"
        with self._reached():
            trial = self._opened_study().ask(self._distributions)
            read = self._read(trial)
            try:
                if fresh(read.settings):
                    trial.set_user_attr("owner", self._owner)
                    trial.set_user_attr("kept", True)
                    return read, ""
            except SearchError:  # the database's
                raise
            except ValueError as error:
                why = str(error)
            self._opened_study().tell(trial, state=self._optuna.trial.TrialState.FAIL)  # which TPE passes over
        return None, why

    def tell(self, trial: Trial) -> None:
        """Tell a trial's figures; a failed one is told as infinitely bad, as `Sampler.tell` has it."""
        study, finished = self._opened_study(), self._optuna.exceptions.UpdateFinishedTrialError
        with self._reached(), suppress(finished):  # another process of this store may have been faster
            inner = next(one._trial_id for one in study.get_trials(deepcopy=False) if one.number == trial.number - 1)
            self._storage.set_trial_user_attr(inner, "figures", [list(pair) for pair in trial.figures])
            if trial.status == "failed":
                self._storage.set_trial_user_attr(inner, "message", trial.message or "")
            study.tell(trial.number - 1, math.inf if trial.bpb is None else trial.bpb, skip_if_finished=True)

    def start(self, trial: Trial) -> None:
        """Add the start's figure, once, if the start lies in the space."""
        drawn = {name: self._draw(name, trial.settings[name]) for name in self._space}
        if trial.bpb is None or None in drawn.values() or any(one.user_attrs.get("start") for one in self._all()):
            return
        made = self._optuna.trial.create_trial(
            params=drawn, distributions=self._distributions, value=trial.bpb, user_attrs={"start": True}
        )
        with self._reached():
            self._opened_study().add_trial(made)

    def _opened_after_others(self, target: Any, look: bool) -> Any:
        """Open the study; where another process makes the same tables just now, again, when it has made them."""
        from sqlalchemy.exc import DBAPIError, IntegrityError

        for left in reversed(range(BEGINNINGS)):
            try:
                return self._opened(target, look)
            except (DBAPIError, self._optuna.exceptions.StorageInternalError) as error:
                cause = error if isinstance(error, DBAPIError) else error.__cause__
                if not left or not (isinstance(cause, IntegrityError) or "already exists" in str(cause)):
                    raise
                time.sleep(PAUSE)

    def _opened(self, target: Any, look: bool) -> Any:
        optuna = self._optuna
        waits = {"connect_args": {"timeout": WAIT}} if target.get_backend_name() == "sqlite" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            url = target.render_as_string(hide_password=False)
            self._storage = storage = optuna.storages.RDBStorage(url, engine_kwargs=waits)
            if look and self.name not in optuna.study.get_all_study_names(storage):
                return None
            study = optuna.create_study(storage=storage, study_name=self.name, load_if_exists=True)
            # Two machines that know the same must not draw the same.
            own = f"{self._search.sampler_seed}/{self._owner}/{len(study.get_trials(deepcopy=False))}"
            seed = int(hashlib.sha256(own.encode()).hexdigest()[:7], 16)
            study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        return study

    def _opened_study(self) -> Any:
        assert self._study is not None, "a study that is only looked at is not written to"
        return self._study

    def _all(self) -> Sequence[Any]:
        if self._study is None:
            return ()
        with self._reached():
            return self._study.get_trials(deepcopy=False)

    def _read(self, trial: Any) -> Trial:
        """Return a trial of optuna's as one of ours; SearchError if it is none of this search."""
        try:
            settings = {
                name: field.values[self._labels[name].index(trial.params[name])]
                if field.kind == "values" else field.read(trial.params[name])
                for name, field in self._space.items()
            }  # fmt: skip
            attributes = trial.user_attrs
            figures = tuple((int(seed), float(bpb)) for seed, bpb in attributes.get("figures", ()))
            made = Trial(trial.number + 1, settings, "running", figures)
            if isinstance(trial, self._optuna.trial.Trial) or not trial.state.is_finished():
                return made
            value = trial.value
            if "message" in attributes or value is None or not math.isfinite(value):
                return made._replace(status="failed", message=str(attributes.get("message", "it was given up")))
            return made._replace(status="done", bpb=float(value))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise SearchError(
                f"--study {self._shown}: {self.name}: trial {trial.number} is not of this search"
            ) from error

    def _draw(self, name: str, value: Any) -> Any:
        drawn = self._space[name].draw(value)
        return self._labels[name][drawn] if drawn is not None and self._space[name].kind == "values" else drawn

    def _target(self, url: str) -> Any:
        """Return a URL, taken apart; SearchError, which never shows the URL as it was given."""
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import SQLAlchemyError

        try:
            target = make_url(url)
        except (SQLAlchemyError, ValueError) as error:
            raise SearchError(f"--study: is no URL of a database; {EXPECTED}") from error
        words = [target.password, target.query.get("password")]
        self._secrets = [word for word in words if isinstance(word, str) and word]
        self._shown = target.set(query={}).render_as_string(hide_password=True)
        if target.get_backend_name() not in KINDS or not target.database or target.database == ":memory:":
            raise SearchError(f"--study {self._shown}: {EXPECTED}")
        return target

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Let what is wrong with the database be one line, without its password."""
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, self._optuna.exceptions.OptunaError, ImportError) as error:
            cause = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None) or error
            words = str(cause).strip().splitlines()[:1] or [type(cause).__name__]
            text = words[0]
            for secret in self._secrets:
                text = text.replace(secret, "***")
            raise SearchError(f"--study {self._shown}: {text}") from None


def open_study(
    url: str, plan: Ablation, search: Search, store: RunStore, place: Callable[[Job], Place], look: bool = False
) -> SharedStudy:
    """Open the study of a search; SearchError. Another code, text, space or start is another study."""
    first = place(plan.of_trials(search, {"trial-0": start_of(plan, search)}).jobs()[0])
    digest = hashlib.sha256(f"{first.key} {search.seeds} {search.space}".encode()).hexdigest()[:12]
    owner = hashlib.sha256(f"{HOST} {os.path.realpath(store.path)}".encode()).hexdigest()[:12]
    return SharedStudy(url, search, f"{plan.name}-{digest}", owner, look)


def run_shared_search(
    study: SharedStudy, plan: Ablation, search: Search, store: RunStore, place: Callable[[Job], Place],
    check: Callable[[RunConfig], object], train: Callable[[Sequence[Place]], object] | None, takeover: bool = False,
    after_round: Callable[[Searched], object] = lambda _: None,
) -> Searched:  # fmt: skip
    """Run a search with others: the arguments are those of `run_search`; trials of the others are among the result.

    First come the trials that an earlier start here left open; with `takeover` those that anybody left open.
    """

    def places_of(trials: Sequence[Trial]) -> list[Place]:
        return [place(job) for job in plan.of_trials(search, {t.name: t.settings for t in trials}).jobs()]

    def ended_here(trials: Sequence[Trial]) -> list[Trial]:
        runs = plan.of_trials(search, {trial.name: trial.settings for trial in trials})
        results = store.outcome(runs, places_of(trials)).results
        return [ended(trial, [r for r in results if r.variant == trial.name]) for trial in trials]

    def fresh(settings: Mapping[str, Any]) -> bool:
        check(plan.of_trials(search, {"trial": dict(settings)}).config("trial", search.seeds[0]))
        return json.dumps(settings) not in {json.dumps(t.settings) for t in (first, *study.trials())}

    def so_far(short: str) -> Searched:
        trials = study.trials()
        here = [p for p in places_of([first, *trials]) if p.home.exists()]
        return Searched(plan, search, (first, *trials), tuple(here), short, study.name)

    first, short = Trial(0, start_of(plan, search)), ""
    if train is not None:
        train(places_of([first]))
    first = ended_here([first])[0]
    if train is not None:
        study.start(first)
    while train is not None:
        mine = study.open(takeover)
        if not mine:
            left = search.trials - len(study.trials())
            mine, short = study.ask(min(search.round, left), fresh)
        if not mine:
            break
        train(places_of(mine))
        for trial in ended_here(mine):
            study.tell(trial)
        after_round(so_far(short))
    return so_far(short)
