"""From a preset to a folder that passes: packed programs run, are submitted, checked, and run again. Budget: 12 s."""

import json
from pathlib import Path

import pytest

from core.cli import main
from core.submission.pack import Form, pack_program
from shared_tests.support import packed
from shared_tests.support.killed import small_data

ABOUT = ["--author", "A", "--github-id", "a", "--name", "Small", "--blurb", "B"]
ELSEWHERE = {7: "NOT CHECKED", 8: "FAIL", 11: "NOT CHECKED"}
"""What a run on a CPU, over a text that is not the published one, cannot pass."""


def sent(place: Path, form: Form, seeds: tuple[int, ...], capsys: pytest.CaptureFixture[str]) -> Path:
    """Pack, run, submit and check; return the place of the folder."""
    data = small_data(place / "text", 60)
    config = packed.tiny("debug", data, **{"train.steps": 6})
    program = place / "train_gpt.py"
    program.write_bytes(pack_program(config, "cuda", form, dtype="float32", micro_tokens=None))
    for seed in seeds:
        done = packed.start(program, place, DATA_PATH=data, SEED=str(seed), RUN_ID=f"run{seed}")
        assert done.returncode == 0, done.stderr[-3000:]
    runs = [str(place / "runs" / f"run{seed}") for seed in seeds]
    for run in runs if len(seeds) > 1 else ():
        main(["audit", run, "--data", data, "--program", str(program), "--seeds", *runs, "--json"])
        found = json.loads(capsys.readouterr().out)["findings"]
        assert [(f["rule"], f["verdict"]) for f in found if f["rule"] in ("D1", "D16")] == [
            ("D1", "PASS"), ("D16", "PASS"),
        ], found  # fmt: skip
    assert main(["submit", *runs, "--out", str(place / "out"), *ABOUT, "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    verdicts = {check["number"]: check["verdict"] for check in value["checks"]}
    alone = {10: "NOT CHECKED"} if len(seeds) == 1 else {}
    assert verdicts == {**dict.fromkeys(range(1, 15), "PASS"), **ELSEWHERE, **alone}, value["checks"]
    assert value["track"] == "non_record_16mb" and not any("checkout" in reason for reason in value["why"])
    assert (Path(value["folder"]) / "train_gpt.py").read_bytes() == program.read_bytes()
    assert "numpy==" in (Path(value["folder"]) / "requirements.txt").read_text()
    claims = json.loads((Path(value["folder"]) / "submission.json").read_text())["compliance"]
    assert claims["three_seeds"] == (len(seeds) > 1)
    words = "".join(file.read_text() for file in Path(value["folder"]).iterdir() if file.suffix in (".md", ".log"))
    assert str(place) not in words and data not in words
    return place / "out"


def test_a_packed_run_is_sent_and_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = sent(tmp_path, "text", (7,), capsys)
    again = ["submit", "--reproduce", str(out), "--steps", "4", "--data", str(tmp_path / "text" / "data"), "--json"]
    assert main(again) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["verdict"] == "PASS" and [row["step"] for row in value["rows"]] == [1, 2, 3, 4], value
    log = next(out.glob("records/*/*/train_seed7.log"))
    text = log.read_text()
    line = next(line for line in text.split("\n") if line.startswith("step:3/6"))
    digit = line.split("train_loss:")[1].split()[0]
    log.write_text(text.replace(digit, f"{float(digit) + 2e-6:.6f}"))
    assert main(again) == 1 and json.loads(capsys.readouterr().out)["verdict"] == "FAIL"


@pytest.mark.long
@pytest.mark.parametrize("form", ["text", "zip"])
def test_three_packed_runs_are_sent(form: Form, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = sent(tmp_path, form, (1, 2, 3), capsys)
    again = [
        "submit",
        "--reproduce",
        str(out),
        "--seed",
        "2",
        "--steps",
        "6",
        "--data",
        str(tmp_path / "text" / "data"),
    ]
    assert main(again) == 0 and "PASS: seed 2: 6 losses" in capsys.readouterr().out
