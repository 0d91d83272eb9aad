"""`skc runs`: what the list says of every kind of folder, what stands on one board, what is removed. Budget: 5 s."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import skc
from core.runs import row as row_module
from core.runs.listing import in_order, list_runs
from core.runs.row import run_row
from core.training import records
from core.training.records import RunError, read_last_rows, read_rows
from core.training.writer import hold
from shared_tests.support.command_line import Capture, call, refuse
from shared_tests.support.hostile import KINDS
from shared_tests.support.listed_runs import run, save, store

HALF_SECONDS = 4 * 64 / 0.5
"""Tokens per second of a run of `debug` whose steps take half a second."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a run in every state, one of them three folders deep, and a store."""
    runs = tmp_path / "runs"
    run(runs / "good", 2.0, seed=5)
    run(runs / "better" / "deep" / "down", 1.5, seed=7, model__dim=64)
    save(run(runs / "stopped", lines=9), 6)
    run(runs / "young")
    run(runs / "broken").metrics_path.write_text('{"step": "one"}\n')
    store(runs / "store")
    (runs / "notes").mkdir()
    (runs / "link").symlink_to(runs / "good")
    return runs


def by_name(rows: list[skc.RunRow]) -> dict[str, skc.RunRow]:
    """Return rows by the last part of their paths."""
    return {Path(row.path).name: row for row in rows}


def test_every_folder_is_told_by_its_state(place: Path) -> None:
    rows = by_name(skc.runs(place))
    assert {name: row.state for name, row in rows.items()} == {
        "good": "finished", "down": "finished", "stopped": "resumable", "young": "begun", "broken": "damaged",
        "rates": "finished",
    }  # fmt: skip
    good = rows["good"]
    assert (good.bpb, good.label, good.seed, good.backend, good.preset) == (2.0, "score", 5, "cuda", "debug")
    assert (good.bytes, good.total, good.within, good.step, good.steps) == (1005, 231_005, True, 3, 40)
    assert good.tokens_per_second == pytest.approx(HALF_SECONDS) and good.parameters == 32_900
    assert rows["stopped"].step == 6, "what it goes on from, not the last line"
    assert "broken/metrics.jsonl: line 1 from its end: step" in str(rows["broken"].problem)
    rates = rows["rates"]
    assert rates.kind == "ablation" and (rates.runs, rates.done, rates.variant) == (4, 4, "plain")
    members = [row for row in skc.runs(place, members=True) if row.path not in {r.path for r in rows.values()}]
    assert [row.variant for row in members] == 4 * ["rates plain"] and rates.bpb == min(r.bpb or 9 for r in members)


def test_a_run_that_a_process_holds_is_running(place: Path) -> None:
    with hold(place / "stopped"):
        row = by_name(skc.runs(place))["stopped"]
        assert (row.state, row.step) == ("running", 9)
    assert by_name(skc.runs(place))["stopped"].state == "resumable"


def test_the_verb_sorts_filters_and_shows(place: Path, capsys: Capture) -> None:
    value = call(capsys, "runs", str(place), "--sort", "score")
    names = [Path(row["path"]).name for row in value["rows"]]
    assert names[:2] == ["down", "rates"] and names[-3:] == ["broken", "stopped", "young"], "without a score: last"
    back = call(capsys, "runs", str(place), "--sort", "score", "--reverse")
    assert [Path(row["path"]).name for row in back["rows"]] == [*names[2::-1], *names[3:]]
    only = call(capsys, "runs", str(place), "--state", "finished", "--preset", "debug", "--backend", "mlx")
    assert only["rows"] == []
    from core.cli import main

    assert main(["runs", str(place)]) == 0
    said = capsys.readouterr().out
    assert "resumable at step 6" in said and "finished, 4 of 4 runs" in said and "broken: damaged: " in said
    assert len(said.splitlines()) == 8


def test_orders_are_those_of_their_names(tmp_path: Path) -> None:
    for i, name in enumerate("cab"):
        made = run(tmp_path / name, 2.0 + i, seed=i, lines=2 + i, export__code_bytes=1000 * (2 - i))
        rows = [line for line in made.metrics_path.read_text().splitlines() if line]
        made.metrics_path.write_text(
            "\n".join(rows).replace('"clock/seconds": 1.0', f'"clock/seconds": {1.0 + i}') + "\n"
        )
        os.utime(made.metrics_path, (100 + i, 100 + i))
    rows = list_runs(tmp_path)
    orders = {
        order: "".join(Path(r.path).name for r in in_order(rows, order)) for order in ("age", "score", "bytes", "name")
    }
    assert orders == {"age": "bac", "score": "cab", "bytes": "bac", "name": "abc"}


