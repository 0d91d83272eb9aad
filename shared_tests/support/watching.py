"""Listening to the events of `skc watch` without a socket."""

import asyncio
from collections.abc import Callable
from typing import Any

from shared_tests.support.serving import Reply, request


async def listen(app: Any, enough: Callable[[bytes], bool] = lambda body: False, path: str = "/api/watch") -> Reply:
    """Return what an application tells a watcher, who leaves where `enough` has come; without the comments."""
    body = bytearray()

    def seen(message: dict[str, Any]) -> bool:
        body.extend(message.get("body", b""))
        return bool(body) and enough(bytes(body))

    reply = await request(app, "GET", path, seen=seen)
    blocks = [block for block in reply.body.split("\n\n") if not block.startswith(":")]
    return reply._replace(body="\n\n".join(blocks))


def watched(app: Any, enough: Callable[[bytes], bool] = lambda body: False) -> list[tuple[str, Any]]:
    """Return (name, value) of every event that a watcher is told."""
    return asyncio.run(listen(app, enough)).events()
