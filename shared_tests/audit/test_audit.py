"""`skc audit` on a trained run: every rule has a finding, claims are held to what is found again. Budget: 45 s.

The zoo of cheats is in test_zoo.py, the flip test by itself in test_flips.py; here are claims of runs, a kill, and bad
input.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from core.audit import auditor
from core.audit.code import packed_code
from core.audit.rules import RULES
from core.cli import main
from core.data.dataset import open_dataset
from core.engine.loading import load_engine
from core.export.artifact import read_artifact
from core.files import locked
from core.scoring.evaluation import Evaluation
from core.scoring.key import evaluation_key
from core.scoring.ledger import Ledger
from core.scoring.score import score
from core.training.run import Run
from shared_tests.support import zoo_data

Capture = pytest.CaptureFixture[str]
SHORT = (
    "--train.steps", "6", "--train.eval_every", "None", "--train.sample_every", "None", "--train.save_every", "None",
    "--eval.documents", "None", "--eval.batch", "4", "--backend", "mlx",
)  # fmt: skip
MLX = ("--backend", "mlx")  # a process with torch takes twice as long; test_zoo.py audits on both backends


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Find the watch's programs and no others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", zoo_data.programs(tmp_path_factory.mktemp("path") / "bin"))
        yield


@pytest.fixture(scope="module")
def trained(path: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run on a small text."""
    folder = tmp_path_factory.mktemp("audit")
    data = zoo_data.write_data(folder, zoo_data.novels("train", 30, 1500), zoo_data.novels("val", 8, 1200))
    assert main(["train", "debug", *SHORT, "--data.path", data, "--out", str(folder / "run")]) == 0
    return folder / "run"


def copied(trained: Path, place: Path, **changes: Any) -> Path:
    """Copy a run, with `seed`, `lr` or `score` (added to bits and nats) changed behind its back."""
    run = Path(shutil.copytree(trained, place, ignore=shutil.ignore_patterns("audit")))
    settings = json.loads((run / "config.json").read_text())
    settings["seed"] = changes.get("seed", settings["seed"])
    settings["train"]["lr_matrix"] = changes.get("lr", settings["train"]["lr_matrix"])
    (run / "config.json").write_text(json.dumps(settings))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "final/artifact" in line:
            for name in ("bpb", "loss"):
                line["final/artifact"]["score"][name] += changes.get("score", 0.0)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def audit(path: Path, *options: str) -> dict[str, list[tuple[str, str]]]:
    """Audit a run; return (verdict, evidence) of every rule, from audit.json. The exit code must agree."""
    code = main(["audit", str(path), *MLX, *options])
    findings = json.loads((path / "audit" / "audit.json").read_text())["findings"]
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in findings:
        found.setdefault(finding["rule"], []).append((finding["verdict"], finding["evidence"]))
    assert code == (1 if failed(found) else 0)
    return found


def failed(found: dict[str, list[tuple[str, str]]]) -> set[str]:
    return {rule for rule, seen in found.items() if any(verdict == "FAIL" for verdict, _ in seen)}


def test_an_honest_run_end_to_end(trained: Path, capsys: Capture) -> None:
    found = audit(trained)
    out = capsys.readouterr().out
    assert found.keys() == RULES.keys() and not failed(found)
    report = (trained / "audit" / "legality.md").read_text()
    for rule, seen in found.items():
        for verdict, evidence in seen:
            assert f"| {rule} | {RULES[rule]} | **{verdict}** | {evidence} |" in report
            assert f"\n{rule:<4} {verdict:<12} " in out
    passed = {rule for rule, seen in found.items() if seen[0][0] == "PASS"}
    assert passed == RULES.keys() - {"D15", "D17"}
    value = json.loads((trained / "audit" / "audit.json").read_text())
    claimed = Run.open(trained).last("final/artifact")["score"]
    assert abs(value["evaluation"]["score"]["bpb"] - claimed["bpb"]) < 1e-5
    (size,) = (one["details"] for one in value["findings"] if one["rule"] == "D1")
    assert size["packed_code"] == packed_code()["mlx"]  # what `skc info` and `skc export` say beforehand
    assert "no rule was found broken" in out and f"{claimed['bpb']:.4f} bits per byte" in report
    capsys.readouterr()
    assert main(["audit", str(trained), *MLX, "--json"]) == 0  # an audit that ended is made again, not gone on with
    out = capsys.readouterr().out
    again = json.loads(out)
    assert out.count("\n") == 1 and again["ok"] and again["evaluation"]["resumed"] == 0
    verdict = [[(f["rule"], f["verdict"]) for f in one["findings"]] for one in (value, again)]
    assert verdict[0] == verdict[1]


