"""The HTTP server: aiohttp's protocol, as little of it as is needed.

Lives here: everything that knows aiohttp. Must not: know what is answered. Imported only when
something listens: it takes a tenth of a second and 8 MB.
"""

import asyncio
import logging
import socket

import structlog
from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader
from aiohttp.web_protocol import RequestHandler

from vipd.proxy.http.answer import BROKEN, Respond
from vipd.proxy.http.crowd import Bounded, Crowd

LONGEST_LINE = 8190
"""Bytes of the request's first line, and of each header."""
MOST_COMPLAINTS = 16

log = structlog.get_logger()

_silent = logging.getLogger("vipd.proxy.http")
"""For aiohttp, which logs what strangers send."""
_silent.disabled = True


class _Request(web.BaseRequest):
    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        """Finish the headers of every answer, those included that aiohttp makes of bad requests."""
        response.headers.popall("Server", None)
        response.headers["X-Content-Type-Options"] = "nosniff"


class _Protocols(web.Server):
    """Makes the protocol of each connection."""

    def __init__(self, respond: Respond) -> None:
        self._respond = respond
        self._complained: set[str] = set()
        super().__init__(
            self._handle,
            request_factory=self._request,
            logger=_silent,
            access_log=None,
            max_line_size=LONGEST_LINE,
            max_field_size=LONGEST_LINE,
            lingering_time=0,
        )

    def _request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: "asyncio.Task[None]",
    ) -> web.BaseRequest:
        return _Request(message, payload, protocol, writer, task, asyncio.get_running_loop())

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.path
        try:
            answer = await self._respond(request.method, path)
        except Exception as error:
            answer = BROKEN
            self._complain(path, error)
        response = web.Response(
            body=answer.body,
            status=answer.status,
            headers={"Content-Type": answer.content_type, **answer.headers},
        )
        response.force_close()  # one request for each connection: crowd.py
        return response

    def _complain(self, path: str, error: Exception) -> None:
        """Log that a page is broken, once for each: whoever asks must not fill the log."""
        if path not in self._complained and len(self._complained) < MOST_COMPLAINTS:
            self._complained.add(path)
            log.error("page is broken", path=path, why=str(error), exc_info=error)


async def serve(listening: socket.socket, respond: Respond, crowd: Crowd) -> asyncio.Server:
    """Answer on a socket that listens, until the server is closed."""
    protocols = _Protocols(respond)
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: Bounded(crowd, protocols()), sock=listening)
