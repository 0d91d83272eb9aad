"""The typed reader of what a run records: a wrong value is one line that says where and what. Budget: 10 s."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.cli import main
from core.compare.runs import compare, write_comparison
from core.config import to_json
from core.data.bundled import open_data
from core.presets import PRESETS
from core.training.records import METRICS, RunError, read_environment, read_rows
from core.training.run import Run

SCORE = {
    "label": "score", "bpb": 2.5, "byte_rule": "table", "nats": 90.0, "targets": 30, "bytes": 50, "loss": 3.0,
    "documents": 4, "total_documents": 4, "full": True, "error": None, "bpb_raw": None, "windows": "plain seq=64",
    "plugins": [],
}  # fmt: skip
ARTIFACT = {
    "score": SCORE, "gap": 0.0, "bytes": 5000, "allowed": 9000, "within": True, "exact": True,
    "rounding": {"method": "gptq", "documents": 8, "gap": 0.01, "plain": 0.05},
}  # fmt: skip
WHOLE = {
    "step": 4, "train/loss": 3.0, "train/bpb": 2.5, "train/grad_norm": 1.0, "opt/lr": 0.1, "perf/tok_s": 100.0,
    "perf/step_ms": 1.5, "perf/memory": 1e9, "clock/seconds": 2, "clock/stopped": 2.0, "clock/closed": 2.5,
    "progress": 1.0, "clock/train_stop": 1.5, "tokens": 640,
    "progress/each": [0.5, 1.0], "val/bpb": 2.5, "val/error": 0.01, "samples": ["it was"], "final/score": SCORE,
    "final/artifact": ARTIFACT, "clock/scoring": 9.5, "clock/scoring_strict": 9.75,
    "final/plugins": {**SCORE, "error": 0.5, "bpb_raw": 2.0, "plugins": ["temperature"]},
    "twin/frozen": "0" * 64, "twin/text": {"rows": 4, "distinct": 0.5},
    "twin/places": {"own": {"agreement": [1.0, 0.5], "kl": [0.0, 1.5], "cosine": {"blocks.0": -0.5}}},
    "twin/decoding": {"own": {"twin": {"tpf": 1.5}}},
}  # fmt: skip
ENV = {
    "command": "skc train debug", "commit": None, "dirty": False, "step": 0, "backend": "cuda", "device": "CPU",
    "ranks": 1, "dtype": "float32", "notes": ["threads: 1"], "platform": "Linux", "versions": {"numpy": "2.0"},
    "data": {"name": "sample", "sha256": "0" * 64},
}  # fmt: skip


def written(folder: Path, rows: list[Any], env: Any = ENV) -> Path:
    """Write a run folder with such records and return its path."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_json(PRESETS["debug"].config)))
    (folder / "metrics.jsonl").write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    (folder / "env.json").write_text(env if isinstance(env, str) else json.dumps(env))
    return folder


def put(value: dict[str, Any], path: str, new: Any) -> dict[str, Any]:
    """Return a copy of `value` with the field at `path` (names with dots between) replaced; GONE removes it."""
    name, _, rest = path.partition(".")
    changed = dict(value)
    if rest:
        changed[name] = put(value[name], rest, new)
    elif new is GONE:
        del changed[name]
    else:
        changed[name] = new
    return changed


GONE = type("Gone", (), {"__repr__": lambda self: "gone"})()
WRONG: list[tuple[str, Any, str]] = [
    ("step", "4", "a whole number"), ("step", 4.0, "a whole number"), ("step", -1, "a whole number"),
    ("step", True, "a whole number"), ("step", 2**60, "a whole number"), ("step", GONE, "missing"),
    ("train/loss", "3.0", "a finite number"), ("train/loss", None, "a finite number"),
    ("train/loss", [3.0], "a finite number"), ("train/bpb", True, "a finite number"),
    ("train/bpb", 10**400, "a finite number"), ("clock/seconds", -1, "from 0 up"), ("clock/seconds", GONE, "missing"),
    ("tokens", 0.5, "a whole number"), ("clock/train_stop", "1", "from 0 up"), ("progress", 1.5, "a share"),
    ("progress/each", 0.5, "a list"), ("progress/each", ["0.5"], "a share"),
    ("samples", "it was", "a list"), ("samples", [5], "a text"), ("val/error", -0.1, "from 0 up"),
    ("final/score", 5, "an object"), ("final/score.bpb", "2.5", "a finite"), ("final/score.bpb", GONE, "missing"),
    ("final/score.label", "best", "score or estimate"), ("final/score.full", 1, "true or false"),
    ("final/score.error", "none", "from 0 up"), ("final/score.windows", None, "a text"),
    ("final/artifact", SCORE, "missing"), ("final/artifact.score", 5, "an object"),
    ("final/artifact.bytes", 5000.0, "a whole number"), ("final/artifact.within", "yes", "true or false"),
    ("final/artifact.rounding.plain", "0", "a finite number"), ("final/artifact.rounding.method", "dice", "gptq"),
    ("twin/text.distinct", 2, "a share"), ("twin/places.own.agreement", [2], "a share"),
    ("twin/places.own", 5, "an object"), ("twin/decoding.own.twin", {"tpf": "1"}, "a finite number"),
    ("final/artifact.score.targets", 0, "a whole number"), ("val/bbp", 2.0, "unknown name"), ("\x1b[31m", 1, "unknown"),
]  # fmt: skip


