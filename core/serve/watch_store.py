"""What a watcher of an ablation is told: its runs and findings at first, then every run that got on or ended."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.ablation.plan import Ablation, Job, read_plan
from core.ablation.records import Member, StoreError, read_failure, read_job, read_member_rows
from core.ablation.report import wording
from core.ablation.search.space import TRIAL
from core.ablation.stats.findings import Findings, assess
from core.ablation.stats.results import Result, Results, Status, read_result
from core.ablation.store import Place, RunStore
from core.checks import in_words
from core.config import ConfigError, RunConfig
from core.files import FileError
from core.serve.tail import file_stamp
from core.serve.watch_run import MetricsFeed, WatchEvent
from core.training.records import RunError

RUN_POINTS = 60
"""Points of a run's curve that a watcher is sent at first."""


class _Watched:
    """One run of an ablation."""

    def __init__(self, store: RunStore, member: Member) -> None:
        self.member = member
        home = store.path / "runs" / member.key
        self._store, self._home, self._metrics = store, home, MetricsFeed(home / "run", RUN_POINTS)
        self._config: RunConfig | None = None
        self._told: object = None
        self._stands: tuple[Status, str | None] = "waiting", None
        self.result = Result(member.variant, member.seed, member.backend, "waiting", home / "run")

    def look(self) -> tuple[dict[str, Any] | None, bool]:
        """Return what changed of the run since the last look, and whether it stands elsewhere than then."""
        stands: tuple[Status, str | None]
        try:
            rows, anew = self._metrics.look()
            stands = self._status()
        except (FileError, OSError) as error:
            rows, anew = [], False
            stands = "failed", str(error)
        moved = stands != self._stands or (anew and stands[0] == "done")
        if moved:
            self._stands, self.result = stands, self._read(*stands)
        last = self._metrics.pace[-1] if self._metrics.pace else {}
        left = self._metrics.left(self._config) if self._config and self.result.status == "running" else None
        value = {
            "key": self.member.key, "variant": self.member.variant, "seed": self.member.seed,
            "backend": self.member.backend, "status": self.result.status, "message": self.result.message,
            "step": last.get("step"), "training": last.get("train/bpb"), "bpb": self.result.bpb, "left": left,
            "steps": self._config.train.steps if self._config and not self._config.train.seconds else None,
        }  # fmt: skip
        if value == self._told and not rows and not anew:
            return None, False
        self._told = value
        return {**value, "anew": anew, "points": _points(rows)}, moved

    def whole(self) -> dict[str, Any]:
        """Return all that is known of the run."""
        assert isinstance(self._told, dict)
        return {**self._told, "anew": True, "points": _points(self._metrics.rows)}

    def _status(self) -> tuple[Status, str | None]:
        """Return where the run stands, as RunStore.status does, by the lines that were followed."""
        if self._config is None and (self._home / "job.json").exists():
            with suppress(StoreError):  # only how many steps there will be is not known then
                self._config = read_job(self._home).config
        if "final/artifact" in self._metrics.names:
            return "done", None
        if self._store.busy(self._place()):
            return "running", None
        if (self._home / "failed.json").exists():
            return "failed", read_failure(self._home)
        return "waiting", None

    def _place(self) -> Place:
        one = self.member
        return Place(Job(one.variant, one.seed, one.backend, RunConfig(), None), one.key, self._home / "run")

    def _read(self, status: Status, message: str | None) -> Result:
        bare = Result(*self.member[:3], status, self._home / "run", message=message)
        if status != "done":
            return bare
        try:
            return read_result(self._place().job, self._home / "run", status)
        except (RunError, FileError, OSError) as error:
            return bare._replace(status="failed", message=str(error))


