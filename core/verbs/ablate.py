"""Verb `skc ablate FILE.toml`: variants of a preset, several seeds, and what can be believed of their differences."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from core.ablation.dry import described, dry_run
from core.ablation.locks import alone
from core.ablation.plan import Ablation, Job, read_plan
from core.ablation.report import search_telling, telling
from core.ablation.report.live import Live
from core.ablation.report.report import write_report
from core.ablation.runner import run_all
from core.ablation.search.search import Searched, load_optuna, run_search
from core.ablation.stats.effects import Effect
from core.ablation.stats.findings import assess
from core.ablation.stats.looks import looked
from core.ablation.stats.results import Outcome as Results
from core.ablation.store import Place, Store, StoreError
from core.config import ConfigError, RunConfig
from core.console import Console, one_line
from core.data.bundled import open_data
from core.data.dataset import Dataset, identity
from core.files import read_text, replace_text
from core.training import trackers
from core.training.run import Run, RunError
from core.verbs.common import Context, Outcome, check_data, code_version


@dataclass(frozen=True)
class Ablate:
    """Options of `skc ablate`."""

    file: Positional[str]
    """TOML file: base preset, variants, seeds, budget (docs/ablations.md)."""
    data: str | None = None
    """Prepared folder for all runs, in place of what the file says."""
    store: str = "runs/ablate"
    """Folder of all ablations' runs; a run that is there is never repeated."""
    dry_run: bool = False
    """Only print the plan: runs, time, and the smallest effect that the seeds can resolve."""
    search: bool = False
    """Try the settings of [search], then train the best of them on the ablation's own seeds as variant `found`."""
    retry: bool = False
    """With --search: train failed trials again; those that came after them are then asked for anew."""
    parallel: int = 1
    """Runs at a time."""
    devices: tuple[str, ...] = ()
    """CUDA devices that parallel runs are spread over, for example 0 1 2 3; none: as CUDA_VISIBLE_DEVICES says."""
    threads: int | None = None
    """CPU threads of each run; None: as the libraries choose."""
    database: str | None = None
    """Where the index is: sqlite:///FILE or postgresql+psycopg://...; None: index.sqlite in the store."""
    rebuild: bool = False
    """Make the index again from the run folders first."""
    track: tuple[trackers.Name, ...] = ()
    """Copy every run, when it has ended, to tensorboard, wandb or both, in the ablation's folder."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""

    def __post_init__(self) -> None:
        from core.checks import require

        most = 1024
        require(1 <= self.parallel <= most, f"--parallel {self.parallel}: expected at least 1, at most {most}")
        require(self.search or not self.retry, "--retry is about trials of a search: add --search")
        good = self.threads is None or 1 <= self.threads <= most
        require(good, f"--threads {self.threads}: expected at least 1, at most {most}")


def ablate(options: Ablate, context: Context) -> Outcome:
    """Run what is not done yet, then judge and report; not ok if a run failed."""
    say, plan = context.say, read_plan(options.file)
    search = plan.search if options.search else None
    if options.search and search is None:
        raise ConfigError(f"{options.file}: --search needs a table [search], which says what to try: docs/ablations.md")
    if search is not None:
        load_optuna()  # now, not after hours
    elif plan.search is not None:
        say(f"{options.file}: [search] is left alone: add --search to try its settings")
    if options.data is not None:
        plan = plan._replace(settings={**plan.settings, "data.path": options.data})
    if len(options.devices) > options.parallel:
        left = " ".join(options.devices[options.parallel :])
        say(f"careful: with --parallel {options.parallel} nothing runs on --devices {left}; raise --parallel")
    store = Store(options.store, options.database)
    data = {name: identity(_fit(plan.config(name, plan.seeds[0]))) for name in plan.variants}
    code = code_version()

    def text(variant: str) -> dict[str, str]:  # a search does not change it
        return data[variant if search is None or variant in data else search.variant]

    def place(job: Job) -> Place:
        return store.place(job, code, text(job.variant))

    places = [place(job) for job in plan.jobs()]
    if options.rebuild:
        say(f"the index of {store.path} was made again: {store.rebuild()} runs")
    if options.dry_run:
        known = search and run_search(plan, search, store, place, _fit, None)
        if known:
            plan = known.confirming()
            places = [place(job) for job in plan.jobs()]
        return Outcome(True, dry_run(plan, store, places, known, options.parallel, say))
    trackers.check(options.track)
    store.check_name(plan)
    if earlier := store.earlier(plan):
        say(f"{earlier} runs in {store.path} were made by an earlier version: they are read, not continued")
    _enter(store, plan, places)
    states = [store.status(place)[0] for place in places]
    say(f"{plan.name}: {described(plan)}; {states.count('done')} of {len(places)} runs are done already")
    live = Live(say, options.parallel)

    def indexed(act: Callable[[], None]) -> bool:
        """Do something to the index; the runs go on without it, since it can be made again."""
        try:
            act()
        except StoreError as error:
            say(f"careful: {error}")
            return False
        return True

    def started(place: Place) -> None:
        live.started(place)
        store.prepare(place, code, text(place.job.variant), _command(place, options))

    def ended(place: Place) -> None:
        result = store.outcome(plan, [place]).results[0]
        live.ended(place, result)
        live.close()
        indexed(lambda: store.update(place, result))
        _copy(options, store.ablation_folder(plan), plan.name, place, say)
        if result.status == "failed":
            say(f"FAILED: {place.job.variant}, seed {place.job.seed}, {place.job.backend}: {result.message}")
        elif result.bpb is not None:
            say(f"{place.job.variant}, seed {place.job.seed}, {place.job.backend}: {result.bpb:.4f} bits per byte")

    def train(wanted: Sequence[Place]) -> None:
        try:
            run_all(
                store, wanted, parallel=options.parallel, devices=options.devices, threads=options.threads,
                started=started, ended=ended, shown=live,
            )  # fmt: skip
        finally:
            live.close()

    def told(so_far: Searched) -> None:
        indexed(lambda: _enter(store, plan, [*places, *so_far.places]))
        say(f"search, {len(so_far.trials) - 1} of {so_far.search.trials} trials: {search_telling.leading(so_far)}")

    searched = search and run_search(plan, search, store, place, _fit, train, options.retry, told)
    if searched:
        plan = searched.confirming()
        places = [place(job) for job in plan.jobs()]
        everything = [*places, *searched.places]
        indexed(lambda: _enter(store, plan, everything))
    train(places)
    outcome = store.outcome(plan, places)
    folder = store.ablation_folder(plan)
    with alone(folder):  # another `skc ablate` of this file may have ended now too
        outcome = outcome._replace(added=looked(folder, places))
        files = write_report(outcome, folder, searched)
    found = _told(outcome, searched, files, say)
    return found if indexed(store.settle) else found._replace(ok=False)


def _fit(config: RunConfig) -> Dataset:
    """Return a run's data; what would stop the run is found now, not after hours."""
    from core.verbs.make import check_budget

    dataset = open_data(config.data.path)
    check_data(config, dataset, "set it in the file, or take other data")
    check_budget(config)
    return dataset


