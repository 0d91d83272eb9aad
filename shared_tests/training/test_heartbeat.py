"""A dead rank ends the others, a slow one does not; a killed rank of a real run leaves its checkpoint. Budget: 40 s."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.engine import heartbeat
from core.engine.heartbeat import Heartbeat, HeartbeatError, _accept, _connect
from core.training.run import Run
from shared_tests.support.killed import small_data
from shared_tests.support.ranked import Seat, start

LIMIT = 60.0
"""Seconds in which the others must have ended; a rank in these tests counts as dead after 4 s of silence."""


def ended(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """Wait for processes and return their exit codes; whoever is left is killed."""
    until = time.monotonic() + seconds
    try:
        return [process.wait(timeout=max(0.1, until - time.monotonic())) for process in processes if seconds]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("how", ["kill", *(pytest.param(how, marks=pytest.mark.long) for how in ("stop", "raise"))])
def test_a_slow_rank_is_waited_for_and_a_dead_one_is_not(how: str, tmp_path: Path) -> None:
    """Rank 1 of 3 is busy for 6 s, longer than the silence that is allowed, then it is killed, stopped, or raises."""
    processes = start(
        "mlx", 3, ["-m", "shared_tests.support.ranked", "mlx", str(tmp_path), "beaten"], tmp_path, SKC_TEST_END=how
    )
    others = [processes[0], processes[2]] if how == "stop" else processes
    codes = ended(others, 240 + LIMIT)
    ended(processes, 0)
    assert all((tmp_path / f"slow-{rank}").exists() for rank in range(3)), "the slow rank was not waited for"
    said = [(tmp_path / f"rank-{rank}").read_text() for rank in range(3)]
    reason = {
        "kill": "rank 1 ended without a word (killed?)",
        "stop": "rank 1 was not heard for 4 s",
        "raise": "rank 1 failed (ValueError: a disk is full)",
    }[how]
    # MLX's own ring writes of dead peers too, piece by piece and cut where the process ends: around our line, not in it
    assert said[0].count("all ranks stop") == 1, said[0]
    assert f"{reason}; all ranks stop; go on from the checkpoint\n" in said[0]
    ours = [line for line in said[2].splitlines() if not line.startswith("[ring]")]
    assert ours == [] and codes[0] == codes[-1] == 1, "rank 0 speaks for all"


def test_the_last_word_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two could be parted by what MLX's ring writes meanwhile."""
    written: list[str] = []
    monkeypatch.setattr(heartbeat.os, "_exit", lambda code: None)
    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    heartbeat.end_process("rank 1 is\ngone")
    heartbeat.end_process(None)
    assert written == ["rank 1 is gone\n"]


def test_a_killed_rank_ends_the_run_and_the_checkpoint_goes_on(tmp_path: Path) -> None:
    """kill -9 of rank 1 while it trains: rank 0 says so and exits 1; what was saved is whole and is gone on from."""
    data = small_data(tmp_path)
    command = ["-m", "core.cli", "train", "debug", "--backend", "cuda", "--data.path", data, "--train.save-every", "5"]
    command += ["--train.log-every", "5", "--train.sample-every", "None", "--out", str(tmp_path / "run")]
    processes = start("cuda", 2, [*command, "--train.steps", "100000"], tmp_path)
    checkpoint = tmp_path / "run" / "state" / "checkpoint.safetensors"
    until = time.monotonic() + 300
    while not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert checkpoint.exists(), (tmp_path / "rank-0").read_text()
    began = time.monotonic()
    os.kill(processes[1].pid, signal.SIGKILL)
    codes = ended(processes, LIMIT)
    assert codes == [1, -signal.SIGKILL] and time.monotonic() - began < LIMIT
    last = (tmp_path / "rank-0").read_text().splitlines()[-1]
    assert last == (
        "rank 1 ended without a word (killed?); all ranks stop; the same command goes on from the last checkpoint in "
        f"{tmp_path / 'run'}"
    )
    saved = Run.open(tmp_path / "run").checkpoint()
    assert saved is not None and saved.step >= 5 and saved.step % 5 == 0
    assert (tmp_path / "rank-1").read_text() == "", "rank 0 speaks for all"


