"""The pages: files of the package, and nothing else from the disk."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from core.files import MAX_TEXT, read_file

PAGE = Path(__file__).parent / "page"
TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
SHARED = ("page.css", "icon.svg", "dom.js", "chart.js")
FILES = {
    "index.html": ("page.js", "stream.js", "tokens.js", *SHARED),
    "watch.html": ("watch.js", "watch_run.js", "watch_store.js", *SHARED),
}
"""Each page's file -> what it loads."""


def page_routes(page: str = "index.html") -> list[Route]:
    """Return the routes of a page, at / the page itself."""
    return [_route("/", page), *(_route(f"/{name}", name) for name in FILES[page])]


def _route(path: str, name: str) -> Route:
    async def answer(request: Request) -> Response:
        return Response(read_file(PAGE / name, MAX_TEXT), media_type=TYPES[Path(name).suffix])

    return Route(path, answer)
