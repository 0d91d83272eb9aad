"""Runs the program of a folder again, with one seed and for some steps, and holds its losses to those of the log."""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from core.audit.rules import Verdict
from core.files import FileError, decode_text, read_file, replace_file
from core.submission.folder import MAX_FILE, SubmissionError, SubmissionFolder
from core.submission.log_values import MAX_LOG, Log, parse_log
from core.submission.public_logs import parse_public_log

NEAR = 2e-2
"""Nats by which losses in bfloat16 may differ."""
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "XDG_CACHE_HOME",
        "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "TRITON_CACHE_DIR", "DATA_PATH")  # fmt: skip
"""What the program gets of this process's environment: no token, and of the challenge's settings the data's place."""
PACKAGES = ("numpy", "torch", "triton", "mlx")
"""Packages that decide what a step computes."""
MAX_LINES = 20_000
MAX_LINE = 1 << 17
LOOK = 0.2
LOSS = re.compile(r"(?:step:\s*)?(\d{1,12})/\d{1,12} +train_loss:")
PATIENCE = 20.0
"""Seconds for a program that was asked to end."""


class Again(NamedTuple):
    """The losses of a log beside those of the program, run again."""

    seed: int
    verdict: Verdict
    evidence: str
    rows: tuple[tuple[int, str, str, float], ...]
    """(step, loss in the log, loss now, difference)."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        names = ("step", "logged", "again", "difference")
        return {**self._asdict(), "rows": [dict(zip(names, row, strict=True)) for row in self.rows]}


def reproduce(folder: SubmissionFolder, seed: int | None, steps: int, data: str | None, limit: float) -> Again:
    """Run the program of a folder for `steps` steps, at most `limit` seconds, and judge its losses.

    It is run: whoever asks for this trusts it. SubmissionError if there is no log to compare, or it does not run.
    """
    if folder.program is None:
        raise SubmissionError(f"{folder.path}: has no program to run")
    logs = [log for log in folder.logs if seed in (None, log.seed) and log.losses]
    if not logs:
        known = ", ".join(str(log.seed) for log in folder.logs) or "none"
        raise SubmissionError(f"{folder.path}: no log with losses of seed {seed}; logs of seeds: {known}")
    log = logs[0]
    wanted = [step for step, _ in log.losses if step <= steps]
    if not wanted:
        raise SubmissionError(f"{log.name}: its first loss is of step {log.losses[0][0]}: give --steps at least that")
    with tempfile.TemporaryDirectory() as place:
        lines = _run(folder, log, Path(place), wanted[-1], data, limit)
    read = parse_log if any(line.startswith("skc_log:") for line in lines) else parse_public_log
    return judge_losses(log, read(log.name, lines), wanted[-1])


def judge_losses(log: Log, again: Log, last: int) -> Again:
    """Judge the losses of a second run, up to step `last`, against a log."""
    now = dict(again.losses)
    logged = [(step, loss) for step, loss in log.losses if step <= last and step in now]
    rows = tuple((step, loss, now[step], float(now[step]) - float(loss)) for step, loss in logged)
    if not rows:
        raise SubmissionError(f"{log.name}: the program printed no loss of a step that the log has")
    worst = max(abs(difference) for *_, difference in rows)
    seen = f"{len(rows)} losses up to step {rows[-1][0]}, at most {worst:.6f} apart"
    apart = _differences(log, again)
    if apart:
        return Again(log.seed or 0, "NOT CHECKED", f"{seen}; not judged: {'; '.join(apart)}", rows)
    if log.dtype == "float32":
        equal = all(text == other for _, text, other, _ in rows)
        train = (log.settings or {}).get("train")
        if not equal and isinstance(train, dict) and train.get("seconds") is not None:
            words = "not judged: the schedule follows the clock, which no two runs share"
            return Again(log.seed or 0, "NOT CHECKED", f"{seen}; {words}", rows)
        return Again(log.seed or 0, "PASS" if equal else "FAIL", f"{seen}; float32: every printed digit counts", rows)
    return Again(log.seed or 0, "PASS" if worst <= NEAR else "FAIL", f"{seen}; {log.dtype}: {NEAR} may", rows)


def _differences(log: Log, again: Log) -> list[str]:
    """Return why two runs cannot be expected to be equal."""
    if log.dtype not in ("float32", "bfloat16", "float16") or again.dtype is None or log.device is None:
        return ["the log, or the program, does not say device and compute type"]
    apart = []
    pairs: list[tuple[str, Any, Any]] = [("device", log.device, again.device), ("ranks", log.ranks, again.ranks)]
    pairs += [("compute type", log.dtype, again.dtype), ("backend", log.backend, again.backend)]
    ours, theirs = log.versions or {}, again.versions or {}
    pairs += [
        (package, ours.get(package), theirs.get(package)) for package in PACKAGES if package in {**ours, **theirs}
    ]
    for name, before, after in pairs:
        if before != after:
            apart.append(f"{name} {before}, here {after}")
    return apart


def _run(folder: SubmissionFolder, log: Log, place: Path, last: int, data: str | None, limit: float) -> list[str]:
    """Start the program in a place of its own and return what it printed until it had done step `last`."""
    assert folder.program is not None
    replace_file(place / folder.program_name, folder.program)
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment |= {"SEED": str(log.seed), "RUN_ID": f"seed{log.seed}", "PYTHONUNBUFFERED": "1"}
    if threads := re.fullmatch(r"CPU, (\d{1,4}) threads", log.device or ""):  # sums of other pieces have other digits
        environment["OMP_NUM_THREADS"] = threads[1]
    if data is not None:
        environment["DATA_PATH"] = os.path.abspath(data)
    tokenizer = folder.path / "tokenizer.model"
    if any(entry.name == tokenizer.name and entry.kind == "file" for entry in folder.entries):
        replace_file(place / tokenizer.name, read_file(tokenizer, MAX_FILE, follow=False))
        environment["TOKENIZER_PATH"] = str(place / tokenizer.name)
    start = [sys.executable]
    if (log.ranks or 1) > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={log.ranks}"]
    process = subprocess.Popen(
        [*start, folder.program_name], cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    lines: list[str] = []
    written = place / "logs" / f"{environment['RUN_ID']}.txt"
    try:
        for line in _lines(process, limit):
            lines += [] if line is None else [line]
            if came_to(lines[-1:], last):
                return lines
            if line is None or len(lines) % 16 == 0:  # it may say more in its log than here
                log_lines = _written(written)
                if came_to(log_lines, last):
                    return log_lines
        log_lines = _written(written)
        if came_to(log_lines, last):
            return log_lines
    finally:
        _end(process)
    said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
    raise SubmissionError(f"{folder.program_name} ended before step {last} ({process.returncode}): {said[:200]}")


def came_to(lines: list[str], last: int) -> bool:
    """Return whether the last loss that some lines print is of step `last`, or of a later one."""
    for line in reversed(lines):
        if match := LOSS.match(line):
            return int(match[1]) >= last
    return False


def _written(path: Path) -> list[str]:
    """Return the whole lines of a log that a program writes, or none."""
    try:
        return decode_text(path, read_file(path, MAX_LOG, follow=False)).split("\n")[:-1]
    except (FileError, OSError):
        return []


def _lines(process: subprocess.Popen[bytes], limit: float) -> Iterator[str | None]:
    """Yield the lines of a process until it ends, and None in every LOOK seconds without any.

    SubmissionError after `limit` seconds, or MAX_LINES lines.
    """
    waiting: queue.Queue[bytes] = queue.Queue()
    stream = process.stdout
    assert stream is not None

    def read() -> None:
        for _ in range(MAX_LINES + 1):  # nobody may fill the memory
            line = stream.readline(MAX_LINE)
            waiting.put(line)
            if not line:
                break
        stream.close()  # here: closing waits for a read, and what holds the other end may never write again

    threading.Thread(target=read, daemon=True).start()
    end = time.monotonic() + limit
    count = 0
    while count < MAX_LINES:
        if time.monotonic() > end:
            raise SubmissionError(f"the program did not come to that step in {limit:.0f} s: add --limit")
        try:
            line = waiting.get(timeout=LOOK)
        except queue.Empty:
            yield None
            continue
        if not line:
            return
        count += 1
        yield line.decode("utf-8", "replace").rstrip("\n")
    raise SubmissionError(f"the program printed over {MAX_LINES:,} lines")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started: its group is its own. Its output is closed by whoever reads it."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
            break
