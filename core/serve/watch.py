"""The routes of `skc watch`: its page, and what the page is told, as server-sent events."""

import json
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Protocol

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from core.files import MAX_TEXT, FileError, read_file
from core.serve.guards import Refused
from core.serve.watch_run import RunFeed, WatchEvent
from core.training.records import RunError

EVERY = 0.5
"""Seconds between two looks at the sizes of the files."""
STILL = 30
"""Looks without news after which a comment is sent: a proxy must not take the stream for dead."""
MOST_NAMED = 5
"""Runs that are named to a user who gave the folder that holds them."""
MOST_WATCHERS = 32
"""Pages that are told at the same time."""


class Feed(Protocol):
    """What a watcher follows."""

    def look(self) -> list[WatchEvent]:
        """Return what is new since the last look."""
        ...


def check_watched(path: str) -> Path:
    """Return the path of a run, of a store, or of nothing yet; RunError for anything else."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{path}: is a file, expected a run folder or a store of ablations")
    if not folder.is_dir() or shows_ablations(folder) or (folder / "config.json").exists():
        return folder
    names = {file.name for file in folder.iterdir()} - {"state", "lock"}  # what a run has that begins now
    if not names:
        return folder
    runs = sorted(name for name in names if (folder / name / "config.json").exists())[:MOST_NAMED]
    hint = f"it holds {', '.join(runs)}: skc watch {folder / runs[0]}" if runs else "skc train tiny --out makes one"
    raise RunError(f"{path}: is no run (it has no config.json) and no store of ablations; {hint}")


def shows_ablations(folder: Path) -> bool:
    """Return whether a folder is watched as ablations: a store of them, or one of its ablations."""
    return (folder / "ablations").is_dir() or (folder / "members.json").exists()


def store_of(folder: Path, name: str | None) -> tuple[Path, str | None]:
    """Return a store and the name of an ablation, for a store and a name, or for the folder of an ablation."""
    if (folder / "members.json").exists():
        return folder.resolve().parents[1], folder.resolve().name
    return folder, name


def feed_of(folder: Path, name: str | None = None) -> Feed:
    """Return what a new watcher of a folder follows; `name` is an ablation of a store."""
    if not shows_ablations(folder):
        return RunFeed(folder)
    from core.serve.watch_store import StoreFeed  # scipy, which a run does not need

    return StoreFeed(*store_of(folder, name))


class Watchers:
    """The route of the events, and who listens."""

    def __init__(self, folder: Path, stopping: threading.Event, every: float = EVERY) -> None:
        self._folder, self._stopping, self._every = folder, stopping, every
        self._listening = 0

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [Route("/api/watch", self.watch), Route("/report", self.report)]

    async def watch(self, request: Request) -> Response:
        """Tell one watcher what there is, and then what is new, until the watcher or the server goes."""
        if self._listening >= MOST_WATCHERS:
            raise Refused(429, f"{self._listening} pages are watching, the most at once: close one")
        return StreamingResponse(self.events(request.query_params.get("name")), media_type="text/event-stream")

    async def report(self, request: Request) -> Response:
        """Return report.html of an ablation, which loads nothing and runs nothing: the page says so itself."""
        from core.ablation.report.page import POLICY
        from core.serve.watch_store import ablations, report_file

        store, name = store_of(self._folder, request.query_params.get("name"))
        try:
            if name not in ablations(store):
                raise Refused(404, "no ablation of this name is here")
            html = read_file(report_file(store, name), MAX_TEXT, follow=False)
        except (FileError, OSError) as error:
            raise Refused(404, f"the report cannot be read: {error}") from error
        return Response(html, media_type="text/html", headers={"content-security-policy": POLICY})

    async def events(self, name: str | None = None) -> AsyncGenerator[str]:
        """Yield server-sent events; a folder that becomes a store is followed as one."""
        kind, feed, quiet = shows_ablations(self._folder), feed_of(self._folder, name), 0
        self._listening += 1
        try:
            while not self._stopping.is_set():
                if shows_ablations(self._folder) != kind:
                    kind, feed = shows_ablations(self._folder), feed_of(self._folder, name)
                told = await run_in_threadpool(feed.look)  # a slow disk holds up no other watcher
                for event in told:
                    yield server_sent(event.name, event.value)
                quiet = 0 if told else quiet + 1
                if quiet == STILL:
                    quiet = 0
                    yield ": still here\n\n"
                await anyio.sleep(self._every)
        finally:
            self._listening -= 1


def server_sent(name: str, value: dict[str, Any]) -> str:
    """Return one server-sent event; JSON has no line ends of its own."""
    return f"event: {name}\ndata: {json.dumps(value, allow_nan=False)}\n\n"
