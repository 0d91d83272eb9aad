"""An ASGI application asked without a server: the status, the headers, and the answer as it comes."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple


class Answered(NamedTuple):
    """What came of one request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def events(self) -> list[tuple[str, Any]]:
        """Return (name, value) of every server-sent event."""
        parts = [part.split("\n") for part in self.body.decode().split("\n\n") if part and not part.startswith(":")]
        return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in parts]


async def ask(
    app: Any, path: str, query: str = "", host: str = "127.0.0.1", enough: Callable[[bytes], bool] = lambda body: False
) -> Answered:
    """Return the answer to a GET; the client goes away where `enough` of the body has come."""
    gone, told, body = asyncio.Event(), {}, bytearray()

    async def receive() -> dict[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            told.update(message)
        else:
            body.extend(message.get("body", b""))
            if enough(bytes(body)):
                gone.set()

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "GET",
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": "",
        "headers": [(b"host", host.encode())], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    headers = {name.decode(): value.decode() for name, value in told["headers"]}
    return Answered(told["status"], headers, bytes(body))
