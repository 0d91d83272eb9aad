"""The page: three files of the package, and nothing else from the disk."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from core.files import MAX_TEXT, read_file

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript"),
}  # fmt: skip
"""Each route's file and its type."""


def page_routes() -> list[Route]:
    """Return the routes of the page."""
    return [Route(path, _page_file) for path in FILES]


async def _page_file(request: Request) -> Response:
    name, kind = FILES[request.url.path]
    return Response(read_file(PAGE / name, MAX_TEXT), media_type=kind)
