"""Work of a request in a thread: so many at once, so long at most, and none for a client that has gone."""

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import anyio
import anyio.from_thread
import anyio.to_thread
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from core.console import one_line
from core.engine.memory import is_memory, memory_message
from core.serve.guards import Refused, error_object
from core.serve.limits import Limits

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
MOMENT = 1.0
"""Seconds that a client has to read the end of an answer when its time is over."""
RETRY = "1"
"""Seconds after which a client may ask again that was told that all places are taken."""


class Gone(Exception):
    """Nobody waits for the answer: the client went away, or reads no more."""


class Client:
    """Whoever waits for an answer, as the thread that works for them sees them."""

    def __init__(self, seconds: float, stopping: threading.Event) -> None:
        self.seconds, self._end, self._stopping = seconds, time.monotonic() + seconds, stopping
        self.left = threading.Event()

    @property
    def rest(self) -> float:
        """Seconds until the answer has to be there."""
        return self._end - time.monotonic()

    def waits(self) -> bool:
        """Return whether there is time left; Gone if nobody waits, Refused if the server stops."""
        if self.left.is_set():
            raise Gone
        if self._stopping.is_set():
            raise Refused(503, "the server stops")
        return self.rest > 0

    def require_time(self) -> None:
        """Raise Refused if the time is over, or as `waits` does."""
        if not self.waits():
            raise Refused(
                503, f"took longer than {self.seconds:g} seconds, the most that this server gives (--seconds)"
            )


class Places:
    """How many requests may run, and how many do; all of it in the server's own thread."""

    def __init__(self, limits: Limits, stopping: threading.Event | None = None) -> None:
        self.limits, self.stopping = limits, stopping or threading.Event()
        self.running = 0
        self._threads = anyio.CapacityLimiter(limits.requests)

    def answer(self, work: Callable[[Client], Any]) -> "WorkAnswer":
        """Return the answer to a request: one JSON value, which `work` returns."""
        return WorkAnswer(self, work)

    def events(self, work: Callable[[Client], Generator[str]]) -> "WorkAnswer":
        """Return the answer to a request: server-sent events, which `work` yields."""
        return WorkAnswer(self, work, stream=True)

    async def run(self, work: Callable[[Client], Any], client: Client, receive: Receive) -> Any:
        """Return what `work` returns in a thread, while somebody waits for it; Refused if all places are taken."""
        if self.running >= self.limits.requests:
            raise Refused(
                429, f"{self.running} requests are running, the most at once; try again", **{"Retry-After": RETRY}
            )
        self.running += 1
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(_watch, receive, client)
                outcome = await anyio.to_thread.run_sync(_outcome, work, client, limiter=self._threads)
                group.cancel_scope.cancel()
        finally:
            client.left.set()
            self.running -= 1
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def _outcome(work: Callable[[Client], Any], client: Client) -> Any:
    """Return what `work` returns, or what it raises: a group of tasks would wrap it in a group of exceptions."""
    try:
        return work(client)
    except Exception as error:
        return as_refusal(error) or error


def as_refusal(error: Exception) -> Refused | None:
    """Return what to tell a client of an error that is no bug: one of our own types, or too little memory."""
    if isinstance(error, Refused):
        return error
    if is_memory(error):
        return Refused(503, memory_message(error))
    own = isinstance(error, ValueError) and type(error).__module__.startswith("core.")
    return Refused(400, one_line(error)) if own else None


async def _watch(receive: Receive, client: Client) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    client.left.set()


class WorkAnswer:
    """An ASGI application that answers one request by work in a thread."""

    def __init__(self, places: Places, work: Callable[[Client], Any], stream: bool = False) -> None:
        self._places, self._work, self._stream = places, work, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Work and answer, as long as somebody waits."""
        client = Client(self._places.limits.seconds, self._places.stopping)
        work = functools.partial(self._tell, send) if self._stream else self._work
        try:
            value = await self._places.run(work, client, receive)
        except Gone:
            return
        if self._stream:
            await send({"type": "http.response.body", "body": b""})
        else:
            await JSONResponse(value)(scope, receive, send)

    def _tell(self, send: Send, client: Client) -> None:
        """Send what the work yields while it comes, from its thread; a refusal as an event, once others were sent."""
        begun = False

        def say(message: Message) -> None:
            anyio.from_thread.run(_send, client, send, message)

        with contextlib.closing(self._work(client)) as parts:
            try:
                for part in parts:
                    client.waits()
                    if not begun:
                        say({"type": "http.response.start", "status": 200, "headers": EVENTS})
                        begun = True
                    say({"type": "http.response.body", "body": part.encode(), "more_body": True})
            except Exception as error:
                refused = as_refusal(error)
                if refused is None or not begun:
                    raise
                value = {"message": refused.message, **error_object(refused.status, refused.message)}
                last = f"event: error\ndata: {json.dumps(value)}\n\n"
                say({"type": "http.response.body", "body": last.encode(), "more_body": True})


async def _send(client: Client, send: Send, message: Message) -> None:
    """Send a part of an answer to a client that reads while there is time, and a moment longer: the end comes then."""
    with anyio.move_on_after(max(MOMENT, client.rest)) as waiting:
        await send(message)
    if waiting.cancelled_caught:
        raise Gone