def test_a_whole_line_is_read_as_it_is(tmp_path: Path) -> None:
    run = written(tmp_path / "run", [WHOLE, {"step": 4}], {**ENV, "earlier": [ENV], "host": "node"})
    assert WHOLE.keys() == {"step", *METRICS}, "a name has no example here"
    assert Run.open(run).metrics() == [WHOLE, {"step": 4}]
    assert Run.open(run).environment() == {**ENV, "earlier": [ENV], "host": "node"}


@pytest.mark.parametrize("field, value, expected", WRONG, ids=lambda value: ascii(value)[:30])
def test_a_wrong_value_is_named(field: str, value: Any, expected: str, tmp_path: Path) -> None:
    path = written(tmp_path / "run", [WHOLE, put(WHOLE, field, value)]) / "metrics.jsonl"
    with pytest.raises(RunError) as caught:
        read_rows(path)
    said = str(caught.value)
    assert said.startswith(f"{path}:2") and expected in said, said
    assert field.startswith("\x1b") or field.rpartition(".")[2] in said or (value is SCORE), said
    assert said.isprintable() and len(said) < len(str(path)) + 200


@pytest.mark.parametrize(
    "line", ["5", '"text"', "[1]", "{", "", "NaN", '{"step": NaN}', '{"step": 1, "val/bpb": 1e400}']
)
def test_a_line_of_another_kind_is_named(line: str, tmp_path: Path) -> None:
    path = written(tmp_path / "run", [WHOLE, line]) / "metrics.jsonl"
    with pytest.raises(RunError, match="metrics.jsonl:2"):
        read_rows(path)


@pytest.mark.parametrize(
    "field, value",
    [
        ("earlier", 5), ("earlier", [5]), ("earlier", [{"ranks": "1"}]), ("ranks", 1e400), ("ranks", 0),
        ("ranks", "two"), ("notes", "threads"), ("notes", [1]), ("versions", []), ("versions", {"numpy": 2}),
        ("data", 5), ("data", {"name": ["a"]}), ("commit", 5), ("dirty", "no"), ("device", ["CPU"]), ("step", None),
        ("other", [1]),
    ],
    ids=lambda value: ascii(value)[:30],
)  # fmt: skip
def test_a_wrong_environment_is_named(field: str, value: Any, tmp_path: Path) -> None:
    text = json.dumps({**ENV, field: value}).replace("Infinity", "1e400")
    path = written(tmp_path / "run", [WHOLE], text) / "env.json"
    with pytest.raises(RunError) as caught:
        read_environment(path)
    assert str(caught.value).startswith(f"{path}: ") and field in str(caught.value), caught.value


def test_a_picture_shows_any_text(tmp_path: Path) -> None:
    """A formula that is none, and a text of a page."""
    names = [r"$\frac{$", "x" * 60_000]
    runs = [str(written(tmp_path / f"{i}", [WHOLE], {**ENV, "device": name})) for i, name in enumerate(names)]
    found, opened = compare(runs)
    assert all(path.stat().st_size > 500 for path in write_comparison(found, opened, tmp_path / "out"))


@pytest.mark.parametrize("name", ["report.md", "artifact.skc", "state/score.ledger"])
def test_a_folder_in_the_way_is_found_before_the_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path / "run", [], {})
    (run / name).mkdir(parents=True)
    assert main(["train", "debug", "--out", str(run)]) == 2
    out, err = capsys.readouterr()
    assert f"{run / name}: is a folder" in err and "step" not in out, err


@pytest.mark.parametrize("verb", ["compare", "track", "train"])
def test_verbs_say_it_in_one_line(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training does before its first step: a run that trained for hours must not end with it."""
    run = written(tmp_path / "run", [put(WHOLE, "final/score", 5)], put(ENV, "data", GONE))
    other = written(tmp_path / "other", [WHOLE])
    if verb == "train":
        open_data("sample")  # its first use says that it is prepared
        capsys.readouterr()
        (run / "metrics.jsonl").write_text("")
        (run / "env.json").write_text(json.dumps({"earlier": 5}))
    command = {"compare": [str(other), str(run)], "track": [str(run)], "train": ["debug", "--out", str(run)]}[verb]
    assert main([verb, *command]) == 2
    out, err = capsys.readouterr()
    expected = f"{run / 'env.json'}: " if verb == "train" else f"{run / 'metrics.jsonl'}:1: final/score: 5, expected"
    assert expected in err and err.count("\n") == 1 and "step" not in out, err