def test_a_part_of_the_text_is_no_full_set(trained: Path, tmp_path: Path) -> None:
    run = copied(trained, tmp_path / "run", score=-0.01)
    found = audit(run, "--tokens", "900")
    assert not failed(found)  # a part cannot contradict the score of the whole
    assert {verdict for verdict, _ in found["D5"]} == {"NOT CHECKED"} and found["D16"][0][0] == "NOT CHECKED"
    assert "first 2 documents" in (run / "audit" / "legality.md").read_text()
    assert all(rule in found and "first 2 of 8 documents" in found[rule][0][1] for rule in ("D13", "D14"))


def test_three_seeds_against_a_reference(trained: Path, tmp_path: Path) -> None:
    runs = [copied(trained, tmp_path / str(seed), seed=seed, score=0.001 * seed) for seed in range(3)]
    bpb = Run.open(runs[1]).last("final/artifact")["score"]["bpb"]
    options, part = ["--seeds", str(runs[1]), str(runs[2]), "--reference"], ["--tokens", "300"]
    better, worse = ([str(bpb + gap + noise) for noise in (0.0, 0.001, 0.002)] for gap in (-0.05, 0.05))
    found = audit(runs[0], *options, *worse)
    assert not failed(found) and found["D15"][0][0] == found["D16"][0][0] == "PASS", found["D15"]
    found = audit(runs[0], *part, *options, *worse)  # then the recorded score is not found again
    assert not failed(found) and found["D15"][0][0] == found["D16"][0][0] == "NOT CHECKED", found["D15"]
    shutil.rmtree(runs[2])
    copied(trained, runs[2], seed=2, score=0.002, lr=0.5)
    found = audit(runs[0], *part, *options, *better)
    assert failed(found) == {"D15", "D16"} and "different settings" in found["D16"][0][1]
    assert all(str(run) in found["D15"][0][1] for run in runs)


def test_a_killed_audit_goes_on(trained: Path, tmp_path: Path) -> None:
    run = copied(trained, tmp_path / "run")
    options = ["--windows", "sliding", "--stride", "8", "--batch", "1"]
    command = [sys.executable, "-m", "core.cli", "audit", str(run), *MLX, *options]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ledger, deadline = run / "audit" / "ledger", time.monotonic() + 240
    while time.monotonic() < deadline and not (ledger.exists() and ledger.stat().st_size > 5000):
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)  # the verb, the watch and the evaluation
    process.wait()
    written = Ledger.read(ledger).writes
    assert 0 < written < 500 and not (run / "audit" / "audit.json").exists()
    found = audit(run, *options)
    value = json.loads((run / "audit" / "audit.json").read_text())["evaluation"]
    assert value["resumed"] >= written and value["ledger"]["writes"] == 511, value["ledger"]
    assert not failed(found) and found["D3"][0][0] == "NOT CHECKED" and "went on from" in found["D3"][0][1]
    config = Run.open(run).config
    evaluation = dataclasses.replace(config.eval, windows="sliding", stride=8, batch=4, documents=None)
    artifact = load_engine("mlx", config, read_artifact(run / "artifact.skc").weights)
    whole = score(artifact, Evaluation(open_dataset(config.data.path).val, evaluation))
    assert abs(value["score"]["bpb"] - whole.bpb) < 1e-6 and value["score"]["targets"] == whole.targets


