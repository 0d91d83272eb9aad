"""`skc compare`: figures, settings, curves and doubts of several runs. Budget: 20 s."""

import json
from pathlib import Path

import pytest

from core.cli import main
from core.compare.runs import compare, lines, write_comparison
from core.training.run import Run, RunError
from shared_tests.support.command_line import SHORT, call


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three short runs: a base, the same with another seed, and a narrower model."""
    folder = tmp_path_factory.mktemp("compare")
    changes = {"base": [], "seed": ["--seed", "7"], "narrow": ["--model.mlp.hidden", "32", "--train.lr_matrix", "1e-4"]}
    for name, extra in changes.items():
        assert main(["train", "debug", *SHORT, "--train.log_every", "1", *extra, "--out", str(folder / name)]) == 0
    return [folder / name for name in changes]


def test_figures_are_those_of_the_runs(runs: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    value = call(capsys, "compare", *map(str, runs), "--out", str(tmp_path / "out"))
    for row, path in zip(value["rows"], runs, strict=True):
        run = Run.open(path)
        assert row["bpb"] == run.last("final/score")["bpb"] and row["steps"] == 6
        assert row["artifact_bytes"] == run.artifact_path.stat().st_size
        assert row["tokens_per_second"] == pytest.approx(6 * 4 * 64 / run.last("clock/seconds"))
    assert value["settings"][str(runs[1])] == ["seed: 1337 -> 7"]
    assert [line.split(":")[0] for line in value["settings"][str(runs[2])]] == ["model.mlp.hidden", "train.lr_matrix"]
    assert value["doubts"] == []
    for name in ("compare.md", "compare.png"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "seed: 1337 -> 7" in text and f"{value['rows'][1]['bpb'] - value['rows'][0]['bpb']:+.4f}" in text


def test_the_largest_difference_is_that_over_common_steps(runs: list[Path]) -> None:
    comparison, opened = compare([str(path) for path in runs])
    losses = [{row["step"]: row["train/loss"] for row in run.metrics() if "train/loss" in row} for run in opened]
    for path, loss in zip(runs[1:], losses[1:], strict=True):
        assert loss.keys() == losses[0].keys() == set(range(1, 7))
        assert comparison.pairs[str(path)].curves.largest == max(abs(loss[step] - losses[0][step]) for step in loss)


def test_what_may_not_be_compared_is_said(runs: list[Path], tmp_path: Path) -> None:
    import shutil

    raw, unfinished = tmp_path / "raw", tmp_path / "unfinished"
    shutil.copytree(runs[0], raw)
    shutil.copytree(runs[0], unfinished)
    rows = [json.loads(line) for line in (raw / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "final/score" in row:
            row["final/score"] |= {"byte_rule": "raw", "targets": 5, "label": "score"}
    (raw / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (unfinished / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows if "final/score" not in r))
    env = json.loads((raw / "env.json").read_text())
    (raw / "env.json").write_text(json.dumps({**env, "data": {"name": "other", "sha256": "0"}}))
    comparison, opened = compare([str(runs[0]), str(raw), str(unfinished)])
    words = " ".join(comparison.doubts)
    for expected in ("byte rules: raw, table", "numbers of scored tokens", "kinds of figure", "different data"):
        assert expected in words
    assert f"not finished: {unfinished}" in words and sum("careful" in line for line in lines(comparison)) == 5
    write_comparison(comparison, opened, tmp_path / "out")


@pytest.mark.parametrize("given, message", [(1, "expected two or more"), (2, "named twice")])
def test_too_few_or_the_same_runs_are_refused(given: int, message: str, runs: list[Path]) -> None:
    with pytest.raises(RunError, match=message):
        compare([str(runs[0])] * given)
    assert main(["compare", *[str(runs[0])] * given]) == 2
