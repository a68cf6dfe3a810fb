"""Following one kind of object: list it, watch it, and begin again where the watch cannot go on.

Lives here: what is asked next, and what is done about each failure. Must not: look into objects
(known.py) or speak HTTP (api.py).
Source: client-go tools/cache/reflector.go, v1.37.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime

import structlog
from msgspec import Raw

from vipd.proxy.errors import ConfigError, ManifestError, SourceError
from vipd.proxy.events import Event, Problem, Synced
from vipd.proxy.sources.kubernetes import wire
from vipd.proxy.sources.kubernetes.api import Api, ApiError, TooLarge
from vipd.proxy.sources.kubernetes.known import Known
from vipd.proxy.sources.kubernetes.lines import Lines, LineTooLong
from vipd.proxy.sources.kubernetes.pace import Pace
from vipd.proxy.sources.kubernetes.resources import Resource
from vipd.proxy.sources.kubernetes.wire import WireError

PAGE_OBJECTS = 500
"""As client-go's pager."""
WATCH_SECONDS = 300
"""A watch is asked for at least so long, and for at most twice that; by chance, as client-go's."""
SILENCE_SECONDS = 90.0
"""Bookmarks come every minute (apiserver: bookmarkFrequency): a watch without is dead."""
MAX_LINE_BYTES = 24 << 20
"""The API server takes objects of up to 3 MiB; what known.py decodes is bounded more closely."""
LIST_SECONDS = 900.0
"""A list that is not complete by then is given up, however steadily it comes."""
ABSENT_SECONDS = 300.0
"""A kind that the server does not have, or does not let us read, is asked for again after this."""
RESUMED = frozenset({0, 401, 429, 503})
"""Failures to begin a watch after which it is begun again where it was: there was no answer, or one
that says nothing about the version. After others it may be the version that is wrong."""
LASTING_SECONDS = 5.0
"""A watch that went on for so long was a success, even if nothing was told."""

Tell = Callable[[Sequence[Event]], Awaitable[None]]
log = structlog.get_logger()


def origin(resource: Resource) -> str:
    """Return where its objects come from, for messages; also the key of the problem to ask."""
    return f"API server: {resource.plural}"


class ListAgain(Exception):
    """The watch cannot go on from where it is. The text says why."""


