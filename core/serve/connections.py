"""How many connections a server holds: one that asks nothing gives its place to one that comes."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 128
"""With ACCEPTED and what else a process has open fewer than the 256 files that macOS allows one."""
ACCEPTED = 64
"""Connections that are taken up at once, before any of them is looked at."""


class Connection(H11Protocol):
    """A connection that takes the place of the longest idle one where MOST_CONNECTIONS are open.

    Where all others are at work it is closed itself: without a bound, the process would run out of open files.
    """

    def connection_made(self, transport: Any) -> None:  # uvicorn's type: a transport of its own event loop
        """Take up the connection, or close one."""
        super().connection_made(transport)
        self._opened = asyncio.get_running_loop().time()
        if len(self.connections) > MOST_CONNECTIONS:
            idle = [one for one in self.connections if isinstance(one, Connection) and one.idle and one is not self]
            min(idle, key=lambda one: one._opened, default=self).transport.abort()

    @property
    def idle(self) -> bool:
        """Whether no request has come, in whole, that is not answered yet."""
        return not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)
