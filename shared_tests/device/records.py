"""results.jsonl: one JSON object a line, on the disk before the next one is measured. Standard library only.

A line has `item`, and either `state` (started, with `device`; done, failed, capped, skipped: said by the driver), or
`what` with `value` and `unit` (a figure), `gap`, `limit` and `ok` (a check), `error` and `traceback`, or `text`.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "results.jsonl"
ENDED = ("done", "failed", "capped", "skipped")
"""States that are results: what has one is not run again."""
Line = dict[str, Any]


def append(folder: Path, line: Line) -> None:
    """Write a line and wait until the disk has it; a number that is not finite becomes null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    file = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, json.dumps(plain).encode() + b"\n")
        os.fsync(file)
    finally:
        os.close(file)


def read(folder: Path) -> list[Line]:
    """Return the lines; one that a kill cut short is left out."""
    path, found = folder / FILE, []
    for raw in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("item"), str):
            found.append(line)
    return found


def mend(folder: Path) -> None:
    """End a last line that a kill cut short, so that the next one begins anew."""
    path = folder / FILE
    if path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size:
        with path.open("ab") as file:
            file.write(b"\n")


def device(gpu: bool) -> str:
    """Return what an item is told of its device, and a line of its start says."""
    return "gpu" if gpu else "cpu"


def latest(lines: list[Line]) -> dict[str, list[Line]]:
    """Return the lines of every item's last run, by item, in the order in which items first appear."""
    runs: dict[str, list[Line]] = {}
    for line in lines:
        if line.get("state") == "started":
            runs[line["item"]] = []
        runs.setdefault(line["item"], []).append(line)
    return runs


def devices(folder: Path) -> set[str]:
    """Return the devices of which there are results."""
    runs = latest(read(folder)).values()
    return {run[0].get("device", "") for run in runs if state(run) in ENDED}


def state(run: list[Line]) -> str:
    """Return the last state of a run."""
    return next((line["state"] for line in reversed(run) if "state" in line), "")


def bad(run: list[Line]) -> Iterator[Line]:
    """Yield what is wrong in a run: checks beyond their limit, errors, an end before its time."""
    for line in run:
        if line.get("ok") is False or "error" in line or line.get("state") in ("failed", "capped"):
            yield line