class Following:
    """Keeps a kind of object in step with the server, for ever.

    `tell` is given what changed, and waits while there is too much of it. Synced is told whenever a
    list is complete, or, of a kind that is not needed, when the server refuses it.
    """

    def __init__(
        self,
        api: Api,
        resource: Resource,
        tell: Tell,
        lots: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._resource = resource
        self._tell = tell
        self._lots, self._clock = lots, clock
        self._origin = origin(resource)
        self._known = Known(resource.kind, self._origin)
        self._pace = Pace(lots)
        self._failing = False
        self._since_text = ""
        self._page_objects = PAGE_OBJECTS
        self._streams = True
        """Whether the server is thought to tell a list by way of a watch (WatchList)."""
        self.heard_at: float | None = None
        """When the server was last heard of, by `clock`."""

    async def run(self) -> None:
        """Follow until cancelled."""
        version = ""
        while True:
            began = self._clock()
            try:
                if not version:
                    version = await self._list()
                    await self._works()
                    await self._tell([Synced()])
                version = await self._watch(version)
                await self._lasted(began, "the watch ended at once")
            except ListAgain as why:
                log.info("list again", what=self._resource.plural, why=str(why))
                version = ""
                await self._lasted(began, str(why))
            except (ApiError, SourceError, ConfigError) as error:
                version = await self._failed(error, version)

    async def _lasted(self, began: float, why: str) -> None:
        """Go on at once after a watch of some length; else wait, as after a failure."""
        if self._clock() - began >= LASTING_SECONDS:
            self._pace.worked()
        else:
            log.debug("wait", what=self._resource.plural, why=why)
            await asyncio.sleep(self._pace.failed())

    async def _failed(self, error: ApiError | SourceError | ConfigError, version: str) -> str:
        """Say so, wait, and return the version to go on from, empty to list again."""
        code = error.code if isinstance(error, ApiError) else 0
        absent = not self._resource.needed and code in (403, 404)
        if code != 404 or not absent:  # an older server, which lacks the kind, is no failure
            await self._fails(error)
        if not self._resource.needed and code >= 400:
            await self._tell([Synced()])
        asked = error.retry_after if isinstance(error, ApiError) else None
        # One that was there is soon there again: rights change, servers are replaced.
        is_lasting = absent and self.heard_at is None
        await asyncio.sleep(ABSENT_SECONDS if is_lasting else self._pace.failed(asked))
        return version if code in RESUMED else ""

    async def _fails(self, error: Exception) -> None:
        """Tell of a failure; what was known stays."""
        self._failing = True
        why = f"{error}; {self._since()}; what was read before is kept"
        told = ManifestError("API server", self._resource.plural, "", why)
        await self._tell([Problem(self._origin, told)])

    def _since(self) -> str:
        """Return since when nothing is heard; the same text for as long as that lasts."""
        if self.heard_at is None:
            return "nothing heard yet"
        if not self._since_text:
            ago = self._clock() - self.heard_at
            at = datetime.fromtimestamp(time.time() - ago, UTC)
            self._since_text = f"nothing heard since {at:%Y-%m-%d %H:%M:%S} UTC"
        return self._since_text

    async def _works(self) -> None:
        self.heard_at = self._clock()
        self._since_text = ""
        if self._failing:
            self._failing = False
            await self._tell([Problem(self._origin, None)])

    async def _list(self) -> str:
        """Read everything there is, and return its version."""
        self._known.begin()
        if self._streams:
            try:
                return await self._list_by_watching()
            except ListAgain as why:
                self._streams = False
                log.info("list in pages", what=self._resource.plural, why=str(why))
                self._known.begin()
            except ApiError as error:
                # A server that has no WatchList, or where it is switched off, refuses the request.
                if error.code not in (400, 404, 405, 406, 415, 422):
                    raise
                self._streams = False
                self._known.begin()
        return await self._list_in_pages()

    async def _list_in_pages(self) -> str:
        more, began = "", self._clock()
        while True:
            self._expect_end(began)
            params = {**self._selectors(), "limit": str(self._page_objects)}
            if more:
                params["continue"] = more
            try:
                text = await self._api.get(self._resource.path, params)
                page = wire.page(text, self._resource.kind.value)
            except TooLarge:
                if self._page_objects == 1:
                    raise
                self._page_objects = max(1, self._page_objects // 4)
                continue
            except WireError as error:
                raise ApiError(0, f"the list {error}") from error
            await self._tell(self._known.applied(page.items or ()))
            more = page.metadata.continue_ or ""
            if not more:
                if not page.metadata.resource_version:
                    raise ApiError(0, "the list has no resource version")
                await self._tell(self._known.complete())
                return page.metadata.resource_version

    async def _list_by_watching(self) -> str:
        """Read everything as the beginning of a watch (KEP-3157); return where it ended.

        The watch is not gone on with: one that begins there costs the server nothing.
        """
        params = {
            **self._selectors(),
            "allowWatchBookmarks": "true",
            "sendInitialEvents": "true",
            "resourceVersionMatch": "NotOlderThan",
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        lines, began = Lines(MAX_LINE_BYTES), self._clock()
        async with self._api.watch(self._resource.path, params, SILENCE_SECONDS) as chunks:
            async for chunk in chunks:
                self._expect_end(began)
                version, complete = await self._take(lines, chunk, "")
                if complete:
                    await self._tell(self._known.complete())
                    return version
        raise ApiError(0, "the list broke off")

    def _expect_end(self, began: float) -> None:
        """Raise ApiError where a list that began then is not to be waited for any longer.

        Asked between its parts: what was told of them is taken in any case.
        """
        if self._clock() - began > LIST_SECONDS:
            raise ApiError(0, f"the list was not complete after {LIST_SECONDS:.0f} s")

    async def _watch(self, version: str) -> str:
        """Follow until the watch ends, and return the version it came to."""
        params = {
            **self._selectors(),
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(int(WATCH_SECONDS * (1 + self._lots()))),
        }
        lines = Lines(MAX_LINE_BYTES)
        stands = False
        try:
            async with self._api.watch(self._resource.path, params, SILENCE_SECONDS) as chunks:
                stands = True
                await self._works()
                heard = self._clock()
                async for chunk in chunks:
                    now = self._clock()
                    if b"\n" in chunk:
                        self.heard_at = heard = now
                    elif now - heard > SILENCE_SECONDS:  # bytes that never make a line
                        log.info("watch replaced", what=self._resource.plural, why="half a line")
                        break
                    version, _ = await self._take(lines, chunk, version)
        except ApiError as error:
            if error.code == 410:
                raise ListAgain(str(error)) from error
            if not stands:
                raise
        return version  # where it ended, or was cut

    async def _take(self, lines: Lines, chunk: bytes, version: str) -> tuple[str, bool]:
        """Tell what a chunk says; return the version after it, and whether initial events ended.

        `version` is empty while these are told: they come in any order. Raise ListAgain, after
        everything before was told.
        """
        events: list[Event] = []
        complete = False
        try:
            for text in lines.feed(chunk):
                line = wire.line(text)
                match line.type:
                    case "ADDED" | "MODIFIED":
                        events += self._known.applied((line.object,))
                    case "DELETED":
                        events += self._known.deleted(line.object)
                    case "BOOKMARK":
                        head = wire.head(line.object).metadata
                        if not version and wire.ends_initial_events(head):
                            complete, version = True, head.resource_version or ""
                    case "ERROR":
                        raise ListAgain(str(wire.status(line.object)))
                    case other:
                        raise ListAgain(f"an event of type {other[:64]!r}")
                if version:
                    version = _version(line.object, version)
        except (WireError, LineTooLong) as error:
            raise ListAgain(f"the watch: {error}") from error
        finally:
            await self._tell(events)
        return version, complete

    def _selectors(self) -> dict[str, str]:
        told = {"labelSelector": self._resource.labels, "fieldSelector": self._resource.fields}
        return {name: value for name, value in told.items() if value}


def _version(raw: Raw, before: str) -> str:
    """Return the version to go on from after an object of this one.

    Raise ListAgain where it goes back, or where there is none. Versions are numbers since v1.35
    (KEP-5504), and always were with etcd.
    """
    after = wire.version(raw)
    if not after:
        raise ListAgain("an object without a version")
    if before.isdigit() and after.isdigit() and int(after) < int(before):
        raise ListAgain(f"resource version {after} after {before}")
    return after