def test_only_rank_0_tells_the_user(tmp_path: Path) -> None:
    """Input that is wrong on every rank is said once; a run whose ranks have other settings is refused."""
    data = small_data(tmp_path, 20)
    processes = start("mlx", 2, ["-m", "core.cli", "train", "nothing", "--data.path", data], tmp_path)
    assert ended(processes, 300) == [2, 2]
    assert (tmp_path / "rank-0").read_text().startswith("skc train: preset 'nothing' does not exist")
    assert (tmp_path / "rank-1").read_text() == ""


def test_the_key_is_asked_for() -> None:
    """Whoever connects without the key is sent away, and ranks that never come are named."""
    server = socket.create_server(("127.0.0.1", 0))
    address = server.getsockname()
    found: dict[int, socket.socket] = {}
    thread = threading.Thread(target=lambda: found.update(_accept(server, 1, "secret")))
    thread.start()
    for line in (b"wrong 1\n", b"secret one\n", b"secret 1\nbeat\n"):
        with socket.create_connection(address) as connection:
            connection.sendall(line)
            time.sleep(0.1)
    thread.join(timeout=60)
    assert list(found) == [1] and found[1].recv(9) == b"beat\n", "what comes after the key is not lost"
    found[1].close()


class Beside(Seat):
    """Rank 1 of 2, whose rank 0 is a socket of the test."""

    address = "127.0.0.1"

    def __init__(self, port: int) -> None:
        super().__init__(1, 2)
        self.port = port

    def broadcast(self, value: bytes) -> bytes:
        return json.dumps([self.port, "key"]).encode()


@pytest.mark.parametrize("news", [True, False])
def test_a_rank_that_fails_hears_first_whether_another_died(news: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective fails when a rank dies: rank 0's word for that comes before the failure, which it caused."""
    if not news:
        monkeypatch.setattr("core.engine.heartbeat.HEARING", 0.2)
    lost: list[str | None] = []
    ours: list[socket.socket] = []
    theirs: list[socket.socket] = []
    monkeypatch.setattr("core.engine.heartbeat._connect", lambda *to: ours.append(_connect(*to)) or ours[-1])
    with socket.create_server(("127.0.0.1", 0)) as server:
        heartbeat = Heartbeat(Beside(server.getsockname()[1]), lost.append, beat=0.05)
        with pytest.raises(ValueError, match="a peer is gone"), heartbeat:
            theirs.append(server.accept()[0])
            if news:
                threading.Timer(0.3, theirs[0].sendall, [b"lost\n"]).start()
            raise ValueError("a peer is gone")
    with theirs[0] as connection, ours[0]:  # a process that is lost ends, and closes its own
        connection.settimeout(5)
        sent = b"".join(iter(lambda: connection.recv(4096), b"")) if not news else connection.recv(4096)
    assert lost == ([None] if news else [])
    assert (b"failed ValueError: a peer is gone\n" in sent) is not news


def test_a_rank_that_cannot_connect_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed port, and ranks that never come."""

    class Apart(Seat):
        address = "127.0.0.1"

        def broadcast(self, value: bytes) -> bytes:
            return json.dumps([1, "key"]).encode()

    with (
        pytest.raises(HeartbeatError, match="rank 1 cannot reach rank 0 at 127.0.0.1:1 .*open the ports"),
        Heartbeat(Apart(1, 2)),
    ):
        pass
    monkeypatch.setattr("core.engine.heartbeat.CONNECT", 0.2)
    with pytest.raises(HeartbeatError, match=r"ranks \[1, 2\] did not connect"):
        _accept(socket.create_server(("127.0.0.1", 0)), 2, "key")
