"""`skc serve`: what it refuses in one line, and what a run and its artifact are behind it. Budget: 8 s."""

import asyncio
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import skc
from core.cli import main
from core.serve.run import Server
from core.training.run import Run
from core.verbs.serve import short_names
from shared_tests.support.command_line import Capture, call, refuse
from shared_tests.support.killed import small_data
from shared_tests.support.serving import request

BACKEND = ("--backend", "torch")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("serve")
    options = ("--train.steps", "1", "--train.seq", "32", "--eval.seq", "8", "--data.path", small_data(folder))
    assert main(["train", "debug", *options, "--out", str(folder / "run"), *BACKEND]) == 0
    return str(folder / "run")


class Asked:
    """What the server is asked in place of waiting for connections."""

    def __init__(self, *requests: tuple[Any, ...]) -> None:
        self.requests, self.replies = requests, []

    def run(self, server: Server, sockets: Any) -> None:
        """Answer the requests, as the server's loop would, and stop."""
        (place,) = sockets
        assert place.getsockname()[0] == "127.0.0.1"

        async def play() -> None:
            for method, path, body in self.requests:
                body = json.dumps(body).encode() if isinstance(body, dict) else body
                self.replies.append((await request(server.config.app, method, path, body)).json())

        asyncio.run(play())
        raise KeyboardInterrupt


@pytest.fixture
def no_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Let the server answer a list of requests and stop."""
    asked = Asked()
    monkeypatch.setattr(Server, "run", lambda server, sockets: asked.run(server, sockets))
    yield asked


def test_a_run_and_its_artifact_side_by_side(run: str, no_loop: Asked, capsys: Capture) -> None:
    prompt = {"prompt": "Number 7", "seed": 4, "max_tokens": 9, "temperature": 0.7}
    no_loop.requests = (
        ("GET", "/api/models", b""),
        ("POST", "/v1/completions", {"model": "run", **prompt}),
        ("POST", "/v1/completions", {"model": "artifact.skc", **prompt}),
        ("POST", "/api/score?model=run", b"The cat sat on the mat."),
    )
    value = call(capsys, "serve", run, f"{run}/artifact.skc", "--port", "0", *BACKEND)
    listed, by_run, by_artifact, scored = no_loop.replies
    assert value["models"] == listed["models"] and value["ok"]
    model = skc.load(run, backend="torch")
    size, last = Path(run, "artifact.skc").stat().st_size, listed["models"][0]
    assert [row["name"] for row in listed["models"]] == ["run", "artifact.skc"]
    assert [row["bytes"] for row in listed["models"]] == [size, size]
    final = Run.open(run).last("final/score")
    assert (last["score"], last["label"]) == (final["bpb"], "estimate") and final["label"] == "estimate"
    assert run not in json.dumps(listed)
    sampled = call(capsys, "sample", run, "--prompt", "Number 7", "--seed", "4", "--tokens", "9", "--temperature",
                   "0.7", "--top-k", "None", *BACKEND)  # fmt: skip
    (row,) = sampled["samples"]
    assert "Number 7" + by_run["choices"][0]["text"] == row["text"]
    assert by_artifact["usage"] == by_run["usage"]
    assert scored["bpb"] == pytest.approx(model.score("The cat sat on the mat.").bpb)


def test_names_are_as_short_as_they_tell_models_apart() -> None:
    assert short_names(("runs/a", "runs/b")) == ["a", "b"]
    assert short_names(("runs/a/artifact.skc", "runs/b/artifact.skc")) == ["a/artifact.skc", "b/artifact.skc"]
    assert short_names(("runs/a/", "runs/a/artifact.skc")) == ["a", "artifact.skc"]


def test_a_port_that_is_taken_is_one_line(run: str, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refuse(capsys, "serve", run, "--port", str(port))
    assert f"--port {port}: Address already in use" in line and "--port 0" in line


@pytest.mark.parametrize(
    "options, words",
    [
        (("--host", "0.0.0.0"), "--allow NAME"),
        (("--host", "::"), "--allow NAME"),
        (("--host", "0.0.0.0", "--allow", "http://a/"), "without http://"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid"),
        (("--port", "70000"), "0 (any that is free) to 65535"),
        (("--requests", "0"), "--requests 0: expected more than 0"),
        (("--seconds", "nan"), "--seconds nan"),
        (("--dtype", "float16", "--port", "0"), "float16"),
    ],
)
def test_what_cannot_be_served_is_one_line(run: str, capsys: Capture, options: tuple[str, ...], words: str) -> None:
    assert words in refuse(capsys, "serve", run, *options, *BACKEND)


def test_paths_are_checked(run: str, capsys: Capture) -> None:
    assert "no such run folder" in refuse(capsys, "serve", "nothing", "--port", "0")
    assert "a path stands there twice" in refuse(capsys, "serve", run, f"{run}/.", "--port", "0")
    assert "expected a run" in refuse(capsys, "serve")


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "brotli"])
def test_without_its_extra_it_says_what_to_install(
    run: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert f"needs {missing}, which is not installed; run: pip install -c constraints.txt -e '.[serve]'" in refuse(
        capsys, "serve", run
    )
