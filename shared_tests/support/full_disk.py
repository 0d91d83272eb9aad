"""Runs on a disk that fills up: what must fail, what must go on, and a scenario on a small disk."""

import contextlib
import errno
import io
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.cli import main
from core.training.run import Run
from shared_tests.support.killed import fingerprint, timeless

SHORT = ("--train.steps", "6", "--train.save-every", "2", "--train.log-every", "1", "--backend", "cuda")

SHORT += ("--train.eval-every", "None", "--train.sample-every", "None", "--eval.documents", "2")

PAGE = 4096

LAST = "state/checkpoint.safetensors"


def skc_train(data: str, out: Path, *more: str) -> tuple[int, str]:
    """Run `skc train debug` and return its exit code and what it said on stderr."""
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        code = main(["train", "debug", "--data.path", data, *SHORT, *more, "--out", str(out)])
    return code, errors.getvalue()


def must_fail(data: str, out: Path, file: str, reason: str, todo: str, *more: str, step: int = 2) -> None:
    """The command ends with 2 and a line that names the file; what was saved is whole and nothing else is left."""
    code, errors = skc_train(data, out, *more)
    line = f"skc train: {out / file}: {reason}; {todo}, what was saved before is intact\n"
    assert (code, errors) == (2, line), (code, errors, line)
    run = Run.open(out)
    saved = run.checkpoint()
    assert saved and saved.step == step
    assert {row["step"] for row in run.metrics()} >= {*range(1, step + 1)}
    assert not list(out.rglob("*.tmp")), "a temporary file is left"


def must_end_like(calm: Path, data: str, out: Path, *more: str) -> None:
    """The same command goes on and ends in the same bits as a run that always had space."""
    assert skc_train(data, out, *more) == (0, "")
    ours, theirs = Run.open(out), Run.open(calm)
    a, b = ours.checkpoint(), theirs.checkpoint()
    assert a and b and a.step == 6 and fingerprint(a) == fingerprint(b)
    assert timeless(ours) == timeless(theirs)
    assert (out / "artifact.skc").read_bytes() == (calm / "artifact.skc").read_bytes()
    assert not list(out.rglob("*.tmp"))


def scenario(data: str, calm: str, disk: str) -> int:
    """Fill a small disk in four ways under a run on it; return 0, or 1 and say what was wrong."""
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    out, ballast = Path(disk) / "run", Path(disk) / "ballast"
    reason, todo = os.strerror(errno.ENOSPC), "free some space"
    honest, size = Run.restore, (Path(calm) / LAST).stat().st_size
    others = (Path(calm) / "tokenizer.model").stat().st_size + 16 * PAGE

    def leave(space: int) -> None:
        ballast.unlink(missing_ok=True)
        free = os.statvfs(disk)
        ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - space))

    def full_after_restore(padded: str) -> Callable[..., Any]:
        """Return a Run.restore that leaves a full disk, and a file whose next line needs a new page."""

        def restore(run: Run, engine: Any) -> Any:
            found = honest(run, engine)
            for path in (run.metrics_path, run.log_path):  # blanks at the end of a line are none of its reader's worry
                text = path.read_text().removesuffix("\n")
                room = 0 if path.name == padded else PAGE - 1
                path.write_text(text + " " * ((-len(text.encode()) - 1 - room) % PAGE) + "\n")
            leave(0)
            return found

        return restore

    try:
        leave(others + size * 3 // 2)  # one checkpoint fits, the next beside it does not
        must_fail(data, out, LAST, reason, todo)
        leave(0)
        must_fail(data, out, "config.json", reason, todo)
        for file in ("metrics.jsonl", "log.txt"):
            ballast.unlink()
            Run.restore = full_after_restore(file)
            must_fail(data, out, file, reason, todo)
            Run.restore = honest
        ballast.unlink()
        must_end_like(Path(calm), data, out)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
