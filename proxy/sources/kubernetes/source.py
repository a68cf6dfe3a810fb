"""The API server as the daemon's source: all kinds side by side, one stream of events.

Lives here: what runs side by side, and when everything that is needed has been listed.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence

from vipd.proxy.errors import SourceError
from vipd.proxy.events import Event, Kind, Problem, Synced
from vipd.proxy.notice import Notice
from vipd.proxy.sources.kubernetes.api import Api
from vipd.proxy.sources.kubernetes.credentials import Credentials
from vipd.proxy.sources.kubernetes.following import Following, Tell, origin
from vipd.proxy.sources.kubernetes.notice_writer import Counts, NoticeWriter
from vipd.proxy.sources.kubernetes.resources import Wanted, resources

MOST_WAITING = 4
"""Batches that wait to be taken; the connections wait then. A batch is a page, or what came at once
of a watch: some hundred objects, which take several times the memory of their text."""


class KubernetesSource:
    """What a cluster's API server says. `kubeconfig` None: as a pod of that cluster.

    `node` is the name of the Node to follow, empty for none.
    """

    def __init__(self, kubeconfig: str | None, node: str, wanted: Wanted) -> None:
        self._credentials = Credentials(kubeconfig, time.monotonic)
        self._resources = resources(node, wanted)
        self._notices = NoticeWriter(node)
        self._following: dict[Kind, Following] = {}

    def pods(self) -> None:
        """They are not kept: there may be 150,000 of them."""

    def silence(self) -> dict[str, float]:
        """Return for how many seconds the server was not heard of on each kind that it told."""
        now = time.monotonic()
        heard = ((kind, one.heard_at) for kind, one in list(self._following.items()))
        return {kind.value: now - at for kind, at in heard if at is not None}

    async def check(self) -> None:
        """Raise ConfigError or SourceError if the credentials cannot be used at all.

        That the server cannot be reached is none of it: it may come later.
        """
        await self._credentials.access()

    @property
    def passed_over(self) -> Counter[str]:
        """Kinds that are not read: none, since only what is read is asked for."""
        return Counter()

    def tell(self, notice: Notice) -> None:
        """Let a notice be written as an Event of the API; while `events` runs."""
        self._notices.tell(notice)

    @property
    def notices(self) -> Counts:
        """What became of the notices."""
        return self._notices.counts

    async def events(self) -> AsyncGenerator[Sequence[Event], None]:
        """Yield what changed; Synced once everything that is needed has been listed."""
        api = Api(self._credentials)
        batches: asyncio.Queue[Sequence[Event]] = asyncio.Queue(MOST_WAITING)
        unlisted = {one.kind for one in self._resources}

        def telling(kind: Kind) -> Tell:
            async def tell(events: Sequence[Event]) -> None:
                nonlocal unlisted
                told: list[Event] = [one for one in events if not isinstance(one, Synced)]
                if unlisted and len(told) < len(events):
                    unlisted = unlisted - {kind}
                    if not unlisted:
                        told.append(Synced())
                if told:
                    await batches.put(told)

            return tell

        self._following = {
            one.kind: Following(api, one, telling(one.kind)) for one in self._resources
        }
        tasks = {asyncio.ensure_future(one.run()) for one in self._following.values()}
        tasks.add(asyncio.ensure_future(self._notices.run(api)))
        try:
            while True:
                batch = asyncio.ensure_future(batches.get())
                done, _ = await asyncio.wait({batch, *tasks}, return_when=asyncio.FIRST_COMPLETED)
                for ended in done - {batch}:
                    batch.cancel()
                    ended.result()  # they end by a bug only
                yield batch.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await api.close()


async def load(kubeconfig: str | None, node: str, wanted: Wanted) -> list[Event]:
    """Return all that there is, for one-shot use; the last is Synced. Raise SourceError."""
    source = KubernetesSource(kubeconfig, node, wanted)
    await source.check()
    failures = {origin(one) for one in resources(node, wanted) if one.needed}
    told: list[Event] = []
    async with contextlib.aclosing(source.events()) as batches:
        async for events in batches:
            told += events
            for event in events:
                if isinstance(event, Problem) and event.error and event.key in failures:
                    raise SourceError(str(event.error))
            if isinstance(told[-1], Synced):
                break
    return told
