"""The sync: events in, the table out, shown to every dataplane that is at work.

Lives here: the snapshot and the table, and who is told when they change. Must not: read files or
sockets, commit anything, or decide which dataplanes are at work (switching.py does).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import structlog
from msgspec import structs

from vipd.proxy.dataplane import Dataplane
from vipd.proxy.errors import ManifestError
from vipd.proxy.events import Event, Problem, Synced
from vipd.proxy.measured import SYNC_SECONDS, Distribution
from vipd.proxy.names import Address
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot, Touched, fold
from vipd.proxy.virtualserver import Changes, Table

log = structlog.get_logger()

OnUpdate = Callable[[Table, Changes], None]
"""Called with the table as it was before, and what changed."""
OnFold = Callable[[Sequence[Event], Snapshot, Snapshot, Touched], None]
"""Called with events, the snapshot before and after them, and what they touched."""


class Sync:
    """Keeps the table in step with a source."""

    def __init__(
        self,
        settings: NodeSettings,
        on_update: OnUpdate = lambda before, changes: None,
        on_fold: OnFold = lambda events, before, after, touched: None,
    ) -> None:
        self.settings = settings
        self.snapshot = Snapshot()
        self.table: Table = resolve(self.snapshot, settings)
        self.problems: dict[str, ManifestError] = {}
        self.resolved = Distribution(SYNC_SECONDS)
        """Seconds from a change of the snapshot to that of the table."""
        self.listed = False
        """Whether the source has told everything that existed at its start."""
        self._on_update, self._on_fold = on_update, on_fold
        self._dataplanes: list[Dataplane] = []

    def add(self, dataplane: Dataplane) -> None:
        """Show a dataplane the table from now on."""
        self._dataplanes.append(dataplane)
        if self.listed:
            dataplane.show(self.table)

    def remove(self, dataplane: Dataplane) -> None:
        """Show it nothing more."""
        self._dataplanes.remove(dataplane)

    async def run(self, source: AsyncIterator[Sequence[Event]]) -> None:
        """Follow the source until it ends."""
        async for batch in source:
            self.take(batch)
            await asyncio.sleep(0)  # a source that never waits must not keep commits from starting

    def take(self, events: Sequence[Event]) -> None:
        """Fold events of whatever source, and show what follows from them."""
        listed = self.listed
        for event in events:
            if isinstance(event, Problem):
                self._note(event)
            elif isinstance(event, Synced):
                self.listed = True
        unfolded = self.snapshot
        self.snapshot, touched = fold(unfolded, events)
        self._on_fold(events, unfolded, self.snapshot, touched)
        if not self.listed:
            return
        if not listed:  # resolve everything at once
            with self._measured():
                self.table = resolve(self.snapshot, self.settings)
            for dataplane in self._dataplanes:
                dataplane.show(self.table)
            return
        self._update(touched)

    def change(self, settings: NodeSettings) -> None:
        """Serve by other settings from now on, but for where DNS is left to. O(services)."""
        listens = self.settings.dns_listens
        self.settings = structs.replace(settings, dns_listens=listens)
        if self.listed:
            self._update(Touched(nodes=frozenset({settings.node_name}), service_cidrs=True))

    def leave_to_dns(self, listens: frozenset[tuple[Address, int]]) -> None:
        """Let vipd's DNS server answer there from now on, and nowhere else."""
        moved = {address for address, _ in listens ^ self.settings.dns_listens}
        self.settings = structs.replace(self.settings, dns_listens=listens)
        concerned = [
            one.name
            for one in self.snapshot.services.values()
            if not moved.isdisjoint((*one.cluster_ips, *one.external_ips, *one.load_balancer_ips))
        ]
        if self.listed and concerned:
            self._update(Touched(services=frozenset(concerned)))

    def _update(self, touched: Touched) -> None:
        before = self.table
        with self._measured():
            self.table, changes = update(before, self.snapshot, self.settings, touched)
        if changes:
            self._on_update(before, changes)
            for dataplane in self._dataplanes:
                dataplane.show(self.table, changes)

    @contextlib.contextmanager
    def _measured(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.resolved.observe(time.perf_counter() - began)

    def _note(self, problem: Problem) -> None:
        if problem.error is None:
            if self.problems.pop(problem.key, None) is not None:
                log.info("problem solved", where=problem.key)
        else:
            if str(self.problems.get(problem.key)) != str(problem.error):
                log.warning("not read", problem=str(problem.error))
            self.problems[problem.key] = problem.error
