"""Writes notices to the API server, where `kubectl describe` shows them as Events.

Lives here: what is sent, and what is done about each failure. Must not: decide what is worth
telling (notices.py), or make anything wait: whoever tells goes on at once, and what cannot be
written is counted and forgotten.
"""

import asyncio
import random
import time
from collections.abc import Callable

import structlog
from msgspec import Struct

from vipd.proxy.errors import ConfigError, SourceError
from vipd.proxy.notice import Notice, Subject
from vipd.proxy.sources.kubernetes import notice_wire, wire
from vipd.proxy.sources.kubernetes.api import Api, ApiError
from vipd.proxy.sources.kubernetes.notice_rates import Rates
from vipd.proxy.sources.kubernetes.notice_wire import CORE, EVENTS
from vipd.proxy.sources.kubernetes.pace import Pace

MOST_WAITING = 256
TRIES = 3
"""So often one notice is sent while the server does not answer, or asks to wait."""
REFUSED_SECONDS = 1800.0
"""After the server said that we may not write events, it is not asked for so long."""
_AGAIN = frozenset({0, 401, 408, 429})
_PLURALS = {"Service": "services", "EndpointSlice": "endpointslices"}

log = structlog.get_logger()


class Counts(Struct):
    """What became of the notices that were told, since the start."""

    written: int = 0
    held_back: int = 0
    """By the bounds on how many are written; a series counts them."""
    failed: int = 0
    """Not written, because the server was not there or did not take them."""
    lost: int = 0
    """Told while too many waited."""


class _Refused(Exception):
    """The server says that we may not."""


class NoticeWriter:
    """Takes notices, and writes them one after the other. `node` is this node's name, or empty.

    `clock` returns seconds since the epoch, `lots` a number in [0, 1).
    """

    def __init__(
        self,
        node: str,
        clock: Callable[[], float] = time.time,
        lots: Callable[[], float] = random.random,
    ) -> None:
        self.counts = Counts()
        self._node = node
        self._clock, self._lots = clock, lots
        self._rates = Rates()
        self._version = EVENTS
        self._waiting: asyncio.Queue[Notice] = asyncio.Queue(MOST_WAITING)
        self._silent_until = 0.0
        self._told_failure = False

    def tell(self, notice: Notice) -> None:
        """Let a notice be written as soon as may be; never wait, never fail."""
        try:
            self._waiting.put_nowait(notice)
        except asyncio.QueueFull:
            self.counts.lost += 1

    async def run(self, api: Api) -> None:
        """Write what is told, until cancelled."""
        while True:
            notice = await self._waiting.get()
            now = self._clock()
            series = self._rates.series(notice, now)
            if now < self._silent_until:
                self.counts.failed += 1
            elif not self._rates.admits(notice, now):
                self.counts.held_back += 1
            else:
                await self._write(api, notice, series.name if series is not None else "")

    async def _write(self, api: Api, notice: Notice, known_as: str) -> None:
        try:
            name = await self._tried(api, notice, known_as)
        except _Refused as error:
            self._silent_until = self._clock() + REFUSED_SECONDS
            self._failed(str(error))
        except (ApiError, SourceError, ConfigError) as error:
            self._failed(str(error))
        else:
            if name:
                self.counts.written += 1
                self._rates.wrote(notice, name, self._clock())
                self._told_failure = False

    def _failed(self, why: str) -> None:
        self.counts.failed += 1
        if not self._told_failure:
            self._told_failure = True
            log.warning("events are not written", why=why)

    async def _tried(self, api: Api, notice: Notice, known_as: str) -> str:
        """Write it, in a few tries; return the event's name, empty where there is no object."""
        pace = Pace(self._lots)
        for _ in range(TRIES - 1):
            try:
                return await self._once(api, notice, known_as)
            except ApiError as error:
                if error.code not in _AGAIN and error.code < 500:
                    raise
                await asyncio.sleep(pace.failed(error.retry_after))
        return await self._once(api, notice, known_as)

    async def _once(self, api: Api, notice: Notice, known_as: str) -> str:
        try:
            if known_as and await self._count(api, notice, known_as):
                return known_as
            return await self._create(api, notice)
        except ApiError as error:
            # A namespace that is on its way out takes no new objects; that is no matter of rights.
            if error.code == 403 and "being terminated" in str(error):
                return ""
            if error.code == 403:
                raise _Refused(str(error)) from error
            raise

    async def _count(self, api: Api, notice: Notice, name: str) -> bool:
        """Say that an event was told again; return whether the server still has it."""
        body = notice_wire.again(self._version, self._rates.count(notice), self._clock())
        try:
            await api.patch(f"{notice_wire.path(self._version, notice)}/{name}", body)
        except ApiError as error:
            if error.code != 404:
                raise
            self._rates.forget(notice)
            return False
        return True

    async def _create(self, api: Api, notice: Notice) -> str:
        uid = await self._uid(api, notice.subject)
        if uid is None:
            return ""
        now, instance = self._clock(), notice_wire.instance(self._node)
        name = notice_wire.name(notice, instance, uid, now)
        body = notice_wire.created(self._version, notice, name, self._node, uid, now)
        try:
            await api.post(notice_wire.path(self._version, notice), body)
        except ApiError as error:
            if error.code == 409:
                return name  # another node wrote the same
            if error.code != 404 or not await self._falls_back(api):
                raise
            return await self._create(api, notice)
        return name

    async def _falls_back(self, api: Api) -> bool:
        """Use core v1 where the server has no events.k8s.io/v1; return whether that is new."""
        if self._version == CORE:
            return False
        try:
            await api.get(f"/apis/{EVENTS}", {})
        except ApiError as error:
            if error.code != 404:
                raise
            self._version = CORE
            return True
        return False

    async def _uid(self, api: Api, subject: Subject) -> str | None:
        """Return the uid of an object, None where it is gone.

        It is listed, which we may anyway, and not got. A Node's events have its name for it, as the
        kubelet's and kube-proxy's do.
        """
        plural = _PLURALS.get(subject.kind)
        if plural is None:
            return subject.name
        root = "/apis" if "/" in subject.api_version else "/api"
        place = f"metadata.name={subject.name},metadata.namespace={subject.namespace}"
        params = {"fieldSelector": place, "resourceVersion": "0", "limit": "1"}
        text = await api.get(f"{root}/{subject.api_version}/{plural}", params)
        try:
            items = wire.page(text, subject.kind).items
            return (wire.head(items[0]).metadata.uid or "") if items else None
        except wire.WireError as error:
            raise ApiError(0, f"the list {error}") from error
