"""What a run's own records may hold, metrics.jsonl and env.json, by name: one typed reader for every verb.

People edit these files and copy them from elsewhere, so that a value of another type than the writer's is one line that
names file, line and field, before anything is computed of it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checks import in_words
from core.files import FileError, parse_json, read_json, read_text

MAX_ROWS = 1 << 19
"""Lines of metrics.jsonl; MAX_TEXT bytes of real ones are fewer."""


class RunError(ValueError):
    """A run folder cannot be used: the message names the file and what is wrong with it."""


@contextmanager
def of_a_run() -> Iterator[None]:
    """Let what is wrong with a file of the block be wrong with the run."""
    try:
        yield
    except FileError as error:
        raise RunError(str(error)) from error


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; RunError, OSError."""
    with of_a_run():
        value = read_json(path)
    _require(type(value) is dict, str(path), value, "an object")
    return value


def read_environment(path: Path) -> dict[str, Any]:
    """Return what env.json says, nothing where there is none; RunError, OSError."""
    if not path.exists():
        return {}
    value = read_object(path)
    check_value(value, ENVIRONMENT, str(path))
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; one that a kill cut short is left out; RunError names line and field, OSError.

    A line may be without any name but `step`; one of a loss also says at which time of training it was.
    """
    if not path.exists():
        return []
    with of_a_run():
        *lines, _ = read_text(path).split("\n")
        if len(lines) > MAX_ROWS:
            raise RunError(f"{path}: {len(lines):,} lines, expected at most {MAX_ROWS:,}: this is not a run's")
    rows = []
    for number, line in enumerate(lines, 1):  # each is judged before the next is parsed
        with of_a_run():
            row = parse_json(f"{path}:{number}", line)
        check_value(row, ROW, f"{path}:{number}")
        if "train/loss" in row and "clock/seconds" not in row:
            raise RunError(f"{path}:{number}: clock/seconds: missing beside train/loss; mend or remove the line")
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Number:
    """A finite number, or a whole one, from `low` to `high`."""

    what: str = "a finite number"
    low: float = -1e15
    high: float = 1e15
    whole: bool = False


@dataclass(frozen=True)
class Simple:
    """A text, a truth value, or one of some texts."""

    what: str
    kind: type
    among: tuple[str, ...] = ()
    most: int = 1 << 16
    """Letters of a text."""


@dataclass(frozen=True)
class Maybe:
    """A value, or null."""

    value: "Kind"


@dataclass(frozen=True)
class Many:
    """A list."""

    value: "Kind"


@dataclass(frozen=True)
class Fields:
    """An object: what it must hold, what it may hold, and what others may be (None: there are no others)."""

    needed: Mapping[str, "Kind"]
    may: Mapping[str, "Kind"]
    others: "Kind | None" = None


Kind = Number | Simple | Maybe | Many | Fields

COUNT = Number("a whole number from 0 up", 0, 2**53, whole=True)
POSITIVE = Number("a finite number from 0 up", 0.0)
SHARE = Number("a share from 0 to 1", 0.0, 1.0)
NUMBER = Number()
TEXT = Simple("a text", str)
FLAG = Simple("true or false", bool)
SCORE = Fields(
    {
        "label": Simple("score or estimate", str, ("score", "estimate")), "bpb": NUMBER,
        "byte_rule": Simple("table or raw", str, ("table", "raw")), "nats": NUMBER,
        "targets": Number("a whole number from 1 up", 1, 2**53, whole=True),
        "bytes": Number("a whole number from 1 up", 1, 2**53, whole=True), "loss": NUMBER, "documents": COUNT,
        "total_documents": COUNT, "full": FLAG, "error": Maybe(POSITIVE), "bpb_raw": Maybe(NUMBER), "windows": TEXT,
    },
    {"plugins": Many(TEXT)},
)  # fmt: skip
"""A core.scoring.score.Score."""
ARTIFACT = Fields({"score": SCORE, "bytes": COUNT}, {"gap": NUMBER, "allowed": COUNT, "within": FLAG, "exact": FLAG})
METRICS: dict[str, tuple[Kind, str]] = {
    "train/loss": (NUMBER, "mean nats per target since the last line"),
    "train/bpb": (NUMBER, "estimate of bits per byte from train/loss and the bytes per token of the training text"),
    "train/grad_norm": (POSITIVE, "mean global gradient norm before clipping since the last line"),
    "opt/lr": (POSITIVE, "learning rate of the matrix group"),
    "perf/tok_s": (POSITIVE, "tokens per second of training time since the last line"),
    "perf/step_ms": (POSITIVE, "training time per step since the last line"),
    "clock/seconds": (
        POSITIVE, "training time since step 0: no evaluation, samples, checkpoints or compilation"
    ),
    "clock/stopped": (POSITIVE, "training time when the last step was done"),
    "clock/closed": (
        POSITIVE, "the same when the training text was closed; the last checkpoint, written in between, counts"
    ),
    "progress": (SHARE, "share of the run that the schedule saw at the last step"),
    "progress/each": (Many(SHARE), "the same for every step since the last line (runs with train.seconds only)"),
    "val/bpb": (NUMBER, "validation estimate made during training"),
    "val/error": (POSITIVE, "its standard error"),
    "samples": (Many(TEXT), "texts that the model wrote"),
    "final/score": (SCORE, "the Score of the weights in memory"),
    "final/artifact": (
        ARTIFACT, "the Score of the weights reloaded from the artifact, its bytes and the gap"
    ),
    "final/plugins": (SCORE, "the Score of the artifact with the plug-ins of eval.plugins"),
}  # fmt: skip
"""Every name that metrics.jsonl may hold beside `step`, the number of steps done: what it is, and what it means."""
ROW = Fields({"step": COUNT}, {name: kind for name, (kind, _) in METRICS.items()})
SCALAR = Simple("a text, a number, true, false or null", object)
_START: dict[str, Kind] = {
    "command": TEXT, "commit": Maybe(TEXT), "dirty": Maybe(FLAG), "step": COUNT, "backend": TEXT, "device": TEXT,
    "ranks": Number("a whole number from 1 to 65536", 1, 2**16, whole=True), "dtype": TEXT, "notes": Many(TEXT),
    "platform": TEXT, "versions": Fields({}, {}, TEXT), "data": Fields({}, {}, SCALAR),
    "imported": Fields({}, {}, SCALAR),
}  # fmt: skip
ENVIRONMENT = Fields({}, {**_START, "earlier": Many(Fields({}, _START, SCALAR))}, SCALAR)
"""What env.json says of a start of the run, and of those before it."""


def check_value(value: Any, kind: Kind, where: str) -> None:
    """Raise RunError unless `value` is of a kind: it says where, what was given and what was expected."""
    if isinstance(kind, Maybe):
        if value is not None:
            check_value(value, kind.value, where)
    elif isinstance(kind, Many):
        _require(type(value) is list, where, value, "a list")
        for i, one in enumerate(value):
            check_value(one, kind.value, f"{where}[{i}]")
    elif isinstance(kind, Fields):
        _require(type(value) is dict, where, value, "an object")
        _check_fields(value, kind, where)
    elif isinstance(kind, Number):
        numbers = (int,) if kind.whole else (int, float)
        good = type(value) in numbers and kind.low <= value <= kind.high  # NaN is in no range
        _require(good, where, value, kind.what)
    elif kind is SCALAR:
        _require(value is None or type(value) in (str, int, float, bool), where, value, kind.what)
    else:
        good = type(value) is kind.kind and (not kind.among or value in kind.among)
        if isinstance(value, str) and len(value) > kind.most:
            raise RunError(f"{where}: {len(value):,} letters, expected at most {kind.most:,}; mend or remove it")
        _require(good, where, value, kind.what)


def _check_fields(value: dict[str, Any], kind: Fields, where: str) -> None:
    for name in kind.needed:
        if name not in value:
            raise RunError(f"{where}: {name}: missing; the file is damaged, or of another version")
    for name, one in value.items():
        expected = kind.needed.get(name) or kind.may.get(name) or kind.others
        if expected is None:
            raise RunError(f"{where}: {in_words(name)}: unknown name; the file is damaged, or of another version")
        check_value(one, expected, f"{where}: {name if len(name) < 40 and name.isprintable() else in_words(name)}")


def _require(good: bool, where: str, value: Any, what: str) -> None:
    if not good:
        raise RunError(f"{where}: {in_words(value)}, expected {what}; mend or remove it")
