"""Triton's softcapped cross-entropy against ops.softcap and ops.cross_entropy, interpreted on the CPU and on a GPU.

`python -m shared_tests.support.cross_entropy_cases DEVICE FILE` runs every case on a device ("cpu": with
TRITON_INTERPRET=1); without arguments it compiles the kernels, and traces a training step that uses them. Processes
of their own, because Triton reads that variable once, when imported. Budget: 60 s.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.check.tolerances import P1_FAST
from shared_tests.support.cross_entropy_cases import CASES, FAULTS, FAULTY, REFUSED, Case, Run, run
from shared_tests.support.scan_cases import environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return what Triton's interpreter found on the CPU."""
    return run("cpu", tmp_path_factory.mktemp("interpreted"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_interpreted_kernels_equal_the_ops(case: Case, interpreted: Run) -> None:
    for output, gap in interpreted.gaps(case, case).items():
        assert gap <= case.limit(output), (output, gap)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_seen(fault: str, interpreted: Run) -> None:
    assert max(interpreted.gaps(fault, FAULTY).values()) > 100 * P1_FAST


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_inputs_are_refused_in_one_line(name: str, interpreted: Run) -> None:
    message = interpreted.messages[name]
    assert message.startswith("cross_entropy needs logits (..., V) in bfloat16") and "\n" not in message


def test_a_target_outside_the_vocabulary_is_not_read(interpreted: Run) -> None:
    assert np.isnan(interpreted.arrays["outside"]).all(), "the step's guard stops the run"


def test_the_kernels_equal_the_ops_on_a_gpu(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    native = run("cuda", tmp_path)
    for case in CASES:
        for output, gap in native.gaps(case, case).items():
            assert gap <= case.limit(output), (case, output, gap)


@pytest.mark.long
def test_the_kernels_compile_for_an_h100_and_into_one_graph() -> None:
    """Interpreted code need not compile. Triton and the ptxas in its wheel can do it without a GPU."""
    command = [sys.executable, "-W", "ignore", "-m", "shared_tests.support.cross_entropy_cases"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, traced = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["forward_kernel", "backward_kernel"] * 3
    for line in lines:
        size, shared = map(int, line.split()[-2:])
        assert size > 1000 and shared < 1 << 10, line
    # Five scans (three mixers, the capsules, the bank) and the cross-entropy, each forward and backward.
    assert traced == "1 12 1", "one graph, with one layer of attention"
