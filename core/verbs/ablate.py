"""Verb `skc ablate FILE.toml`: variants of a preset, several seeds, and what can be believed of their differences."""

import importlib
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from core import trackers
from core.ablation.effects import Effect, resolvable
from core.ablation.findings import assess
from core.ablation.live import Live
from core.ablation.plan import Ablation, Job, read_plan
from core.ablation.report import write_report
from core.ablation.results import Outcome as Results
from core.ablation.runner import run_all
from core.ablation.store import Place, Store
from core.bundled import open_data
from core.config import ConfigError
from core.console import Console, duration
from core.data import identity
from core.engine import choose_backend
from core.export.budget import predicted_bytes
from core.params import count
from core.run import Run, RunError
from core.verbs.common import ROOT, Context, Outcome, check_data, code_version

ASSUMED = 0.004
"""Standard deviation of paired differences in bits per byte that is assumed where no runs are there to measure it."""


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

        require(self.parallel >= 1, f"--parallel {self.parallel}: expected at least 1")
        require(self.threads is None or self.threads >= 1, f"--threads {self.threads}: expected at least 1")


def ablate(options: Ablate, context: Context) -> Outcome:
    """Run what is not done yet, then judge and report; not ok if a run failed."""
    say, plan = context.say, read_plan(options.file)
    if options.data is not None:
        plan = plan._replace(settings={**plan.settings, "data.path": options.data})
    store = Store(options.store, options.database)
    data = {name: _checked(plan, name) for name in plan.variants}
    code = code_version()
    places = [store.place(job, code, data[job.variant]) for job in plan.jobs()]
    if options.rebuild:
        say(f"the index of {store.path} was made again: {store.rebuild()} runs")
    if options.dry_run:
        return _dry_run(options, plan, store, places, say)
    trackers.check(options.track)
    store.check_name(plan)
    store.write_members(plan, places)
    store.enter_members(plan, places)
    states = [store.status(place)[0] for place in places]
    say(f"{plan.name}: {_described(plan)}; {states.count('done')} of {len(places)} runs are done already")
    live = Live(say, options.parallel)

    def started(place: Place) -> None:
        live.started(place)
        store.prepare(place, code, data[place.job.variant], _command(place, options))

    def ended(place: Place) -> None:
        live.ended(place)
        state, message = store.status(place)
        result = store.outcome(plan, [place]).results[0]
        store.update(place, result)
        _copy(options, store.ablation_folder(plan), plan.name, place, say)
        if state == "failed":
            live.close()
            say(f"FAILED: {place.job.variant}, seed {place.job.seed}, {place.job.backend}: {message}")
        elif result.bpb is not None:
            live.close()
            say(f"{place.job.variant}, seed {place.job.seed}, {place.job.backend}: {result.bpb:.4f} bits per byte")

    try:
        run_all(
            store, places, parallel=options.parallel, devices=options.devices, threads=options.threads,
            started=started, ended=ended, shown=live,
        )  # fmt: skip
    finally:
        live.close()
    outcome = store.outcome(plan, places)
    files = write_report(outcome, store.ablation_folder(plan))
    return _told(outcome, files, say)


def _checked(plan: Ablation, variant: str) -> dict[str, str]:
    """Return the identity of a variant's data; what would stop its runs is found now, not after hours."""
    from core.verbs.make import check_budget

    config = plan.config(variant, plan.seeds[0])
    dataset = open_data(config.data.path)
    check_data(config, dataset)
    check_budget(config)
    return identity(dataset)


def _copy(options: Ablate, folder: Path, group: str, place: Place, say: Console) -> None:
    """Give trackers what an ended run recorded."""
    if not options.track or not (place.folder / "config.json").exists():
        return
    job = place.job
    name = f"{job.variant}-{job.seed}-{job.backend}"
    try:
        run = Run.open(place.folder)
        copies = trackers.start(options.track, folder / "tracked" / name, job.config, _silent, name, group)
        copies.rows(run.metrics())
        copies.close()
    except RunError:  # the report says so
        return
    except ConfigError as error:  # no account, no network: the runs go on
        return say(f"{name}: {error}")
    for lost in copies.lost:
        say(f"{lost} did not get {name}; its run folder has it all")


def _silent(_: str) -> None:
    """Say nothing: one line for every run and tracker would be too many."""


