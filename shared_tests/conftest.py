"""What every test runs under: one thread, no network, a temporary home and working folder, and no silent pair skips."""

import gc
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.mlx.blas import load_fast_blas

for _library in ("OMP", "MKL", "OPENBLAS"):  # before numpy loads its BLAS; threads that fight for two cores cost 30x
    os.environ[f"{_library}_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
_skipped_pairs: list[str] = []
_not_checked: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and set what must hold before any test imports a framework."""
    config.addinivalue_line("markers", "pair: holds MLX and torch to each other; must never be skipped")
    home = tempfile.mkdtemp(prefix="skc-tests-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    os.environ["HOME"] = home
    os.environ["XDG_CACHE_HOME"] = os.environ["MPLCONFIGDIR"] = str(Path(home) / "cache")
    os.environ["PYTHONPATH"] = str(ROOT)  # for the processes that tests start
    load_fast_blas()
    try:
        import mlx.core as mx

        mx.set_default_device(mx.cpu)  # on a Mac too: the limits are those of a CPU
    except ImportError:
        pass
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def pytest_collection_finish() -> None:
    """Leave what is imported by now (the frameworks) out of every later garbage collection: 8 % of the whole time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(autouse=True, scope="session")
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run in a folder of the session's own: nothing may depend on where pytest was started."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("work")
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse every connection beyond this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address[0]}: tests must not need a network")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember the pair tests that were skipped (an expected failure counts: it looks green too), and what for want of
    a program of others.
    """
    if report.skipped and isinstance(report.longrepr, tuple) and "NOT CHECKED" in report.longrepr[2]:
        _not_checked[report.longrepr[2].removeprefix("Skipped: ")] += 1
    if report.skipped and "pair" in report.keywords:
        _skipped_pairs.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Remember whole files of pair tests that were skipped while they were collected."""
    path = Path(str(report.fspath))
    file = path if path.is_absolute() else ROOT / path
    if report.skipped and file.is_file() and "mark.pair" in file.read_text():
        _skipped_pairs.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session if a pair test was skipped: a parity test that did not run proves nothing."""
    if _skipped_pairs and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the pair tests that were skipped, and what nothing here could check."""
    for what, tests in _not_checked.items():
        terminalreporter.write_line(f"{what} ({tests} tests)", yellow=True)
    for name in _skipped_pairs:
        terminalreporter.write_line(f"SKIPPED PAIR TEST, so the session fails: {name}", red=True)
