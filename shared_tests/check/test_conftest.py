"""The rules of conftest hold: a skipped pair test fails the session, and no test reaches the network. Budget: 10 s."""

import subprocess
import sys
from pathlib import Path

import pytest


def pytest_on(folder: Path, body: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with our conftest on one test file of its own."""
    (folder / "test_it.py").write_text(f"import pytest\n{body}")
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    (folder / "first").mkdir(exist_ok=True)
    (folder / "first" / "torch.py").write_text("raise ImportError")  # it loads slowly; workers get our sys.path
    code = "import sys, pytest; sys.path.insert(0, sys.argv.pop(1)); sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder / "first"), "-p", "shared_tests.conftest", "-q", *options]
    command.append(str(folder / "test_it.py"))
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("options", [(), ("--numprocesses", "1")], ids=["alone", "workers"])
def test_a_skipped_pair_test_fails_the_session(tmp_path: Path, options: tuple[str, ...]) -> None:
    pair = "@pytest.mark.pair\ndef test_twins():\n    pytest.skip('no mlx')\n"
    failed = pytest_on(tmp_path, pair, *options)
    assert failed.returncode == 1 and "SKIPPED PAIR TEST" in failed.stdout
    fine = pytest_on(tmp_path, pair.replace("@pytest.mark.pair\n", ""), *options)
    assert fine.returncode == 0 and "SKIPPED PAIR TEST" not in fine.stdout


def test_tests_cannot_reach_the_network(tmp_path: Path) -> None:
    body = "import socket\n\n\ndef test_it():\n    socket.create_connection(('192.0.2.1', 9), 1)\n"
    done = pytest_on(tmp_path, body)
    assert done.returncode == 1 and "tests must not need a network" in done.stdout