class StoreFeed:
    """What is told of one ablation of a store, which may have several: the one named, else the last that was begun."""

    def __init__(self, store: Path, name: str | None = None) -> None:
        self._store, self._name = RunStore(store), name
        self._stamp: object = None
        self._runs: list[_Watched] = []
        self._plan: Ablation | None = None
        self._report: object = None
        """The file of the report as it was told last."""

    def look(self) -> list[WatchEvent]:
        """Return what to tell since the last look: `all` at first and when the ablation has other runs, else `more`."""
        name = self._name or newest(self._store.path)
        if self._name is not None and self._name not in ablations(self._store.path):
            return self._waits(f"{self._store.path} has no ablation of the name {in_words(self._name)}")
        if name is None:
            words = f"{self._store.path} has no ablation yet: this page shows one as soon as it begins"
            return self._waits(words)
        file = self._store.path / "ablations" / name / "members.json"
        stamp = name, file_stamp(file)
        if stamp != self._stamp:
            try:
                self._begin(file, name)
            except (StoreError, OSError) as error:
                return self._waits(str(error))
            self._stamp, self._report = stamp, file_stamp(report_file(self._store.path, name))
            for run in self._runs:
                run.look()
            return [WatchEvent("all", {**self._whole(), "runs": [run.whole() for run in self._runs]})]
        looks = [run.look() for run in self._runs]
        changed = [value for value, _ in looks if value]
        report = file_stamp(report_file(self._store.path, name))
        if not changed and report == self._report:
            return []
        self._report = report
        findings = {"findings": self._findings()} if any(moved for _, moved in looks) else {}
        told = {"runs": changed, "facts": self._facts(), "report": report is not None, **findings}
        return [WatchEvent("more", told)]

    def _waits(self, words: str) -> list[WatchEvent]:
        """Tell why there is nothing to show, once."""
        if self._stamp == words:
            return []
        self._stamp = words
        value = {"kind": "store", "store": None, "runs": [], "words": words, "names": ablations(self._store.path)}
        return [WatchEvent("all", value)]

    def _begin(self, file: Path, name: str) -> None:
        where, members = read_member_rows(file)
        self._plan = _plan(where, name, members)
        self._runs = [_Watched(self._store, member) for member in members]

    def _whole(self) -> dict[str, Any]:
        plan = self._plan
        assert plan is not None
        store = {
            "name": plan.name, "purpose": plan.purpose, "reference": plan.reference,
            "variants": list(dict.fromkeys(run.member.variant for run in self._runs)),
        }  # fmt: skip
        told = {"facts": self._facts(), "findings": self._findings(), "names": ablations(self._store.path)}
        return {"kind": "store", "store": store, "words": "", "report": self._report is not None, **told}

    def _outcome(self) -> Results:
        assert self._plan is not None
        return Results(self._plan, tuple(run.result for run in self._runs if run.member.variant in self._plan.variants))

    def _facts(self) -> list[tuple[str, str]]:
        return wording.facts(self._outcome())

    def _findings(self) -> list[dict[str, Any]]:
        outcome = self._outcome()
        return [_shown(outcome, tables) for tables in assess(outcome)]


def ablations(store: Path) -> list[str]:
    """Return the names of a store's ablations, by name."""
    return sorted(file.parent.name for file in (store / "ablations").glob("*/members.json"))


def report_file(store: Path, name: str) -> Path:
    """Return where the report of an ablation lies, which `skc ablate` writes when its runs have ended."""
    return store / "ablations" / name / "report.html"


def newest(store: Path) -> str | None:
    """Return the ablation whose list of runs was written last; None without any."""
    times = {name: file_stamp(store / "ablations" / name / "members.json") for name in ablations(store)}
    return max(times, key=lambda name: (times[name] or (0, 0, 0))[2], default=None)


def _plan(where: str, name: str, members: Sequence[Member]) -> Ablation:
    """Return an ablation by its list of runs, with what its file adds where that is there and can be read."""
    variants = {one.variant: {} for one in members if not TRIAL.fullmatch(one.variant)}
    seeds, backends = ({getattr(one, field): None for one in members} for field in ("seed", "backend"))
    own = {one.seed for one in members if one.variant in variants}
    plan = Ablation(
        name, "", "unknown", tuple(seed for seed in seeds if seed in own), tuple(backends), None,
        next(iter(variants), ""), ("steps", 0), {}, variants, where, "",
    )  # fmt: skip
    try:
        file = read_plan(where)
    except (ConfigError, FileError, OSError):
        return plan
    reference = file.reference if file.reference in variants else plan.reference
    return plan._replace(purpose=file.purpose, base=file.base, budget=file.budget, reference=reference)


def _points(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    return [[row["step"], row["train/bpb"]] for row in rows if "train/bpb" in row]


def _shown(outcome: Results, tables: Findings) -> dict[str, Any]:
    """Return one backend's findings in the report's words."""
    reference = outcome.plan.reference
    answers = [
        {"variant": one.variant, "verdict": wording.verdict(one), "words": f"{words[0].upper()}{words[1:]}"}
        for one, words in wording.answers(tables, reference)
    ]
    effects = [
        {**one.paired._asdict(), "variant": one.variant, "verdict": one.verdict, "differences": one.differences}
        for one in wording.ranked(tables.ends)
        if one.paired
    ]
    return {
        "backend": tables.backend, "answers": answers, "effects": effects, "doubts": list(tables.doubts),
        "resolution": wording.resolution(tables, len(outcome.plan.seeds)), "head": wording.HEAD,
        "rows": wording.table(tables, reference) if any(one.n for one in tables.summaries) else [],
    }  # fmt: skip
