"""Verb `skc watch RUN|STORE`: the report of a run or of ablations as a page that goes on while they train."""

import threading
from dataclasses import dataclass

from tyro.conf import Positional

from core.verbs.common import Context, Outcome


@dataclass(frozen=True)
class WatchOptions:
    """Options of `skc watch`."""

    path: Positional[str]
    """Run folder or store of ablations; one that is still to come is waited for."""
    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 is reached from this machine only."""
    port: int = 8001
    """Port to listen at; 0: any that is free."""
    allow: tuple[str, ...] = ()
    """Further names under which requests may reach this server: those of this machine, or of a proxy in front of it."""
    json: bool = False
    """Print one JSON object on stdout; everything else goes to stderr."""


def watch_folder(options: WatchOptions, context: Context) -> Outcome:
    """Show a folder until Ctrl-C; nothing is written into it."""
    from core.serve.limits import require_libraries

    require_libraries("skc watch")
    from core.serve.page_files import page_routes
    from core.serve.run import serve_routes
    from core.serve.watch import Watchers, check_watched

    folder, stopping, say = check_watched(options.path), threading.Event(), context.say
    if not folder.exists():
        say(f"{folder} does not exist yet: the page waits for it")
    routes = [*page_routes("watch.html"), *Watchers(folder, stopping).routes()]
    serve_routes(
        routes, options.host, options.port, options.allow, lambda url: say(f"{url}  (Ctrl-C ends it)"), stopping
    )
    say("stopped")
    return Outcome(True, {"watched": str(folder)})
