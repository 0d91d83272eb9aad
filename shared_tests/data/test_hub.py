"""The real huggingface_hub against a server on this machine: found, fetched, broken off, refused. Budget: 12 s."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import huggingface_hub
import pytest

from core.data.dataset import DataError, open_dataset
from core.data.fineweb import fetch_fineweb
from core.data.hub import Hub, Remote, check_file
from shared_tests.support.published import SHARDS, layout

ROOT = Path(__file__).resolve().parents[2]
REPO = "someone/shards"
COMMIT = "a" * 40
SHARD = "fineweb_train_000001.bin"


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Server(ThreadingHTTPServer):
    """As much of the hub as a download needs; `breaks` says how often the body of SHARD ends too early."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.commit = root, COMMIT
        self.asked: list[tuple[str, str | None]] = []
        self.breaks, self.status, self.spoilt = 0, 200, False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Answers for one repository at one commit."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        fields = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if unquote(self.path) != f"/api/datasets/{REPO}/paths-info/{self.server.commit}":
            return self.answer(404, b"", X_Error_Code="RevisionNotFound", X_Error_Message="no such commit")
        infos = []
        for path in fields["paths"]:
            file = self.server.root / path
            if file.is_dir():
                infos.append({"type": "directory", "path": path, "oid": "0" * 40})
            elif file.is_file():
                data = file.read_bytes()
                lfs = {"size": len(data), "oid": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
                info = {"type": "file", "path": path, "size": len(data), "oid": blob(data)}
                infos.append(info | ({"lfs": lfs} if path.endswith(".bin") else {}))
        return self.answer(200, json.dumps(infos).encode(), Content_Type="application/json")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path)
        if path.startswith(f"/api/datasets/{REPO}/revision/main"):
            info = {"id": REPO, "sha": self.server.commit, "siblings": [], "private": False, "tags": [], "downloads": 0}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        start = f"/datasets/{REPO}/resolve/{self.server.commit}/"
        if not path.startswith(start):
            return self.answer(404, b"", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        file = self.server.root / path.removeprefix(start)
        data = file.read_bytes()
        etag = hashlib.sha256(data).hexdigest() if file.suffix == ".bin" else blob(data)
        marks = {"X_Repo_Commit": self.server.commit, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        if self.command == "GET":
            self.server.asked.append((file.name, self.headers.get("Range")))
            if file.name == SHARD and self.server.status != 200:
                return self.answer(self.server.status, b"", X_Error_Message="no more today")
            if file.name == SHARD and self.server.spoilt:
                data = data[:-2] + b"\x05\x00"
            if file.name == SHARD and self.server.breaks:
                self.server.breaks -= 1
                self.close_connection = True
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                return None
        if wanted := self.headers.get("Range"):
            first = int(wanted.removeprefix("bytes=").split("-")[0])
            part = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.answer(206, data[first:], Content_Range=part, **marks)
        return self.answer(200, data, **marks)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    layout(tmp_path / "hub")
    huggingface_hub.close_session()
    with Server(tmp_path / "hub") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        huggingface_hub.close_session()
        server.shutdown()
        thread.join()


def test_a_download(server: Server, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    made = fetch_fineweb(Hub(REPO, endpoint=server.url), out, train_shards=1)["made_from"]
    assert (made["repo"], made["revision"]) == (REPO, COMMIT)
    first = len(server.asked)
    manifest = fetch_fineweb(Hub(REPO, endpoint=server.url), out)
    assert [name for name, _ in server.asked[first:]] == ["manifest.json", SHARD, "fineweb_train_000002.bin"]
    assert open_dataset(out).manifest == manifest and len(manifest["splits"]["train"]["files"]) == 3
    assert not list(tmp_path.glob(".*")) and not list((tmp_path / "out").glob(".*"))
    server.commit = "b" * 40
    with pytest.raises(DataError, match="another source .revision: aaaa.*, now bbbb"):
        fetch_fineweb(Hub(REPO, endpoint=server.url), out)


def test_the_verb_in_a_process_of_its_own(server: Server, tmp_path: Path) -> None:
    """Where nothing but the verb has imported the library, which loads its parts on first use."""
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    argv = [sys.executable, "-m", "core.cli", "data", "fineweb", "--json", "--out", str(tmp_path / "out"), "--repo"]
    done = subprocess.run([*argv, REPO], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["made_from"]["revision"] == COMMIT and "NOT the published" in done.stderr
    wrong = subprocess.run([*argv, "no/where"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("skc data fineweb: no/where at main: ")
    assert wrong.stderr.count("\n") == 1


def test_a_connection_that_breaks_is_taken_up_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By huggingface_hub: it asks for the rest, and what is put together is sound."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 16)
    server.breaks = 1
    fetch_fineweb(Hub(REPO, endpoint=server.url), str(tmp_path / "out"))
    size = (tmp_path / "hub" / SHARDS / SHARD).stat().st_size
    assert [where for name, where in server.asked if name == SHARD] == [None, f"bytes={size // 2}-"]


@pytest.mark.parametrize("status, spoilt, message", [(503, False, "no more today|503"), (200, True, "sha256: ")])
def test_a_download_that_fails_goes_on(server: Server, tmp_path: Path, status: int, spoilt: bool, message: str) -> None:
    server.status, server.spoilt = status, spoilt
    with pytest.raises(DataError, match=f"{SHARD}: .*({message}).* the same command") as caught:
        fetch_fineweb(Hub(REPO, endpoint=server.url), str(tmp_path / "out"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "manifest.json").exists()
    server.status, server.spoilt = 200, False
    before = len(server.asked)
    fetch_fineweb(Hub(REPO, endpoint=server.url), str(tmp_path / "out"))
    assert [name for name, _ in server.asked[before:]] == ["manifest.json", SHARD, "fineweb_train_000002.bin"]


def test_what_the_hub_says_no_to(server: Server, tmp_path: Path) -> None:
    for repo, message in (
        ("no/where", "no/where at main: .*"),
        ("a/b/c", "a/b/c at main: .*"),
        (f"{REPO}x", "404|not"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            Hub(repo, endpoint=server.url)
        assert "\n" not in str(caught.value)
    hub = Hub(REPO, endpoint=server.url)
    there = hub.find([SHARDS, f"{SHARDS}/{SHARD}", f"{SHARDS}/missing.bin"])
    assert list(there) == [f"{SHARDS}/{SHARD}"], "a folder is no file"
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()  # the connection that is still open
    with pytest.raises(DataError, match=f"{REPO} at main: .*efused") as caught:
        Hub(REPO, endpoint=server.url)
    assert "\n" not in str(caught.value)


def test_size_and_both_hashes_are_held_to_the_source(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"hello")
    sha256 = hashlib.sha256(b"hello").hexdigest()
    sound = Remote("x", 5, sha256, "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0")  # git hash-object
    assert check_file(file, sound, "here") == check_file(file, sound._replace(sha256=None), "here") == sha256
    with pytest.raises(DataError, match="x: size: 5 bytes, here says 6"):
        check_file(file, sound._replace(size=6), "here")
    with pytest.raises(DataError, match="x: sha256: 2cf24dba5fb0, here says 000"):
        check_file(file, sound._replace(sha256="0" * 64), "here")
    with pytest.raises(DataError, match="x: git hash: b6fc4c620b67, here says 000"):
        check_file(file, sound._replace(sha256=None, blob="0" * 40), "here")
