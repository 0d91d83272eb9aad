"""More connections than a server holds: those that ask nothing make room, those at work are kept. Budget: 1 s."""

import asyncio
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from core.serve import connections
from core.serve.connections import ACCEPTED, MOST_CONNECTIONS, Connection


class Line(asyncio.Transport):
    """A transport that remembers what was sent, and whether it was closed."""

    def __init__(self, connection: Connection, data: bytes = b"") -> None:
        super().__init__()
        self.closed, self.sent, self._connection = False, b"", connection
        connection.connection_made(self)
        if data:
            connection.data_received(data)

    def write(self, data: Any) -> None:
        """Remember."""
        self.sent += data

    def is_closing(self) -> bool:
        """Return whether it was closed."""
        return self.closed

    def abort(self) -> None:
        """Close, as an event loop does: the connection hears of it later."""
        self.closed = True
        asyncio.get_running_loop().call_soon(self._connection.connection_lost, None)

    close = abort


def test_idle_connections_make_room_and_those_at_work_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 3)
    asked = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def play() -> None:
        go_on = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await go_on.wait()
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

        config, state = uvicorn.Config(app, log_config=None, lifespan="off"), ServerState()

        async def connect(data: bytes = b"") -> Line:
            line = Line(Connection(config, state, {}), data)
            await asyncio.sleep(0)
            return line

        work, *idle = [await connect(asked), await connect(), await connect(b"GET / HT"), await connect()]
        assert [line.closed for line in (work, *idle)] == [False, True, False, False], "the longest idle one goes"
        more = [await connect(asked), await connect(asked)]
        assert [line.closed for line in (*idle, *more)] == [True, True, True, False, False]
        assert (await connect(asked)).closed, "the one that comes goes where all others are at work"
        go_on.set()
        await asyncio.gather(*state.tasks)
        assert all(line.sent.startswith(b"HTTP/1.1 204") and not line.closed for line in (work, *more))
        await connect()
        assert work.closed, "one that was answered is idle"
        for connection in list(state.connections):
            connection.transport.close()
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_process_of_256_files_has_room_for_all() -> None:
    assert MOST_CONNECTIONS + ACCEPTED <= 256 - 60
