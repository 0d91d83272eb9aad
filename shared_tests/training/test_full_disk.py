"""A disk that fills up during a run: one line, the last checkpoint intact, and the run goes on later. Budget: 40 s."""

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from core.console import Console
from core.training.run import Run
from shared_tests.support.full_disk import LAST, must_end_like, must_fail, skc_train
from shared_tests.support.killed import small_data

# Everywhere: the kernel refuses to let a file grow, or the error is planted.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Some short documents."""
    return small_data(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def calm(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that always had space."""
    path = tmp_path_factory.mktemp("calm") / "run"
    assert skc_train(data, path) == (0, "")
    return path


@contextlib.contextmanager
def no_larger_than(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes: a write that would is cut, and the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def once(method: Callable[..., Any], when: Callable[..., bool], size: Callable[..., int]) -> Callable[..., Any]:
    """Return `method` with files that cannot grow beyond `size` while it handles the call that `when` picks."""

    def call(*arguments: Any) -> Any:
        with no_larger_than(size(*arguments)) if when(*arguments) else contextlib.nullcontext():
            return method(*arguments)

    return call


def test_files_that_cannot_grow(data: str, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run that fails in its checkpoint of step 4, then in a line of metrics, then in a line of the log."""
    out = tmp_path / "run"
    reason, todo = "File too large", "raise the limit on the size of a file (ulimit -f)"
    faults: dict[str, tuple[type, str, Callable[..., bool], Callable[..., int]]] = {
        LAST: (Run, "save", lambda run, engine, step, *_: step == 4, lambda *_: (calm / LAST).stat().st_size // 2),
        "metrics.jsonl": (
            Run, "log", lambda run, step, values: step == 3, lambda run, *_: run.metrics_path.stat().st_size + 10
        ),
        "log.txt": (
            Console, "__call__", lambda say, line: line.startswith("step 3/"),
            lambda *_: (out / "log.txt").stat().st_size + 10,
        ),
    }  # fmt: skip
    for file, (kind, name, when, size) in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, once(getattr(kind, name), when, size))
            must_fail(data, out, file, reason, todo)
    must_end_like(calm, data, out)
    assert "step 3/6" in (out / "log.txt").read_text()


@pytest.mark.parametrize("place", ["open", "fsync", "replace", "copy"])
def test_no_space_at_any_moment_of_a_save(
    place: str, data: str, calm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is planted in one call of the save of step 4; a checkpoint that only lacks its copy counts."""
    out, honest, reason = tmp_path / "run", Run.save, os.strerror(errno.ENOSPC)
    name = "open" if place == "copy" else place
    call = getattr(os, name)

    def full(target: Any, *rest: Any) -> Any:
        if name == "open" and not (rest[0] & os.O_EXCL and (place == "open" or "/step-4." in str(target))):
            return call(target, *rest)  # a file that is read, or is not the one
        if place == "fsync" and os.path.samestat(os.fstat(target), os.stat(out / "metrics.jsonl")):
            return call(target)  # its fsync comes first and is no part of the checkpoint
        raise OSError(errno.ENOSPC, reason)

    def save(run: Run, engine: Any, step: int, seconds: float, tokens: int) -> None:
        with monkeypatch.context() as patch:
            if step == 4:
                patch.setattr(os, name, full)
            honest(run, engine, step, seconds, tokens)

    keep = ("--train.keep-every", "2")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save)
        file, step = ("state/step-4.safetensors", 4) if place == "copy" else (LAST, 2)
        must_fail(data, out, file, reason, "free some space", *keep, step=step)
    if place in ("fsync", "copy"):
        must_end_like(calm, data, out, *keep)
        assert Run.open(out).kept() == [4]


# Where this machine lets us: a disk that is really full.


def unshared() -> tuple[str, ...] | str:
    """Return the command that gives a process mounts of its own, or why there is none."""
    if not sys.platform.startswith("linux") or shutil.which("unshare") is None:
        return "needs Linux and unshare"
    said = ""
    for command in (("unshare", "-rm"), ("unshare", "-m")):
        done = subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", "/tmp"], capture_output=True, text=True)
        if done.returncode == 0:
            return command
        said = done.stderr.strip()
    return f"no mounts of our own here: {said}"


def test_a_disk_that_is_full(data: str, calm: Path, tmp_path: Path) -> None:
    command = unshared()
    if isinstance(command, str):
        pytest.skip(command)
    disk = tmp_path / "disk"
    disk.mkdir()
    program = "import sys; from shared_tests.support.full_disk import scenario; sys.exit(scenario(*sys.argv[1:]))"
    arguments = [sys.executable, "-c", program, data, str(calm), str(disk)]
    mount = 'mount -t tmpfs -o size=2m tmpfs "$0" && exec "$@"'
    done = subprocess.run(
        [*command, "sh", "-c", mount, str(disk), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and not list(disk.iterdir()), done.stdout + done.stderr
