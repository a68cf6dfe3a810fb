"""Flows that began before their virtual server was served, and would never reach it.

Lives here: which virtual servers were switched on, and when to forget such flows. Must not: touch
connection tracking itself.

The kernel decides about translation once, at the first packet of a flow. A client that went on
sending from one port while a service had no endpoint keeps an entry without a translation, and
every further packet renews it, as do the retransmissions of a SYN (kubernetes/kubernetes#48370,
#48719, #114668). Only entries without a reply
are forgotten: a flow that works is nobody's to end.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection

import structlog

from vipd.proxy.errors import Busy, DataplaneError
from vipd.proxy.virtualserver import Changes, Key, Table, VirtualServer

Forget = Callable[[Collection[Key]], Awaitable[int]]
"""Deletes the UNREPLIED entries of these virtual servers and returns how many there were."""

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
"""Before another look where the kernel was busy; the pause doubles from the first to the longest.
"""

log = structlog.get_logger()


def switched_on(before: Table, changes: Changes) -> set[Key]:
    """Return the virtual servers that have endpoints now and had none, or were not there."""
    on = set()
    for key, server in changes.virtual_servers.items():
        if server is None or not _serves(server):
            continue
        claims = before.claims.get(key)
        if not claims or not _serves(claims[0]):
            on.add(key)
    return on


def _serves(server: VirtualServer) -> bool:
    return bool(server.cluster or server.local)


class Unreplied:
    """Waits for the commit that switches virtual servers on; then their old flows are forgotten.

    Off the path of a sync: the next commit does not wait for it.
    """

    def __init__(self, forget: Forget) -> None:
        self.forgotten = 0
        self._forget = forget
        self._on: set[Key] = set()
        self._due: set[Key] = set()
        self._first = True
        self._task: asyncio.Task[None] | None = None

    def note(self, before: Table, changes: Changes) -> None:
        """Remember what the changes switch on."""
        self._on |= switched_on(before, changes)

    def committed(self, keys: Collection[Key]) -> None:
        """Say that these are programmed. The first time, nobody knows what was served before."""
        due = set(keys) if self._first else self._on.intersection(keys)
        self._first = False
        self._on -= due
        self._due |= due
        if self._due and (self._task is None or self._task.done()):
            self._task = asyncio.ensure_future(self._go())

    async def _go(self) -> None:
        """Forget, one look at the table at a time; what is committed meanwhile has to wait."""
        pause = FIRST_PAUSE_SECONDS
        while self._due:
            due, self._due = self._due, set()
            try:
                count = await self._forget(due)
            except Busy as error:
                if pause == FIRST_PAUSE_SECONDS:
                    log.warning("old flows are not forgotten yet", why=str(error))
                self._due |= due
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
                continue
            except DataplaneError as error:
                log.warning("old flows are not forgotten", why=str(error))
                continue
            pause = FIRST_PAUSE_SECONDS
            self.forgotten += count
            if count:
                log.info("unreplied flows forgotten", flows=count, virtual_servers=len(due))

    async def stop(self) -> None:
        """Cancel what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
