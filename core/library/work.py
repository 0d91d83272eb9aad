"""`skc.train` and `skc.ablate`: what the verbs of these names do, for programs. `skc.py` shows them to the outside."""

import dataclasses
import io
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from core.ablation.fields import named
from core.ablation.locks import make
from core.ablation.stats.findings import Findings, assess
from core.checks import in_words, require
from core.config_file import changed_preset
from core.console import Console
from core.engine.protocol import DType
from core.files import replace_text
from core.formats.toml import toml_text
from core.library.arguments import check_path, documented
from core.library.model import Model, load
from core.scoring.score import Score
from core.verbs.ablate import Ablate, AblationEnd, run_ablation
from core.verbs.common import Backend, Context
from core.verbs.train import Train, train_run


@dataclass(frozen=True)
class TrainedRun:
    """A run that has come to its end."""

    path: Path
    """Its folder."""
    step: int
    score: Score
    """Of the artifact, read back, as `skc runs` has it."""
    artifact: Path
    artifact_bytes: int
    within: bool
    """Whether artifact and code are within export.budget."""
    seconds: float
    """Training time."""
    backend: str

    def load(self) -> Model:
        """Return the model, on the backend that trained it."""
        return load(self.path, backend=self.backend)  # type: ignore[arg-type]


class AblationRow(NamedTuple):
    """One variant on one backend; None where no run is finished, and in what is held against the reference of it."""

    variant: str
    backend: str
    runs: int
    """Finished ones."""
    bpb: float | None
    """Mean over them."""
    difference: float | None
    """From the reference, seed by seed."""
    low: float | None
    """Of the 95 % interval of the difference."""
    high: float | None
    verdict: str
    bytes: float | None
    tokens_per_second: float | None


class AblationRows(NamedTuple):
    """What an ablation found."""

    name: str
    rows: tuple[AblationRow, ...]
    """Backend by backend, the variants in the plan's order."""
    doubts: tuple[str, ...]
    """Why figures may not be compared, in words."""
    failed: tuple[str, ...]
    """Runs that failed, with what they said last."""
    files: tuple[Path, ...]
    """The report."""


@documented()
def train_preset(
    preset: str,
    settings: Mapping[str, Any] | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    seed: int | None = None,
    backend: Backend = "auto",
    dtype: DType | None = None,
    again: bool = False,
    verbose: bool = False,
) -> TrainedRun:
    """Train a preset, or go on training it, score it and export it, as `skc train` does; nothing is said by default.

    `settings`: field -> value, `{"train.steps": 200, "model.bank.at": "head"}`. The other arguments are those of the
    verb: `out` names the run folder, a finished one is returned as it is unless `again`. ConfigError, DataError or
    RunError say what cannot be done, NonFiniteError that the loss is not finite, KeyboardInterrupt comes after a
    checkpoint was made.
    """
    require(isinstance(preset, str), f"preset={in_words(preset)}: expected the name of a preset")
    given = {} if settings is None else settings
    fields = isinstance(given, Mapping) and all(isinstance(field, str) for field in given)
    require(fields, f"settings={in_words(given)}: expected a table of field -> value")
    if out is not None:
        check_path("out", out, "a run folder")
    settings = dict(given) | ({} if seed is None else {"seed": seed})
    config = changed_preset(preset, settings, "settings")
    types = get_args(DType)
    require(dtype is None or dtype in types, f"dtype={in_words(dtype)}: expected one of {', '.join(types)}")
    words_of = {f"--{field.replace('_', '-')}": value for field, value in settings.items()}
    options = dataclasses.replace(
        Train.of(config), backend=backend, dtype=dtype, out=None if out is None else os.fspath(out), again=again,
        given=tuple(words_of),
    )  # fmt: skip
    words = [str(word) for option, value in words_of.items() for word in (option, *_words(value))]
    value = train_run(options, Context(_console(verbose), shlex.join(["skc", "train", preset, *words]))).value
    stored, names = value["artifact"], {field.name for field in dataclasses.fields(Score)}
    score = {**stored["score"], "plugins": tuple(stored["score"].get("plugins", ()))}
    return TrainedRun(
        Path(value["run"]), value["step"], Score(**{name: score[name] for name in names if name in score}),
        Path(stored["path"]), stored["bytes"], stored.get("within", True), value["seconds"], value["backend"],
    )  # fmt: skip


@documented()
def ablate_plan(
    plan: str | os.PathLike[str] | Mapping[str, Any],
    *,
    data: str | None = None,
    store: str | os.PathLike[str] = "runs/ablate",
    search: bool = False,
    retry: bool = False,
    study: str | None = None,
    parallel: int = 1,
    devices: Sequence[str] = (),
    threads: int | None = None,
    verbose: bool = False,
) -> AblationRows:
    """Run an ablation, as `skc ablate` does, and return its table: runs that are in `store` are never repeated.

    `plan`: a file, or a table with what such a file says (docs/ablations.md) and a `name`, which is kept as
    ablations/NAME/plan.toml in the store. A run that fails is named in the result, the others go on. ConfigError or
    FileError say what is wrong with the plan, StoreError with the store, SearchError with a search.
    """
    if not isinstance(plan, Mapping):
        check_path("plan", plan, "a file, or a table")
    check_path("store", store, "a folder")
    store = os.fspath(store)
    file = _written(plan, Path(store)) if isinstance(plan, Mapping) else os.fspath(plan)
    options = Ablate(
        file, data=data, store=store, search=search, retry=retry, study=study, parallel=parallel,
        devices=tuple(devices), threads=threads,
    )  # fmt: skip
    return _rows(run_ablation(options, _console(verbose)))


def _words(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _console(verbose: bool) -> Console:
    return Console() if verbose else Console(stream=_Nowhere())


class _Nowhere(io.StringIO):
    """Where lines go that nobody asked for; a run's log.txt has them all the same."""

    def write(self, s: str, /) -> int:
        """Forget the text."""
        return len(s)


def _written(plan: Mapping[str, Any], store: Path) -> str:
    """Write a plan into its folder of a store and return the file's path."""
    name = plan.get("name")
    require(isinstance(name, str), f"plan: name={in_words(name)}: expected text: the plan is kept under it")
    folder = store / "ablations" / named(str(name), "plan: name")
    text = toml_text(plan, "plan")
    make(folder)
    replace_text(folder / "plan.toml", text)
    return str(folder / "plan.toml")


def _rows(ended: AblationEnd) -> AblationRows:
    tables, results = assess(ended.results), ended.results.results
    rows = tuple(row for table in tables for row in _of_backend(table))
    doubts = tuple(dict.fromkeys(doubt for table in tables for doubt in table.doubts))
    failed = tuple(f"{r.variant}, seed {r.seed}, {r.backend}: {r.message}" for r in results if r.status == "failed")
    return AblationRows(ended.results.plan.name, rows, doubts, failed, tuple(ended.files))


def _of_backend(table: Findings) -> list[AblationRow]:
    effects, rows = {effect.variant: effect for effect in table.ends}, []
    for one in table.summaries:
        effect = effects.get(one.variant)
        test = effect and effect.paired
        held = (test.mean, test.low, test.high) if test else (None, None, None)
        verdict = effect.verdict if effect else "held against"
        rows.append(
            AblationRow(one.variant, table.backend, one.n, one.bpb, *held, verdict, one.bytes, one.tokens_per_second)
        )
    return rows
