"""What tests of verbs share: run one with --json, or have it refuse its input in one line."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from core.cli import main

SHORT = ("--train.steps", "6", "--train.eval_every", "3", "--eval.documents", "2", "--backend", "cuda")

Capture = pytest.CaptureFixture[str]


def call(capsys: Capture, *argv: str, code: int = 0) -> dict[str, Any]:
    """Run a verb with --json and return its one object."""
    capsys.readouterr()
    assert main([*argv, "--json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def refuse(capsys: Capture, *argv: str) -> str:
    """Run a verb that must refuse its input, and return the one line that it says."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("skc"), captured.err
    assert "--------" not in captured.err and "─" not in captured.err, captured.err
    return captured.err


def events(folder: Path) -> list[tuple[int, str, float | str, float]]:
    """Return (step, name, value, time) of every value in the event files of a folder, settings left out."""
    from tensorboardX.proto.event_pb2 import Event  # type: ignore[attr-defined]

    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data = memoryview(file.read_bytes())
        while data:
            size = struct.unpack("<Q", data[:8])[0]
            event = Event.FromString(bytes(data[12 : 12 + size]))  # length, its checksum, event, its checksum
            data = data[16 + size :]
            if event.session_log.status == event.session_log.START:  # what TensorBoard does then
                found = [row for row in found if row[0] < event.step]
            for value in event.summary.value:
                if value.tag.startswith("settings"):
                    continue
                text = value.tensor.string_val[0].decode() if value.tensor.string_val else value.simple_value
                found.append((event.step, value.tag.removesuffix("/text_summary"), text, event.wall_time))
    return found