def _described(plan: Ablation) -> str:
    kind, amount = plan.budget
    return (
        f"{len(plan.variants)} variants of {plan.base}, {len(plan.seeds)} seeds, {amount:,} {kind} each, "
        f"on {' and '.join(plan.backends)}"
    )


def _command(place: Place, options: Ablate) -> str:
    job = place.job
    return f"{shlex.join(['skc', 'ablate', options.file])}  # variant {job.variant}, seed {job.seed}"


def _dry_run(options: Ablate, plan: Ablation, store: Store, places: list[Place], say: Console) -> Outcome:
    """Print what would be run, how long it takes by a probe of every variant, and what the seeds can resolve."""
    states = [store.status(place)[0] for place in places]
    rows, seconds = [], 0.0
    starting = {backend: _starting(backend) for backend in plan.backends}
    for name in plan.variants:
        for backend in plan.backends:
            both = zip(places, states, strict=True)
            mine = [(p, s) for p, s in both if (p.job.variant, p.job.backend) == (name, backend)]
            config = mine[0][0].job.config
            left = sum(state != "done" for _, state in mine)
            each = starting[backend] + _seconds(mine[0][0].job, say) if left else None
            seconds += left * (each or 0.0)
            takes = "-" if each is None else duration(each)
            rows.append((name, backend, count(config.model), predicted_bytes(config.model), len(mine), left, takes))
    say(f"{plan.name}: {_described(plan)}; held against {plan.reference}")
    say.table(("variant", "backend", "parameters", "bytes", "runs", "to do", "each takes"), rows)
    seconds /= options.parallel
    say(f"about {duration(seconds)} in all, {options.parallel} at a time")
    spread, whence = _spread(store, plan, places)
    n = len(plan.seeds)
    smallest = resolvable(n, spread) if n > 1 else None
    text = "one seed resolves nothing: there is no interval" if smallest is None else (
        f"{n} seeds can resolve a difference of {smallest:.4f} bits per byte (5 % two-sided, 4 times in 5)"
    )  # fmt: skip
    say(f"{text}; standard deviation of paired differences {spread:.4f}, {whence}")
    value: dict[str, Any] = {"name": plan.name, "runs": len(places), "to_do": len(places) - states.count("done")}
    return Outcome(True, {**value, "seconds": seconds, "spread": spread, "resolvable": smallest})


def _starting(backend: str) -> float:
    """Return the seconds that a worker takes before it begins to build; this process has what it imports then."""
    code = f"import core.ablation.worker, backends.{backend}.engine"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    took = time.perf_counter() - began
    choose_backend(backend)
    if backend == "mlx":  # before anything imports MLX
        importlib.import_module("backends.mlx.blas").load_fast_blas()
    importlib.import_module(f"backends.{backend}.engine")
    return took


def _seconds(job: Job, say: Console) -> float:
    """Return the seconds that a run takes from its start to its report, by `skc train --dry-run`."""
    from core.verbs.make import Train, train_run

    say(f"timing {job.variant} on {job.backend}")
    quiet = Console()
    quiet.mute()
    options = replace(Train.of(job.config), backend=job.backend, dtype=job.dtype, dry_run=True)
    return train_run(options, Context(quiet, "")).value["total"]


def _spread(store: Store, plan: Ablation, places: list[Place]) -> tuple[float, str]:
    """Return the standard deviation of paired differences, and whether it was measured."""
    found = [f.spread for f in assess(store.outcome(plan, places)) if f.spread]
    if found:
        return max(found), "as measured on the runs that are done"
    return ASSUMED, "assumed: no variant has two finished seeds yet"


def _told(outcome: Results, files: list[Path], say: Console) -> Outcome:
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
    for file in files:
        say(f"wrote {file}")
    failed = [f"{r.variant}, seed {r.seed}, {r.backend}: {r.message}" for r in outcome.results if r.status == "failed"]
    return Outcome(not failed, {**value, "failed": failed, "files": [str(file) for file in files]})


def _effect(effect: Effect) -> tuple[str, str]:
    """Return a difference with its interval, and the verdict."""
    found = effect.paired
    if found is None:
        return "-", effect.verdict
    interval = "" if found.low is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
    return f"{found.mean:+.4f}{interval}", effect.verdict + (" (early look)" if effect.early else "")
