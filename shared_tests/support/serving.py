"""What tests of the server share: a model with random weights that is served, and requests without a socket."""

import asyncio
import functools
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from core import presets
from core.config import RunConfig, changed
from core.data.bundled import BUNDLED
from core.data.tokenizer import Tokenizer
from core.engine.loading import load_engine
from core.engine.protocol import EngineOptions
from core.serve.api import Api
from core.serve.guards import LOOPBACK
from core.serve.limits import Limits
from core.serve.models import Served
from core.serve.openai import Completions
from core.serve.page_files import page_routes
from core.serve.run import application
from core.serve.shared_engine import SharedEngine
from core.serve.work import Client, Places
from shared_tests.support.harness import working_weights

PARTS = {
    "dim": 32, "layers": 2, "blocks": ("skc", "skc_parallel"), "koopman.dim": 32, "skc.capsules": 4, "skc.block": 8,
    "bank.at": "both", "bank.capsules": 4, "engram.orders": 2, "engram.heads": 2, "engram.buckets": 101,
    "engram.dim": 16,
}  # fmt: skip
"""What makes of `debug` a model with all parts whose output can be set to 0."""
THREAD = ThreadPoolExecutor(1)


@functools.cache
def bundled_tokenizer() -> Tokenizer:
    """Return the bundled tokenizer."""
    return Tokenizer.load(str(BUNDLED / "tokenizer.model"))


@functools.cache
def served(backend: str, parts: bool = False) -> Served:
    """Return `debug`, or that with PARTS, with working weights on a backend."""
    config = presets.get("debug").config
    config = RunConfig(preset="debug", model=changed(config.model, PARTS), train=config.train) if parts else config
    build = functools.partial(load_engine, backend, config, options=EngineOptions(compile=False))  # which takes long
    engine = SharedEngine(THREAD.submit(build, working_weights(config.model, 1.0)).result(), THREAD)
    model = Served("parts" if parts else "debug", "random weights", config, bundled_tokenizer(), engine)
    model.build = build
    return model


def app_of(models: Sequence[Served], limits: Limits | None = None, stopping: threading.Event | None = None) -> Any:
    """Return the application that serves models."""
    places = Places(limits or Limits(), stopping)
    routes = [*page_routes(), *Api(list(models), places).routes(), *Completions(list(models), places).routes()]
    return application(routes, LOOPBACK)


class Reply(NamedTuple):
    """An answer."""

    status: int
    headers: dict[str, str]
    body: str

    def json(self) -> Any:
        """Return the JSON value of the body."""
        return json.loads(self.body)

    def events(self) -> list[tuple[str, Any]]:
        """Return (name, value) of every server-sent event; what is no JSON as text."""
        found = []
        for block in self.body.strip().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            data = fields["data"]
            found.append((fields.get("event", "message"), data if data == "[DONE]" else json.loads(data)))
        return found


async def request(
    app: Any,
    method: str,
    path: str,
    body: bytes | Iterable[bytes | None] = b"",
    headers: Iterable[tuple[str, str]] = (),
    seen: Callable[[dict[str, Any]], bool] = lambda message: False,
) -> Reply:
    """Return an application's answer to a request; the client leaves once `seen` says so of a message that it got.

    `body`: parts of it come in chunks, without a length; None: what is behind it never comes.
    """
    whole, left, messages = isinstance(body, bytes), asyncio.Event(), []
    waiting = [body] if isinstance(body, bytes) else list(body)
    given = {"host": "127.0.0.1:8000", **({"content-length": str(len(body))} if isinstance(body, bytes) else {})}
    pairs = [(k, v) for k, v in given.items() if k not in dict(headers)] + [h for h in headers if h[1]]
    where, _, query = path.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": where, "raw_path": where.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in pairs], "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        if waiting and waiting[0] is not None:
            part = waiting.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(waiting) and not whole}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        messages.append(message)
        if seen(message):
            left.set()

    await app(scope, receive, send)
    heads = [message for message in messages if message["type"] == "http.response.start"]
    if not heads:
        return Reply(0, {}, "")
    text = b"".join(message["body"] for message in messages if message["type"] == "http.response.body").decode()
    return Reply(heads[0]["status"], {k.decode(): v.decode() for k, v in heads[0]["headers"]}, text)


def ask(app: Any, method: str, path: str, body: Any = b"", **options: Any) -> Reply:
    """Return an application's answer to one request; a body that is no bytes goes as JSON."""
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    return asyncio.run(request(app, method, path, body, **options))


def never() -> Client:
    """Return a client that waits for ever."""
    return Client(1e9, threading.Event())
