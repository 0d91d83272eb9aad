"""Verb `skc ablate FILE.toml`: variants of a preset, several seeds, and what can be believed of their differences."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tyro.conf import Positional

from core.ablation.base import NAMES, with_base
from core.ablation.dry_run import described, dry_run, to_time
from core.ablation.locks import alone
from core.ablation.plan import Ablation, Job, read_plan
from core.ablation.report import search_wording, wording
from core.ablation.report.live_table import Live
from core.ablation.report.report import write_report
from core.ablation.runner import run_all
from core.ablation.search.search import Searched, load_optuna, run_search
from core.ablation.search.study import open_study, run_shared_search
from core.ablation.stats.added_seeds import looked
from core.ablation.stats.effects import VariantEffect
from core.ablation.stats.findings import Findings, assess
from core.ablation.stats.results import Results
from core.ablation.store import Place, RunStore
from core.config import ConfigError, RunConfig
from core.console import Console, one_line
from core.data.bundled import open_data
from core.data.dataset import Dataset, identity
from core.data.user_text import is_text, prepare_user_text
from core.files import read_text, replace_text
from core.model.storage import Storage
from core.training import trackers
from core.training.environment import code_version
from core.training.run import Run, RunError
from core.verbs.ablation_timing import time_runs
from core.verbs.common import Backend, Context, Outcome, check_data


@dataclass(frozen=True)
class Ablate:
    """Options of `skc ablate`."""

    file: Positional[str]
    """TOML file: base preset, variants, seeds, budget (docs/ablations.md)."""
    data: str | None = None
    """Text or prepared folder for all runs, in place of what the file says."""
    steps: int | None = None
    """Steps of every run: the file's budget."""
    seconds: float | None = None
    """Seconds of training of every run: the file's budget."""
    batch: int | None = None
    """Rows of a step, where a variant does not set train.batch itself."""
    seq: int | None = None
    """Tokens of a row in training, where a variant does not set train.seq itself."""
    lr: float | None = None
    """Factor of all learning rates of the base; what a variant sets itself stays."""
    storage: Storage | None = None
    """How matrices are stored, where a variant does not set model.matrix_storage itself."""
    blocks: tuple[str, ...] | None = None
    """Kinds of layers, where a variant does not set model.blocks itself."""
    backend: Backend | None = None
    """What trains, in place of the file's backends."""
    store: str = "runs/ablate"
    """Folder of all ablations' runs; a run that is there is never repeated."""
    dry_run: bool = False
    """Only print the plan: runs, time, and the smallest effect that the seeds can resolve."""
    search: bool = False
    """Try the settings of [search], then train the best of them on the ablation's own seeds as variant `found`."""
    retry: bool = False
    """With --search: train failed trials again; those that came after them are then asked for anew. With --study: take
    over the trials that others left open."""
    study: str | None = None
    """With --search: keep the trials in a database, on which several machines and optuna-dashboard may work:
    sqlite:///FILE or postgresql+psycopg2://USER@HOST/DATABASE."""
    parallel: int = 1
    """Runs at a time."""
    devices: tuple[str, ...] = ()
    """CUDA devices that parallel runs are spread over, for example 0 1 2 3; none: as CUDA_VISIBLE_DEVICES says."""
    threads: int | None = None
    """CPU threads of each run; None: as the libraries choose."""
    track: tuple[trackers.Name, ...] = ()
    """Copy every run, when it has ended, to tensorboard, wandb or both, in the ablation's folder."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""

    def __post_init__(self) -> None:
        from core.checks import require

        most = 1024
        good = type(self.parallel) is int and 1 <= self.parallel <= most
        require(good, f"--parallel {self.parallel}: expected at least 1, at most {most}")
        require(self.search or not self.retry, "--retry is about trials of a search: add --search")
        require(self.search or self.study is None, "--study is about trials of a search: add --search")
        good = self.threads is None or (type(self.threads) is int and 1 <= self.threads <= most)
        require(good, f"--threads {self.threads}: expected at least 1, at most {most}")


def ablate(options: Ablate, context: Context) -> Outcome:
    """Run what is not done yet, then judge and report; not ok if a run failed."""
    say, plan = context.say, _read_plan(options, context.say)
    runs = _Runs(options, plan, say)
    if options.dry_run:
        searched = runs.search(train=False)
        plan = searched.confirming() if searched else plan
        places = runs.places(plan)
        seconds = time_runs(to_time(plan, runs.store, places, searched), say)
        return Outcome(True, dry_run(plan, runs.store, places, searched, seconds, options.parallel, say))
    ended = _run(options, plan, runs)
    return _summary(ended.results, ended.searched, ended.files, say)


class AblationEnd(NamedTuple):
    """What an ablation came to."""

    results: Results
    searched: Searched | None
    files: list[Path]
    """Its report."""


def run_ablation(options: Ablate, say: Console) -> AblationEnd:
    """Run what is not done yet, write the report, and return what there is; runs that failed are among it."""
    plan = _read_plan(options, say)
    return _run(options, plan, _Runs(options, plan, say))


def _run(options: Ablate, plan: Ablation, runs: "_Runs") -> AblationEnd:
    trackers.check(options.track)
    places = runs.begin()
    searched = runs.search(train=True)
    if searched:
        plan = searched.confirming()
        places = runs.places(plan)
        runs.store.write_members(plan, [*places, *searched.places])
    runs.train(places)
    results = runs.store.outcome(plan, places)
    folder = runs.store.ablation_folder(plan)
    with alone(folder):  # another `skc ablate` of this file may have ended now too
        results = results._replace(added=looked(folder, places))
        return AblationEnd(results, searched, write_report(results, folder, searched))


def _read_plan(options: Ablate, say: Console) -> Ablation:
    """Read the file, with what the command line says in its place; ConfigError for a search that it lacks."""
    plan = read_plan(options.file)
    if options.search and plan.search is None:
        raise ConfigError(f"{options.file}: --search needs a table [search], which says what to try: docs/ablations.md")
    if options.search:
        load_optuna()  # now, not after hours
    elif plan.search is not None:
        say(f"{options.file}: [search] is left alone: add --search to try its settings")
    plan = _with_text(with_base(plan, {name: getattr(options, name) for name in NAMES}), say)
    if len(options.devices) > options.parallel:
        left = " ".join(options.devices[options.parallel :])
        say(f"careful: with --parallel {options.parallel} nothing runs on --devices {left}; raise --parallel")
    return plan


def _with_text(plan: Ablation, say: Console) -> Ablation:
    """Return an ablation whose data are prepared folders: text is prepared in the cache folder first."""

    def prepared(fields: dict[str, Any]) -> dict[str, Any]:
        path = fields.get("data.path")
        if not isinstance(path, str) or not is_text(path):
            return fields
        return {**fields, "data.path": prepare_user_text(path, say, progress=say.stages())}

    variants = {name: prepared(fields) for name, fields in plan.variants.items()}
    return plan._replace(settings=prepared(plan.settings), variants=variants)


class _Runs:
    """The runs of one `skc ablate`: where they are kept, how they are trained, and what is said when one ends."""

    def __init__(self, options: Ablate, plan: Ablation, say: Console) -> None:
        self.store = RunStore(options.store)
        self._options, self._plan, self._say = options, plan, say
        self._texts = {name: identity(_fit(plan.config(name, plan.seeds[0]))) for name in plan.variants}
        self._code = code_version()
        self._live = Live(say, options.parallel)

    def place(self, job: Job) -> Place:
        """Return where a run is kept."""
        return self.store.place(job, self._code, self._text(job.variant))

    def places(self, plan: Ablation) -> list[Place]:
        """Return where the runs of a plan are kept."""
        return [self.place(job) for job in plan.jobs()]

    def _text(self, variant: str) -> dict[str, str]:
        """Return which text a variant reads; a trial reads that of the variant whose settings it starts from."""
        search = self._plan.search
        return self._texts[search.variant if search and variant not in self._texts else variant]

    def begin(self) -> list[Place]:
        """Write down which runs the plan has, say how many are done, and return where they are kept."""
        store, plan, places = self.store, self._plan, self.places(self._plan)
        store.check_name(plan)
        if earlier := store.earlier(plan):
            self._say(f"{earlier} runs in {store.path} were made by an earlier version: they are read, not continued")
        store.write_members(plan, places)
        states = [store.status(place)[0] for place in places]
        self._say(f"{plan.name}: {described(plan)}; {states.count('done')} of {len(places)} runs are done already")
        return places

    def search(self, train: bool) -> Searched | None:
        """Try settings, or only look up what is stored of a search unless `train`; None without --search."""
        if not self._options.search or self._plan.search is None:
            return None
        work, options = self.train if train else None, self._options
        how = (self._plan, self._plan.search, self.store, self.place)
        if options.study is None:
            return run_search(*how, _fit, work, options.retry, self._tried)
        study = open_study(options.study, *how, look=not train)
        return run_shared_search(study, *how, _fit, work, options.retry, self._tried)

    def _tried(self, so_far: Searched) -> None:
        """Write down and say what a round of trials gave."""
        self.store.write_members(self._plan, [*self.places(self._plan), *so_far.places])
        trials = f"{len(so_far.trials) - 1} of {so_far.search.trials} trials"
        self._say(f"search, {trials}: {search_wording.leading(so_far)}")

    def train(self, places: Sequence[Place]) -> None:
        """Bring runs to their ends."""
        options = self._options
        try:
            run_all(
                self.store, places, parallel=options.parallel, devices=options.devices, threads=options.threads,
                started=self._started, ended=self._ended, shown=self._live,
            )  # fmt: skip
        finally:
            self._live.close()

    def _started(self, place: Place) -> None:
        job = place.job
        command = shlex.join(["skc", "ablate", self._options.file])
        self._live.started(place)
        self.store.prepare(
            place, self._code, self._text(job.variant), f"{command}  # variant {job.variant}, seed {job.seed}"
        )

    def _ended(self, place: Place) -> None:
        result = self.store.outcome(self._plan, [place]).results[0]
        self._live.ended(place, result)
        self._live.close()
        _copy(self._options.track, self.store.ablation_folder(self._plan), self._plan.name, place, self._say)
        name = f"{result.variant}, seed {result.seed}, {result.backend}"
        if result.status == "failed":
            self._say(f"FAILED: {name}: {result.message}")
        elif result.bpb is not None:
            self._say(f"{name}: {result.bpb:.4f} bits per byte")


def _fit(config: RunConfig) -> Dataset:
    """Return a run's data; what would stop the run is found now, not after hours."""
    from core.verbs.train import check_budget

    dataset = open_data(config.data.path)
    check_data(config, dataset, "set it in the file, or take other data")
    check_budget(config)
    return dataset


