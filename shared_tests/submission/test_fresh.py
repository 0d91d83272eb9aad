"""The packed program in a virtual environment that has what the folder's requirements.txt names, and nothing else."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from core.cli import main
from shared_tests.support import packed
from shared_tests.support.killed import small_data

ABOUT = ["--author", "A", "--github-id", "a", "--name", "Small", "--blurb", "B"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_data(tmp_path_factory.mktemp("text"), 60)


@pytest.fixture(scope="module")
def python(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the Python of an environment made by a submitted folder's requirements.txt."""
    place = tmp_path_factory.mktemp("fresh")
    program = packed.written(place, packed.tiny("debug", data, **{"train.steps": 2}))
    done = packed.start(program, place, DATA_PATH=data, RUN_ID="one")
    assert done.returncode == 0, done.stderr[-3000:]
    main(["submit", str(place / "runs" / "one"), "--out", str(place / "out"), *ABOUT])
    (wanted,) = (place / "out").glob("records/*/*/requirements.txt")
    subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
    fresh = str(place / "venv" / "bin" / "python")
    numpy = next(line for line in wanted.read_text().splitlines() if line.startswith("numpy=="))
    for options in (["--dry-run", "--no-deps", numpy], ["-r", str(wanted)]):
        done = subprocess.run([fresh, "-m", "pip", "install", "-q", *options], capture_output=True, text=True)
        if done.returncode and "--dry-run" in options:
            pytest.skip(f"NOT CHECKED: no package index answers: {done.stderr.strip()[-200:]}")
        assert done.returncode == 0, done.stderr[-2000:]
    return fresh


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", [packed.skc, packed.attention])
def test_a_program_needs_what_its_requirements_name(
    kind: Any, world: int, python: str, data: str, tmp_path: Path
) -> None:
    """Losses, nats and artifact are those of the checkout, which runs in the environment of the tests."""
    packed.same(kind(data), tmp_path, world=world, python=[python, "-W", "ignore"])