def test_only_comparable_scores_stand_on_one_board(tmp_path: Path, capsys: Capture) -> None:
    """Another text, byte rule, window, number of documents, label or budget: another board; too large: none."""
    runs = tmp_path / "runs"
    run(runs / "second", 2.0)
    run(runs / "first", 1.9)
    odd: dict[str, Any] = {
        "text": {"text": {"sha256": "b" * 64}},
        "rule": {"score": {"byte_rule": "raw"}},
        "windows": {"score": {"windows": "stateful"}},
        "documents": {"score": {"documents": 8}},
        "targets": {"score": {"targets": 8}},
        "label": {"score": {"label": "estimate", "error": 0.1}},
        "budget": {"export__budget": 15_000_000},
    }
    for name, changes in odd.items():
        run(runs / name, 1.0, **changes)
    run(runs / "large", 0.5, export__budget=1000, export__code_bytes=10)
    run(runs / "nameless", 0.5).env_path.unlink()
    value = call(capsys, "runs", str(runs), "--board")
    boards = [[Path(row["path"]).name for row in board["rows"]] for board in value["boards"]]
    assert ["first", "second"] in boards and sorted(map(len, boards)) == 7 * [1] + [2]
    assert [board["budget"] for board in value["boards"]] == [15_000_000] + 7 * [16_000_000]
    assert {Path(row["path"]).name: row["why"].split()[0] for row in value["left_out"]} == {
        "large": "over", "nameless": "does",
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl", "env.json", "lock", "state/checkpoint.safetensors"])
def test_nothing_that_lies_in_a_run_breaks_the_list(file: str, kind: str, tmp_path: Path) -> None:
    made = run(tmp_path / "runs" / "odd")
    save(made, 2)
    (made.path / "lock").touch()
    run(tmp_path / "runs" / "good", 2.0)
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    KINDS[kind](made.path / file, strangers)
    rows = by_name(list_runs(tmp_path / "runs"))
    assert rows["good"].state == "finished"
    if "odd" in rows:
        odd = rows["odd"]
        assert (odd.state == "damaged") == bool(odd.problem) and "\n" not in str(odd.problem)
        json.dumps(odd.to_json(), allow_nan=False)
    else:
        assert (file, kind) == ("config.json", "gone")


def test_the_end_of_a_long_record_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its last lines a run says what it does by all of them, and damage before them is not looked for."""
    made = run(tmp_path / "long", 2.0, lines=2000)
    whole = read_rows(made.metrics_path)
    for block in (1 << 14, 64, 7):
        monkeypatch.setattr(records, "BLOCK", block)
        assert read_last_rows(made.metrics_path) == whole[-4:]
    text = made.metrics_path.read_text()
    made.metrics_path.write_text("rubbish\n" + text + '{"step": 2000, "trai')
    assert read_last_rows(made.metrics_path) == whole[-4:], "a line that was cut short is left out"
    for few in (text.splitlines()[0] + "\n", '{"step": 1}\n{"step": 1, "samples": ["x"]}\n', "", '{"step": 1'):
        made.metrics_path.write_text(few)
        assert read_last_rows(made.metrics_path) == read_rows(made.metrics_path)


def test_settings_are_checked_once_for_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        run(tmp_path / str(seed), 2.0, seed=seed)
    row_module._checked.cache_clear()
    assert sorted(row.seed or 0 for row in list_runs(tmp_path)) == list(range(5))
    assert row_module._checked.cache_info().misses == 1
    config = json.loads((tmp_path / "3" / "config.json").read_text())
    (tmp_path / "3" / "config.json").write_text(json.dumps({**config, "seed": "three"}))
    assert "seed: expected a whole number" in str(run_row(tmp_path / "3").problem)


def test_rm_removes_what_it_names_and_nothing_else(place: Path, capsys: Capture) -> None:
    (place / "good" / "out").symlink_to(place / "notes")
    (place / "notes" / "mine.txt").write_text("mine")
    value = call(capsys, "runs", "rm", str(place / "good"), str(place / "broken"), str(place / "store"), "--yes")
    assert value["removed"] == [str(place / name) for name in ("good", "broken", "store")]
    assert sorted(path.name for path in place.iterdir()) == [
        "better",
        "link",
        "notes",
        "rates.toml",
        "stopped",
        "young",
    ]
    assert (place / "notes" / "mine.txt").read_text() == "mine"


def make_strange(place: Path) -> list[str]:
    """A folder of settings of another program."""
    (place / "notes" / "config.json").write_text('{"architectures": ["Qwen3"]}')
    (place / "notes" / "model.safetensors").touch()
    return ["notes"]


def make_mixed(place: Path) -> list[str]:
    (place / "store" / "thesis.tex").touch()
    return ["store"]


def make_inner(place: Path) -> list[str]:
    """A run in the folder of another."""
    run(place / "good" / "second", 2.0)
    return ["good"]


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a link": (lambda p: ["link"], "is a link"),
    "nothing": (lambda p: ["nothing"], "does not exist"),
    "a file": (lambda p: ["good/config.json"], "is a file"),
    "a folder of runs": (lambda p: ["."], "is not a run (it has no config.json) and no store"),
    "other folders": (lambda p: ["notes"], "is not a run"),
    "another program's": (make_strange, "holds model.safetensors, which is no run's"),
    "a store and more": (make_mixed, "holds thesis.tex, which is no store's"),
    "an ablation": (lambda p: ["store/ablations/rates"], "is not a run"),
    "a run in a run": (make_inner, "second: is a run inside"),
    "one twice": (lambda p: ["good", "good/"], "is named twice"),
    "one in another": (lambda p: ["store", f"store/runs/{os.listdir(p / 'store' / 'runs')[0]}/run"], "lies in another"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rm_checks_all_before_it_removes_one(case: str, place: Path, capsys: Capture) -> None:
    make, words = REFUSED[case]
    names = make(place)
    before = sorted(place.rglob("*"))
    said = refuse(capsys, "runs", "rm", str(place / "young"), *(str(place / name) for name in names), "--yes")
    assert words in said and sorted(place.rglob("*")) == before


def test_rm_leaves_a_run_that_a_process_holds(place: Path, capsys: Capture) -> None:
    """Its own lock, that of the store around it, and both where the whole store is named."""
    inner = place / "store" / "runs" / os.listdir(place / "store" / "runs")[0]
    for held, named in ((place / "good", place / "good"), (inner, inner / "run"), (inner, place / "store"),
                        (inner / "run", place / "store")):  # fmt: skip
        with hold(held) if (held / "config.json").exists() else hold(held, "job.json"):
            said = refuse(capsys, "runs", "rm", str(place / "young"), str(named), "--yes")
        assert "a process works in it" in said and (place / "young").exists() and named.exists()


def test_rm_leaves_the_folder_that_it_runs_in(place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "good" / "audit").mkdir()
    for where, names in (("good", (".", str(place / "good"))), ("good/audit", ("..",)), ("store/runs", ("..",))):
        monkeypatch.chdir(place / where)
        before = sorted(place.rglob("*"))
        for name in names:
            assert "is the folder that this command runs in" in refuse(capsys, "runs", "rm", name, "--yes")
        assert sorted(place.rglob("*")) == before
    monkeypatch.chdir(place)
    with hold(place / "good" / "audit", "audit.json"):
        assert "a process works in it" in refuse(capsys, "runs", "rm", "good", "--yes")
    assert call(capsys, "runs", "rm", "good", "--yes")["removed"] == ["good"]


def test_rm_asks_and_takes_only_yes(place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.cli import main

    path = str(place / "good")
    assert "no terminal: add --yes" in refuse_after_count(capsys, path)

    class Answer:
        def __init__(self, text: str) -> None:
            self.readline = lambda: text
            self.isatty = lambda: True

    (place / "good" / "notes.md").write_text("mine")
    for text, there in (("n\n", True), ("", True), ("\n", True), ("yes please\n", True), ("y\n", False)):
        monkeypatch.setattr("sys.stdin", Answer(text))
        assert main(["runs", "rm", path]) == 0
        said = capsys.readouterr().out
        assert "bytes, with what training did not write: notes.md\n" in said and "for good? [y/N]" in said
        assert ("nothing was removed" in said) == there == os.path.exists(path)


def refuse_after_count(capsys: Capture, path: str) -> str:
    """Return the line in which `skc runs rm` refuses to remove without a question."""
    from core.cli import main

    assert main(["runs", "rm", path]) == 2
    return capsys.readouterr().err


def test_bad_words_are_one_line(tmp_path: Path, capsys: Capture) -> None:
    assert "does not exist, expected a folder of runs" in refuse(capsys, "runs", str(tmp_path / "none"))
    assert "name one or more run folders" in refuse(capsys, "runs", "rm", "--yes")
    with pytest.raises(RunError, match="does not exist"):
        skc.runs(tmp_path / "none")