def _enter(store: Store, plan: Ablation, places: list[Place]) -> None:
    """Write down which runs an ablation has."""
    store.write_members(plan, places)
    store.enter_members(plan, places)


def _copy(options: Ablate, folder: Path, group: str, place: Place, say: Console) -> None:
    """Give trackers what an ended run recorded, unless they have it from an earlier start."""
    if not options.track or not (place.folder / "config.json").exists():
        return
    job = place.job
    name = f"{job.variant}-{job.seed}-{job.backend}"
    to = folder / "tracked" / name
    try:
        run = Run.open(place.folder)
        with alone(to):  # another `skc ablate` may find the same run ended
            left = [kind for kind in options.track if not _has(to, kind, run)]
            copies = trackers.start(left, to, job.config, _silent, name, group)
            copies.rows(run.metrics() if left else [])
            copies.close()
            for kind in set(left) - set(copies.lost):
                replace_text(to / f"{kind}.copied", _state(run))
    except RunError:  # the report says so
        return
    except Exception as error:  # no account, no network, no space: the runs go on
        return say(f"{name} was not copied ({one_line(error) or type(error).__name__}); its run folder has it all")
    for lost in copies.lost:
        say(f"{lost} did not get {name}; its run folder has it all")


def _has(folder: Path, kind: str, run: Run) -> bool:
    """Whether a tracker's copy of a run is whole: a long run takes seconds, and all are looked at by every start."""
    note = folder / f"{kind}.copied"
    return note.exists() and (folder / kind).exists() and read_text(note) == _state(run)


