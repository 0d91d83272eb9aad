"""Triton's scan against a float64 recurrence in numpy: interpreted on the CPU, and on a GPU where there is one.

`python -m shared_tests.support.scan_cases DEVICE FILE` runs every case on a device ("cpu": with TRITON_INTERPRET=1);
without arguments it compiles the kernels. Processes of their own, because Triton reads that variable once, when
imported. Where triton has no wheel the tests skip; on Linux they fail without it. Budget: 30 s.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core import rng
from core.check.tolerances import P1_DIFFERENCE
from shared_tests.support.scan_cases import (
    CASES,
    FAULTS,
    FAULTY,
    LIMITS,
    REFUSED,
    Case,
    Run,
    environment,
    expected,
    gaps,
    inputs,
    run,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return what Triton's interpreter found on the CPU."""
    return run("cpu", tmp_path_factory.mktemp("interpreted"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_interpreted_kernels_equal_the_oracle(case: Case, interpreted: Run) -> None:
    found = gaps(case, interpreted.of(case))
    assert max(found.values()) <= LIMITS[case.dtype], found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_seen(fault: str, interpreted: Run) -> None:
    assert FAULTY in CASES and max(gaps(FAULTY, interpreted.of(fault)).values()) > 1000 * LIMITS[FAULTY.dtype]


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_inputs_are_refused_in_one_line(name: str, interpreted: Run) -> None:
    message = interpreted.messages[name]
    assert message.startswith("scan needs decay and drive (B, T, C) and start (B, C)") and "\n" not in message


def test_the_kernels_equal_the_oracle_on_a_gpu(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    native = run("cuda", tmp_path)
    for case in CASES:
        found = gaps(case, native.of(case))
        assert max(found.values()) <= LIMITS[case.dtype], (case, found)
    for fault in FAULTS:
        assert max(gaps(FAULTY, native.of(fault)).values()) > 1000 * LIMITS[FAULTY.dtype], fault


@pytest.mark.long
def test_the_kernels_compile_for_an_h100() -> None:
    """Interpreted code need not compile. Triton and the ptxas in its wheel can do it without a GPU."""
    command = [sys.executable, "-m", "shared_tests.support.scan_cases"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == ["forward_kernel", "backward_kernel"] * 2
    for name, copies, shared in lines:  # loads overlap, and 16 programs find room on a multiprocessor
        assert int(copies) > 16 and int(shared) < 12 << 10, (name, copies, shared)


def test_the_oracle_matches_finite_differences() -> None:
    given = inputs(Case(2, 9, 3, "float64"))
    found, h = expected(**given), 1e-4
    for key in ("decay", "drive", "start"):
        move = rng.normal(0, f"move/{key}", given[key].size).reshape(given[key].shape)
        sides = [expected(**{**given, key: given[key] + s * move})["h"] for s in (2 * h, h, -h, -2 * h)]
        far, near, near_back, far_back = (float((side * given["grad"]).sum()) for side in sides)
        measured = (8 * (near - near_back) - (far - far_back)) / (12 * h)  # the error falls with h^4
        size = float(np.abs(found[f"d_{key}"] * move).sum())
        assert abs(measured - float((found[f"d_{key}"] * move).sum())) / size <= P1_DIFFERENCE, key
