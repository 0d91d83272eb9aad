"""Ranks come together: numbers first, for whom one waits, when it gives up. Budget: 25 s."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.config import ConfigError
from core.engine import joining
from core.engine.ranks import join
from shared_tests.support.ranked import environments

VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "MLX_RANK",
    "MLX_HOSTFILE",
    "MLX_IBV_DEVICES",
    "MLX_JACCL_COORDINATOR",
    "MLX_JACCL_RING",
)
WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
RING = {"MLX_RANK": "0", "MLX_HOSTFILE": "hosts.json"}
JACCL = {"MLX_IBV_DEVICES": "rdma.json", "MLX_JACCL_COORDINATOR": "10.0.0.1:32323"}
WAIT = """
import sys
from core.engine import joining, ranks
joining.FIRST, joining.AGAIN, joining.LIMIT = map(float, sys.argv[2:])
ranks.join(sys.argv[1])
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts.json").write_text('[["a:1"], ["b:1"]]')
    (tmp_path / "rdma.json").write_text('[[null, "rdma_en5"], ["rdma_en5", null]]')
    (tmp_path / "bare.json").write_text('[["a"], ["b"]]')
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "odd.json").write_text('{"a": 1}')


@pytest.mark.parametrize(
    "backend, changes, message",
    [
        ("cuda", {"RANK": "2"}, "RANK='2': expected a whole number from 0 to 1"),
        ("cuda", {"RANK": "-1"}, "RANK='-1': expected a whole number from 0"),
        ("cuda", {"RANK": "1" * 5000}, "RANK='1111"),
        ("cuda", {"RANK": "x"}, "RANK='x': expected a whole number"),
        ("cuda", {"RANK": ""}, "RANK='': expected a whole number"),
        ("cuda", {"RANK": None}, "WORLD_SIZE='2', but RANK is not set: start the ranks with torchrun"),
        ("cuda", {"WORLD_SIZE": "0"}, "WORLD_SIZE='0': expected a whole number from 1"),
        ("cuda", {"MASTER_ADDR": None}, "MASTER_ADDR is not set: it names the machine of rank 0"),
        ("cuda", {"MASTER_PORT": None}, "MASTER_PORT is not set: expected a whole number from 1 to 65535"),
        ("cuda", {"MASTER_PORT": "65536"}, "MASTER_PORT='65536': expected a whole number from 1 to 65535"),
        ("cuda", {"LOCAL_RANK": "2"}, "LOCAL_RANK='2': expected a whole number from 0 to 1"),
        ("cuda", {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK='1': expected a whole number from 0 to 0"),
        ("mlx", {"MLX_RANK": "2"}, "MLX_RANK='2': expected a whole number from 0 to 1"),
        ("mlx", {"MLX_RANK": "one"}, "MLX_RANK='one': expected a whole number"),
        ("mlx", {"MLX_HOSTFILE": None}, "MLX_RANK is set but MLX_HOSTFILE is not"),
        ("mlx", {"MLX_HOSTFILE": "none.json"}, "names no host"),
        ("mlx", {"MLX_HOSTFILE": "odd.json"}, "names no host"),
        ("mlx", {"MLX_HOSTFILE": "missing.json"}, "no connection can be made of it"),
        ("mlx", {"MLX_HOSTFILE": "bare.json"}, "MLX_HOSTFILE=bare.json: rank 0 at 'a', expected its address and port"),
        ("mlx", {"MLX_JACCL_COORDINATOR": "10.0.0.1:7"}, "MLX_JACCL_COORDINATOR is set but MLX_IBV_DEVICES is not"),
        ("mlx", {"MLX_IBV_DEVICES": "rdma.json"}, "MLX_JACCL_COORDINATOR: rank 0 at '', expected its address and port"),
        ("mlx", {**JACCL, "MLX_JACCL_COORDINATOR": "10.0.0.1"}, "MLX_JACCL_COORDINATOR: rank 0 at '10.0.0.1'"),
        ("mlx", {**JACCL, "MLX_RANK": "2"}, "MLX_RANK='2': expected a whole number from 0 to 1"),
        ("mlx", {**JACCL, "MLX_IBV_DEVICES": "none.json"}, "MLX_IBV_DEVICES=none.json: names no host"),
    ],
)
def test_numbers_come_first(
    backend: str, changes: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.engine.ranks.importlib.import_module", lambda name: pytest.fail(f"{name} was imported"))
    for name, value in {**(WHOLE if backend == "cuda" else RING), **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        join(backend)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "rank, world, words",
    [
        ("0", "2", "rank 0 of 2 waits for rank 1 at localhost:29500"),
        ("1", "2", "rank 1 of 2 waits for rank 0 at localhost:29500"),
        ("0", "8", "rank 0 of 8 waits for whoever of ranks 1 to 7 is missing at localhost:29500"),
        ("3", "8", "rank 3 of 8 waits for rank 0 and whoever of the 8 ranks is missing at localhost:29500"),
    ],
)
def test_it_says_for_whom(rank: str, world: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**WHOLE, "RANK": rank, "WORLD_SIZE": world}.items():
        monkeypatch.setenv(name, value)
    assert joining.check_numbers("cuda") == words
    assert (joining.FIRST, joining.AGAIN, joining.LIMIT) == (5.0, 60.0, 600.0)  # what docs/launch.md says


@pytest.mark.parametrize(
    "variables, backend, address",
    [
        ({"MLX_HOSTFILE": "hosts.json"}, "ring", "a"),
        (JACCL, "jaccl", "10.0.0.1"),
        ({**JACCL, "MLX_JACCL_RING": "1"}, "jaccl", "10.0.0.1"),  # MLX reads MLX_JACCL_RING itself
    ],
)
def test_a_ring_and_jaccl(
    variables: dict[str, str], backend: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What mlx.launch sets decides how MLX connects, and where the heartbeat finds rank 0. JACCL itself is a fake."""
    from types import SimpleNamespace

    import backends.mlx.distributed as distributed

    asked: list[dict[str, object]] = []

    def init(**options: object) -> SimpleNamespace:
        asked.append(options)
        return SimpleNamespace(rank=lambda: 1, size=lambda: 2)

    monkeypatch.setattr(distributed.mx.distributed, "init", init)
    for name, value in {"MLX_RANK": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    ranks = join("mlx")
    assert asked == [{"strict": True, "backend": backend}]
    assert (ranks.rank, ranks.world, ranks.address) == (1, 2, address)


def test_no_jaccl_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where MLX has no JACCL its own words are in the one line that is said."""
    for name, value in {"MLX_RANK": "0", **JACCL}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"rank 0 of 2 waits for rank 1 at 10.0.0.1:32323, but cannot join \(.*jaccl"):
        join("mlx")


@pytest.mark.parametrize("backend, missing", [("cuda", 1), ("cuda", 0), ("mlx", 1)])
def test_a_rank_alone_waits_and_gives_up(backend: str, missing: int, tmp_path: Path) -> None:
    variables = environments(backend, 2, tmp_path)[1 - missing]
    command = [sys.executable, "-c", WAIT, backend, "0.5", "0.5", "1.2"]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if line.startswith("rank ")]
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert [line.startswith(f"rank {1 - missing} of 2 waits for rank {missing} at 127.0.0.1:") for line in lines]
    assert [line.partition(" (")[2] for line in lines[:2]] == [
        "0 s so far; it gives up after 1 s)", "1 s so far; it gives up after 1 s)"
    ], lines  # fmt: skip
    assert len(lines) == 3 and "nobody came within 1 s; start every rank, each with its own number" in lines[2]


def test_two_of_one_number(tmp_path: Path) -> None:
    """The second rank 0 is told so at once; the first one gives up."""
    first = environments("cuda", 2, tmp_path)[0]
    command = [sys.executable, "-c", WAIT, "cuda", "9", "9", "300"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, env={**os.environ, **first}, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    until = time.monotonic() + 240
    while all(one.poll() is None for one in both) and time.monotonic() < until:
        time.sleep(0.05)
    for one in both:
        one.terminate()
    said = [one.communicate()[1] for one in both]
    assert sum("cannot join" in text and "do two ranks have one number?" in text for text in said) == 1, said
