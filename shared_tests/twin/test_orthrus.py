"""scripts/orthrus measures what it is asked for, goes on behind its last line, refuses in one line. Budget: 10 s."""

import json
import runpy
import sys
from pathlib import Path

import pytest

import skc
from shared_tests.support.distilling import data_of, small_artifact

SCRIPT = Path(skc.__file__).parent / "scripts" / "orthrus"
TINY = (
    "--steps", "2", "--seq", "32", "--rows", "3", "--anchors", "2", "--batch", "2", "--texts", "2", "--tokens", "6",
    "--block", "4", "--seeds", "5",
)  # fmt: skip


def run(*given: str) -> int:
    """Run the script in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [str(SCRIPT), *given])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return int(stop.value.code or 0)


@pytest.mark.pair
def test_it_measures_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, data, out = small_artifact(tmp_path / "model"), data_of(tmp_path), tmp_path / "found.jsonl"
    base = (artifact, "--data", data, "--out", str(out), *TINY)
    assert run(*base, "--list") == 0
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    grid = [name for name in names if name.startswith("grid/")]
    assert len(grid) == 2 * 3 * 2 and "test/1/first_order" in names and "test/3b/causal" in names
    assert run(*base, "--only", "test/1/*", "grid/causal/own/exact/5") == 0
    first = out.read_text()
    assert run(*base, "--only", "test/1/*", "test/consensus") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert out.read_text().startswith(first)
    assert [row["name"] for row in rows] == [
        "test/1/causal", "test/1/end", "test/1/first_order", "grid/causal/own/exact/5", "test/consensus",
    ]  # fmt: skip
    assert all(len(value) == 4 for row in rows[:3] for value in row["cosine"]["own"].values())
    assert rows[3]["drafts"]["own"]["twin"]["same"] == 2 and rows[3]["places"]["own"]["agreement"][0] == 1
    assert all(one["same"] == one["texts"] for one in rows[4]["drafts"].values())
    assert "6 of 6 texts are the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "name a run or an artifact"),
        (("nowhere",), "--out FILE.jsonl: where"),
        (("nowhere", "--out", "x", "--block", "1"), "distill.twin.block=1"),
        (("nowhere", "--out", "x"), "nowhere: no such run folder or artifact"),
    ],
)
def test_bad_values_are_refused(given: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*given) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