def test_a_ledger_from_elsewhere_is_not_taken(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever ships a run may ship what a killed audit leaves, with every number that he likes in it."""
    run = copied(trained, tmp_path / "run")
    path, config = run / "audit" / "ledger", Run.open(run).config
    dataset = open_dataset(config.data.path)
    model = load_engine("mlx", config, read_artifact(run / "artifact.skc").weights)
    settings = dataclasses.replace(config, eval=dataclasses.replace(config.eval, documents=None))
    name, his = evaluation_key(model, dataset, settings, plugins=True), "his secret"
    (tmp_path / "his" / "skc").mkdir(parents=True)
    (tmp_path / "his" / "skc" / "audit-key").write_text(his)
    for place in ("mine", "his"):  # the second is the control: with his own secret it is taken
        ledger = Ledger.open(path, len(dataset.val), hashlib.sha256(f"{his} {name}".encode()).hexdigest(), anew=True)
        ledger.write(np.arange(1, len(dataset.val) - 44), np.full(len(dataset.val) - 45, 0.01), 0)
        ledger.close()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
        found = audit(run)
        assert failed(found) == ({"D8"} if place == "his" else set())  # taken, but scored again on a sample
        assert place == "mine" or "in the ledger of the killed start" in found["D8"][0][1]


def test_an_evaluation_that_ends_too_early_is_not_fine(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    run = copied(trained, tmp_path / "run")
    assert main(["audit", str(run), *MLX, "--plugins", "shared_tests.support.zoo:Crash", "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert not value["ok"] and value["error"]["message"] == "no prediction today"
    found = {f["rule"]: f for f in reversed(value["findings"])}
    assert all(found[r]["verdict"] == "NOT CHECKED" for r in ("D3", "D4", "D7", "D8", "D9", "D10", "D12", "D16"))
    assert found["D5"]["verdict"] == "FAIL"
    assert found["D5"]["evidence"] == "the evaluation died: builtins.RuntimeError: no prediction today"


def test_bad_input_gets_one_line(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    empty = copied(trained, tmp_path / "empty")
    (empty / "artifact.skc").unlink()
    other = tmp_path / "other"
    other.mkdir()
    (other / "text.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in zoo_data.novels("train", 6, 3000))
    )
    data = str(other / "data")
    assert main(["data", "prepare", str(other / "text.jsonl"), "--out", data, "--vocab", "400"]) == 0
    run = str(trained)
    for arguments, words in (
        (["nowhere"], "nowhere: no such artifact; give a run or an artifact"),
        ([str(tmp_path)], "is not a run"),
        ([str(empty)], "train it to its end: skc train debug"),
        ([str(trained / "config.json")], "this is not an artifact"),
        ([run, "--data", data], "was made with tokenizer"),
        ([run, "--data", str(tmp_path)], "is no prepared folder; make one with the model's tokenizer"),
        ([run, "--flips", "0"], "expected at least 1"),
        ([run, "--tokens", "0"], "expected at least 1"),
        ([run, "--stride", "8"], "take sliding or documents"),
        ([run, "--seeds", "nowhere"], "nowhere: does not exist"),
        ([run, "--plugins", "tempratur"], "did you mean temperature?"),
    ):
        capsys.readouterr()
        assert main(["audit", *arguments, *MLX, "--out", str(tmp_path / "out")]) == 2, arguments
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and error.startswith("skc audit: "), error


def test_the_key_is_made_once_and_for_this_user_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = auditor._secret()
    path = tmp_path / "skc" / "audit-key"
    assert len(key) == 64 and path.read_text() == key == auditor._secret()
    assert path.stat().st_mode & 0o777 == 0o600 and os.listdir(path.parent) == ["audit-key"]
    path.unlink()

    def late(file: BinaryIO, wait: bool) -> bool:
        path.write_text("of an audit that was quicker")
        return locked(file, wait=wait)

    monkeypatch.setattr(auditor, "locked", late)
    assert auditor._secret() == path.read_text() == "of an audit that was quicker"
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))  # a file: nothing can be kept there
    assert auditor._secret() != auditor._secret()
