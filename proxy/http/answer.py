"""What is answered to a request: status, body, headers.

Lives here: the record that pages make and server.py sends. Pure. Must not: know aiohttp.
"""

from collections.abc import Awaitable, Callable, Mapping

from msgspec import Struct

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
HTML = "text/html; charset=utf-8"
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' text format."""
READING = ("GET", "HEAD")


class Answer(Struct, frozen=True):
    """An answer. Every one is sent with ``X-Content-Type-Options: nosniff``."""

    body: bytes = b""
    content_type: str = TEXT
    status: int = 200
    headers: Mapping[str, str] = {}


NOT_FOUND = Answer(b"404 page not found\n", status=404)
NOT_ALLOWED = Answer(b"only GET and HEAD\n", status=405, headers={"Allow": ", ".join(READING)})
BROKEN = Answer(b"internal error; the log says more\n", status=500)

Page = Callable[[], Awaitable[Answer]]
Respond = Callable[[str, str], Awaitable[Answer]]
"""Takes method and path (without a query)."""


def pages(by_path: Mapping[str, Page]) -> Respond:
    """Return what answers reading requests with the page at their path."""

    async def respond(method: str, path: str) -> Answer:
        page = by_path.get(path)
        if page is None:
            return NOT_FOUND
        if method not in READING:
            return NOT_ALLOWED
        return await page()

    return respond
