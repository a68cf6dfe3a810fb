"""Requests to the API server: the one place that speaks HTTP to it.

Lives here: connections, time limits, bounds on what is read, and what a failed request means.
Must not: decide what to ask next (following.py).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING

from vipd.proxy.sources.kubernetes import wire
from vipd.proxy.sources.kubernetes.credentials import Access, Credentials, place
from vipd.proxy.version import VERSION

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 60.0
"""Without a byte for so long a list or a single answer is given up; the head of an answer has to
be there as a whole by then."""
WHOLE_SECONDS = 300.0
"""An answer that is not there as a whole by then is given up, however steadily it comes."""
MAX_PAGE_BYTES = 32 << 20
MAX_ERROR_BYTES = 64 << 10
CHUNK_BYTES = 1 << 18
MOST_REASON = 300
"""Characters that are told of what others say of a failure."""
MOST_RETRY_SECONDS = 1 << 16
"""Far beyond what is obeyed (pace.py), and a number that every float holds."""


class ApiError(Exception):
    """A request failed. `code` is HTTP's, 0 where there was no answer; the text says why."""

    def __init__(self, code: int, why: str, retry_after: float | None = None) -> None:
        super().__init__(why)
        self.code = code
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""


class TooLarge(ApiError):
    """An answer is larger than what is read."""

    def __init__(self) -> None:
        super().__init__(0, f"the answer is larger than {MAX_PAGE_BYTES >> 20} MiB")


class Api:
    """The API server that credentials lead to. Each watch has a connection of its own."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._session: ClientSession | None = None

    @property
    def origin(self) -> str:
        """Where credentials come from, for messages before a server is known."""
        return self._credentials.origin

    async def get(self, path: str, params: Mapping[str, str]) -> bytes:
        """Return a whole answer. Raise ApiError, TooLarge or SourceError."""
        async with (
            self._asked("GET", path, params, ANSWER_SECONDS) as response,
            asyncio.timeout(WHOLE_SECONDS),
        ):
            parts, size = [], 0
            while chunk := await response.content.read(CHUNK_BYTES):
                size += len(chunk)
                if size > MAX_PAGE_BYTES:
                    raise TooLarge
                parts.append(chunk)
            return b"".join(parts)

    async def post(self, path: str, body: bytes) -> None:
        """Create an object. Raise ApiError or SourceError."""
        async with self._asked("POST", path, {}, ANSWER_SECONDS, body):
            pass

    async def patch(self, path: str, body: bytes) -> None:
        """Change an object by a merge patch (RFC 7386). Raise ApiError or SourceError."""
        async with self._asked("PATCH", path, {}, ANSWER_SECONDS, body):
            pass

    @contextlib.asynccontextmanager
    async def watch(
        self, path: str, params: Mapping[str, str], silence: float
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Give the chunks of a watch, as they come; without one for `silence` seconds it fails.

        Raise ApiError or SourceError.
        """
        async with self._asked("GET", path, {**params, "watch": "true"}, silence) as response:
            yield response.content.iter_any()

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()

    @contextlib.asynccontextmanager
    async def _asked(
        self,
        method: str,
        path: str,
        params: Mapping[str, str],
        silence: float,
        body: bytes | None = None,
    ) -> "AsyncIterator[ClientResponse]":
        # It imports for 0.2 s and 25 MB; who reads manifests does not pay.
        from aiohttp import ClientError, ClientTimeout

        access = await self._credentials.access()
        headers = {"Accept": "application/json"}
        if access.authorization:
            headers["Authorization"] = access.authorization
        if body is not None:
            form = "merge-patch+json" if method == "PATCH" else "json"
            headers["Content-Type"] = f"application/{form}"
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(ANSWER_SECONDS):
                    request = self._pool().request(
                        method,
                        f"{access.server}{path}",
                        params=params,
                        data=body,
                        headers=headers,
                        timeout=ClientTimeout(
                            total=None, sock_connect=CONNECT_SECONDS, sock_read=silence
                        ),
                        ssl=access.ssl if access.ssl is not None else True,
                        server_hostname=access.server_name,
                        proxy=access.proxy,
                        allow_redirects=False,  # credentials are for this server only
                    )
                    try:
                        response = await stack.enter_async_context(request)
                    except ValueError as error:
                        if isinstance(error, ClientError):  # some are both
                            raise
                        # A name that TLS or the resolver cannot take.
                        raise ApiError(
                            0, f"cannot be asked: {_plain(str(error), access)}"
                        ) from None
                    if response.status >= 300:
                        await self._fail(response, access)
                yield response
        except (ClientError, TimeoutError, OSError) as error:
            # Its text, and that of what caused it, may hold the URL of a proxy with a password.
            raise ApiError(0, f"{place(access.server)}: {_reason(error, access)}") from None

    def _pool(self) -> "ClientSession":
        from aiohttp import ClientSession, DummyCookieJar, TCPConnector

        if self._session is None:
            self._session = ClientSession(
                connector=TCPConnector(limit=0, keepalive_timeout=30),
                cookie_jar=DummyCookieJar(),  # the API has none, and nothing bounds their number
                headers={"User-Agent": f"vipd/{VERSION}"},
                auto_decompress=True,
                read_bufsize=CHUNK_BYTES,
            )
        return self._session

    async def _fail(self, response: "ClientResponse", access: Access) -> None:
        """Raise what a response means that is none of success."""
        if response.status == 401:
            self._credentials.doubt(access)
        told = wire.status(await response.content.read(MAX_ERROR_BYTES))
        why = _plain(f"{response.status} {told.message or response.reason or ''}", access)
        after = _seconds(response.headers.get("Retry-After"))
        if after is None and told.details is not None:
            asked = told.details.retry_after_seconds
            after = None if asked is None else float(min(asked, MOST_RETRY_SECONDS))
        raise ApiError(response.status, f"{place(access.server)}: {why}", after)


def _reason(error: BaseException, access: Access) -> str:
    """Return what went wrong below HTTP, without the URL, which may hold a password."""
    from aiohttp import ClientConnectorError, ClientResponseError, ClientSSLError, InvalidURL

    if isinstance(error, InvalidURL):
        return "the URL is none"
    if isinstance(error, ClientResponseError):
        return _plain(f"{error.status or ''} {error.message}", access)
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ClientConnectorError) and not isinstance(error, ClientSSLError):
        return _plain(f"cannot connect: {error.os_error.strerror or error.os_error}", access)
    return _plain(str(error), access) or type(error).__name__


def _plain(text: str, access: Access) -> str:
    """Return what others say so that a log can have it: short, printable, no credentials."""
    text = access.without_secrets(text)[:MOST_REASON]
    return "".join(one if one.isprintable() else " " for one in text).strip()


def _seconds(text: str | None) -> float | None:
    """Return the seconds of a Retry-After; its other form, a date, is not used by the API."""
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:
        return None