def _state(run: Run) -> str:
    """Return what changes when a run records more."""
    found = run.metrics_path.stat()
    return f"{found.st_size} bytes, {found.st_mtime_ns}"


def _silent(_: str) -> None:
    """Say nothing: one line for every run and tracker would be too many."""


def _command(place: Place, options: Ablate) -> str:
    job = place.job
    return f"{shlex.join(['skc', 'ablate', options.file])}  # variant {job.variant}, seed {job.seed}"


def _told(outcome: Results, searched: Searched | None, files: list[Path], say: Console) -> Outcome:
    """Say what was found, a table for each backend."""
    value: dict[str, Any] = {"name": outcome.plan.name, "backends": {}}
    for found in assess(outcome):
        effects = {effect.variant: effect for effect in found.ends}
        rows = []
        for summary in found.summaries:
            bpb = "-" if summary.bpb is None else f"{summary.bpb:.4f}"
            spread = "" if summary.spread is None else f" ± {summary.spread:.4f}"
            size = "-" if summary.bytes is None else f"{summary.bytes:,.0f}"
            speed = "-" if summary.tokens_per_second is None else f"{summary.tokens_per_second:,.0f}"
            effect = effects.get(summary.variant)
            change, verdict = _effect(effect) if effect else ("", "held against")
            rows.append((summary.variant, summary.n, f"{bpb}{spread}", change, verdict, size, speed))
        say()
        say(f"{outcome.plan.name} on {found.backend}")
        say.table(("variant", "n", "bits per byte", "difference", "verdict", "bytes", "tokens/s"), rows)
        for doubt in found.doubts:
            say(f"careful: {doubt}")
        value["backends"][found.backend] = {
            "variants": [summary._asdict() for summary in found.summaries],
            "effects": [{**e._asdict(), "paired": e.paired and e.paired._asdict()} for e in found.ends],
            "doubts": list(found.doubts),
        }
    if searched:
        value["search"] = search_telling.to_json(searched, outcome)
        gains = search_telling.gains(searched, outcome)
        say()
        say(f"search: {search_telling.summary(searched)}")
        if gains:
            say.table(search_telling.GAIN_HEAD, search_telling.gain_rows(gains))
        if searched.failed:
            say("failed trials stay failed at the next start; --retry trains them again")
    for file in files:
        say(f"wrote {file}")
    failed = [f"{r.variant}, seed {r.seed}, {r.backend}: {r.message}" for r in outcome.results if r.status == "failed"]
    whole = all(r.status == "done" for r in outcome.results)  # another process may be trying a failed one again
    good = whole and (searched is None or searched.best is not None)
    return Outcome(good, {**value, "failed": failed, "files": [str(file) for file in files]})


def _effect(effect: Effect) -> tuple[str, str]:
    """Return a difference with its interval, and the verdict."""
    found = effect.paired
    if found is None:
        return "-", effect.verdict
    interval = "" if found.low is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
    return f"{found.mean:+.4f}{interval}", telling.verdict(effect)
