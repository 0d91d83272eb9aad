"""`skc submit` on the command line: what it writes and prints, exit codes, options without a use. Budget: 4 s."""

import json
from pathlib import Path

import pytest

from core.cli import main
from shared_tests.support.submissions import submitted, write_runs

ABOUT = ["--author", "A", "--github-id", "@a", "--name", "N", "--blurb", "B", "--date", "2026-04-30"]


def test_three_runs_become_a_folder_that_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(run.path) for run in write_runs(tmp_path / "runs")]
    out = tmp_path / "out"
    assert main(["submit", *runs, "--out", str(out), *ABOUT, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["ok"] and value["track"] == "10min_16mb" and value["failed"] == []
    assert [check["verdict"] for check in value["checks"]].count("NOT CHECKED") == 1  # no reference was given
    reference = tmp_path / "reference.json"
    reference.write_text('{"1": 1.0885, "2": 1.0887, "3": 1.0889}')
    check = ["submit", "--check", str(out), "--artifact", value["artifacts"][1], "--against", str(reference)]
    assert main(check) == 0
    table = capsys.readouterr().out
    assert "14 PASS, 0 FAIL, 0 NOT CHECKED" in table and "11 PASS" in table
    submission = Path(value["folder"]) / "submission.json"
    submission.write_text(submission.read_text().replace('"val_bpb": 1.08', '"val_bpb": 1.07'))
    assert main(check) == 1 and " 3 FAIL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected one of --out, --check and --reproduce, given: none"),
        (["--check", "a", "--reproduce", "b"], "given: --check and --reproduce"),
        (["--check", "nowhere"], "nowhere: no such folder"),
        (["--check", ".", "--seed", "1"], "--seed has no use with --check"),
        (["run", "--check", "."], "RUN has no use with --check"),
        (["--check", ".", "--artifact", "none.skc"], "none.skc: no such artifact"),
        (["--check", ".", "--against", "none.json"], "none.json: No such file"),
        (["--out", "x", "--author", "A"], "--github-id, --name, --blurb: missing"),
        (["nowhere", "--out", "x", *ABOUT], "nowhere: does not exist"),
        (["nowhere", "--out", "x", *ABOUT[:-1], "2026-13-01"], "--date 2026-13-01: expected a day"),
        (["nowhere", "--out", "x", *ABOUT[2:], "--author", "A\nB"], "--author: A B; expected one line of at most 200"),
        (["nowhere", "--out", "x", *ABOUT[:6], "--blurb", "b" * 2001], "--blurb: 2,001 letters; expected"),
        (["--reproduce", ".", "--steps", "0"], "--steps 0"),
        (["--reproduce", "."], "has no program to run"),
    ],
)
def test_unusable_input_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1, said


def test_a_folder_of_nothing_fails_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").write_text("nothing")
    assert main(["submit", "--check", str(tmp_path), "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert len(value["checks"]) == 14 and {1, 2, 9} <= set(value["failed"])


def test_a_submission_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = write_runs(tmp_path / "runs")
    submitted(tmp_path, runs)
    given = [str(run.path) for run in runs]
    about = [*ABOUT[:4], "--name", "Small & packed", *ABOUT[6:]]
    assert main(["submit", *given, "--out", str(tmp_path / "out"), *about]) == 2
    assert "is there already; choose another --out, or add --replace" in capsys.readouterr().err
