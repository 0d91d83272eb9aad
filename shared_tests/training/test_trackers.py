"""Trackers: what TensorBoard and Weights & Biases (offline) get is what metrics.jsonl holds. Budget: 30 s."""

import importlib.util
import json
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from core.cli import main
from core.config import ConfigError, RunConfig
from core.training import trackers
from core.training.environment import ROOT
from core.training.run import Run
from core.training.trackers import Copies, TensorBoard, flat
from shared_tests.support.command_line import SHORT, call, events

LINES = [
    {"step": 5, "train/loss": 3.5, "clock/seconds": 2.0, "progress/each": [0.1, 0.2]},
    {"step": 5, "val/bpb": 2.25},
    {"step": 9, "samples": ["one", "two"]},
    {
        "step": 9,
        "final/artifact": {"bytes": 10, "within": True, "score": {"bpb": 1.5, "error": None, "label": "score"}},
    },
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing leaves this machine, and no account of whoever tests is used."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def sent(folder: Path) -> list[tuple[int, str, Any]]:
    """Return (step, name, value) of all that is in the files of W&B's offline runs, which are logs as LevelDB's are."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        records, deadline = [], time.monotonic() + 60
        while not records or records[-1].WhichOneof("record_type") != "exit":  # W&B writes on after `finish`
            assert time.monotonic() < deadline, f"{file} does not end"
            time.sleep(0.05)
            try:
                records = [Record.FromString(data) for data in _records(file.read_bytes())]
            except DecodeError:  # half of one is there
                records = []
        for record in records:
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            step = record.history.step.num
            found += [(step, name, value) for name, value in items.items() if not name.startswith("_")]
    return found


def _records(data: bytes) -> Iterator[bytes]:
    part, at = b"", 7  # after the header
    while at < len(data):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield part
            part = b""


def wanted(lines: list[dict[str, Any]]) -> list[tuple[int, str, float | str]]:
    """Return what trackers should have of the lines of a metrics.jsonl."""
    rows = [(row["step"], flat({k: v for k, v in row.items() if k != "step"})) for row in lines]
    return sorted((step, name, value) for step, values in rows for name, value in values.items())


def rounded(rows: list[tuple[int, str, Any]]) -> list[tuple[int, str, Any]]:
    """Return rows with numbers as float32, which is all that an event file has."""
    return sorted((s, n, v if isinstance(v, str) else struct.unpack("f", struct.pack("f", v))[0]) for s, n, v in rows)


def test_what_trackers_show_of_a_line() -> None:
    assert wanted(LINES) == [
        (5, "clock/seconds", 2.0), (5, "train/loss", 3.5), (5, "val/bpb", 2.25), (9, "final/artifact/bytes", 10.0),
        (9, "final/artifact/score/bpb", 1.5), (9, "samples", "one\n\n---\n\ntwo"),
    ]  # fmt: skip


def test_a_run_and_its_resumption_are_copied_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, both = tmp_path / "run", ["--track", "tensorboard", "wandb"]
    plain = tmp_path / "plain"
    often = [*SHORT, "--train.log_every", "1", "--train.save_every", "4", "--train.sample_every", "5"]
    assert main(["train", "debug", *often, "--train.keep_every", "1", "--out", str(plain)]) == 0
    before = Run.open(plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("core.verbs.train.finish", _dies)
        assert main(["train", "debug", *often, *both, "--out", str(out)]) == 130
    # As if the kill had come at step 5: the checkpoint of step 4 is the last, two more steps were copied already.
    assert len(events(out / "tensorboard")) > 20
    (out / "state" / "checkpoint.safetensors").write_bytes(before.kept_path(4).read_bytes())
    capsys.readouterr()
    assert main(["train", "debug", *often, *both, "--out", str(out)]) == 0
    assert "also goes to wandb" in capsys.readouterr().out
    rows = Run.open(out).metrics()
    assert [r["train/loss"] for r in rows if "train/loss" in r] == [
        r["train/loss"] for r in before.metrics() if "train/loss" in r
    ]
    assert rounded([(s, n, v) for s, n, v, _ in events(out / "tensorboard")]) == rounded(wanted(rows))
    copied = sent(out)
    assert len({(s, n) for s, n, _ in copied}) == len(copied), "a value was sent twice"
    timeless = ("clock/", "perf/", "final/")
    assert sorted((s, n, v) for s, n, v in copied if not n.startswith(timeless)) == [
        (s, n, v) for s, n, v in wanted(rows) if not n.startswith(timeless)
    ]
    assert {(s, n) for s, n, _ in copied} == {(s, n) for s, n, _ in wanted(rows)}


def _dies(*_: Any) -> None:
    raise KeyboardInterrupt


def test_relative_time_of_tensorboard_is_training_time(tmp_path: Path) -> None:
    copies = Copies({"tensorboard": TensorBoard(tmp_path, "a", "b", RunConfig())}, print)
    copies.rows(LINES)
    copies.close()
    times = {step: when for step, name, _, when in events(tmp_path / "tensorboard") if name != "settings"}
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert times[9] == times[5] and 0 <= times[5] - 2.0 - int(file.name.split(".")[3]) < 60


def test_a_finished_run_can_be_copied_and_copied_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "debug", *SHORT, "--out", str(tmp_path / "run")]) == 0
    lines = Run.open(tmp_path / "run").metrics()
    for _ in range(2):
        value = call(capsys, "track", str(tmp_path / "run"), "--to", "wandb", "tensorboard")
        assert value["runs"] == [{"run": str(tmp_path / "run"), "lines": len(lines)}]
        assert rounded([e[:3] for e in events(tmp_path / "run" / "tensorboard")]) == rounded(wanted(lines))
        assert sorted(sent(tmp_path / "run")) == wanted(lines)


def _run(folder: Path) -> Path:
    run = Run.create(folder / "run", RunConfig(), b"")
    for line in LINES[:2]:
        run.log(line["step"], {name: value for name, value in line.items() if name != "step"})
    return run.path


class Broken:
    """A tracker that takes one line."""

    taken = 0

    def row(self, step: int, values: dict[str, Any]) -> None:
        """Fail from the second line on."""
        self.taken += 1
        if self.taken > 1:
            raise OSError("no route to host")

    def close(self) -> None:
        """End."""


def test_a_tracker_that_fails_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Broken()
    monkeypatch.setitem(trackers.KINDS, "wandb", lambda *_: broken)
    command = ["train", "debug", *SHORT, "--train.log_every", "1", "--out", str(tmp_path / "run")]
    assert main([*command, "--track", "wandb", "tensorboard"]) == 0
    said = capsys.readouterr().out
    assert said.count("wandb got no more of this run (OSError: no route to host)") == 1 and broken.taken == 2
    lines = Run.open(tmp_path / "run").metrics()
    assert rounded([e[:3] for e in events(tmp_path / "run" / "tensorboard")]) == rounded(wanted(lines))


@pytest.mark.parametrize("names, message", [
    (["wandb"], "--track wandb: wandb is not installed; pip install -e '.[wandb]'"),
    (["tensorboard"], "--track tensorboard: tensorboardX is not installed; pip install -e '.[tensorboard]'"),
    (["tensorboard", "tensorboard"], "one is named twice"),
])  # fmt: skip
def test_what_cannot_be_tracked_is_refused_before_anything_is_made(
    names: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    hidden = ("wandb", "tensorboardX") if len(names) == 1 else ()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else found(name))
    assert main(["train", "debug", *SHORT, "--track", *names, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_folder_that_wandb_left_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lonely_package").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "lonely_package")
    with pytest.raises(ConfigError, match="is not installed"):
        trackers.check(["wandb"])


class Server:
    """What a start meets online: a run that has lines up to a step."""

    offline = False

    def __init__(self, first: int) -> None:
        self.step, self.summary, self.sent = first, {}, []

    def log(self, values: dict[str, Any], step: int) -> None:
        """Take a line."""
        self.sent.append((step, *values))


def test_wandb_resumes_by_id_and_sends_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    servers, ids = [Server(0), Server(6), Server(10)], []
    monkeypatch.setattr("wandb.init", lambda id, resume, **_: ids.append((id, resume)) or servers[len(ids) - 1])
    for start in range(3):
        tracker = trackers.WandB(tmp_path, "a", "b", RunConfig())
        (tmp_path / "wandb" / f"run-2026010{start}_120000-abc").mkdir(parents=True)
        for line in LINES:
            tracker.row(line["step"], {name: value for name, value in line.items() if name != "step"})
    assert ids == [(None, "allow"), ("abc", "allow"), ("abc", "allow")]
    assert [server.sent[0][:2] for server in servers[:2]] == [(5, "train/loss"), (9, "samples")]
    assert len(servers[0].sent) == 4 and len(servers[1].sent) == 2 and not servers[2].sent
    assert servers[2].summary["final/artifact/score/bpb"] == 1.5, "the end is known, though W&B takes its step no more"


def test_no_account_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    command = [sys.executable, "-m", "core.cli", "track", str(_run(tmp_path)), "--to", "wandb"]  # wandb asks once
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert re.search("No API key.*wandb login.*WANDB_MODE=offline", done.stderr)