def _copy(kinds: Sequence[trackers.Name], folder: Path, group: str, place: Place, say: Console) -> None:
    """Give trackers what an ended run recorded, unless they have it from an earlier start."""
    if not kinds or not (place.folder / "config.json").exists():
        return
    job = place.job
    name = f"{job.variant}-{job.seed}-{job.backend}"
    to = folder / "tracked" / name
    try:
        run = Run.open(place.folder)
        with alone(to):  # another `skc ablate` may find the same run ended
            left = [kind for kind in kinds if not _has(to, kind, run)]
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
    status = run.metrics_path.stat()
    return f"{status.st_size} bytes, {status.st_mtime_ns}"


def _silent(_: str) -> None:
    """Say nothing: one line for every run and tracker would be too many."""


def _summary(results: Results, searched: Searched | None, files: list[Path], say: Console) -> Outcome:
    """Say what the runs show: a table for each backend, the search, the files."""
    value: dict[str, Any] = {"name": results.plan.name, "backends": {}}
    for tables in assess(results):
        say()
        say(f"{results.plan.name} on {tables.backend}")
        say.table(("variant", "n", "bits per byte", "difference", "verdict", "bytes", "tokens/s"), _rows(tables))
        for doubt in tables.doubts:
            say(f"careful: {doubt}")
        value["backends"][tables.backend] = {
            "variants": [summary._asdict() for summary in tables.summaries],
            "effects": [{**e._asdict(), "paired": e.paired and e.paired._asdict()} for e in tables.ends],
            "doubts": list(tables.doubts),
        }
    if searched:
        value["search"] = search_wording.to_json(searched, results)
        gains = search_wording.gains(searched, results)
        say()
        say(f"search: {search_wording.summary(searched)}")
        if gains:
            say.table(search_wording.GAIN_HEAD, search_wording.gain_rows(gains))
        if searched.failed:
            say("failed trials stay failed at the next start; --retry trains them again")
    for file in files:
        say(f"wrote {file}")
    failed = [f"{r.variant}, seed {r.seed}, {r.backend}: {r.message}" for r in results.results if r.status == "failed"]
    whole = all(r.status == "done" for r in results.results)  # another process may be trying a failed one again
    good = whole and (searched is None or searched.best is not None)
    return Outcome(good, {**value, "failed": failed, "files": [str(file) for file in files]})


def _rows(tables: Findings) -> list[tuple[object, ...]]:
    """Return one backend's table for the console."""
    effects = {effect.variant: effect for effect in tables.ends}
    rows = []
    for summary in tables.summaries:
        bpb = "-" if summary.bpb is None else f"{summary.bpb:.4f}"
        spread = "" if summary.spread is None else f" ± {summary.spread:.4f}"
        size = "-" if summary.bytes is None else f"{summary.bytes:,.0f}"
        speed = "-" if summary.tokens_per_second is None else f"{summary.tokens_per_second:,.0f}"
        effect = effects.get(summary.variant)
        change, verdict = _effect(effect) if effect else ("", "held against")
        rows.append((summary.variant, summary.n, f"{bpb}{spread}", change, verdict, size, speed))
    return rows


def _effect(effect: VariantEffect) -> tuple[str, str]:
    """Return a difference with its interval, and the verdict."""
    test = effect.paired
    if test is None:
        return "-", effect.verdict
    interval = "" if test.low is None else f" [{test.low:+.4f}, {test.high:+.4f}]"
    return f"{test.mean:+.4f}{interval}", wording.verdict(effect)
