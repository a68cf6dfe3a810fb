"""What a daemon is made of, and who tells whom.

Lives here: the parts, made in the order in which they need each other, and the wires between them.
Must not: run anything (daemon.py does), or decide anything about services.
"""

from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog

from vipd.backends.nftables.tool import Nft
from vipd.backends.registry import NEED_OWN_ADDRESSES, Backend, backend
from vipd.backends.skeleton import Skeleton
from vipd.dns.server.service import DnsService
from vipd.proxy import control, record
from vipd.proxy.answers import WORKERS, Answers
from vipd.proxy.config import Config, Flags
from vipd.proxy.departures import Departures
from vipd.proxy.dns_way import DnsWay
from vipd.proxy.events import Event
from vipd.proxy.forgetting import forgetting
from vipd.proxy.http.answer import Page
from vipd.proxy.http.facts import health
from vipd.proxy.http.service import HttpService
from vipd.proxy.kernel_settings import KernelSettings
from vipd.proxy.metrics.connections import Connections
from vipd.proxy.metrics.counters import Counters
from vipd.proxy.metrics.exposition import Metrics
from vipd.proxy.metrics.subjects import Subjects
from vipd.proxy.noticing import Noticing
from vipd.proxy.programming import Programming
from vipd.proxy.reload import Reloading
from vipd.proxy.repair import Repair
from vipd.proxy.snapshot import Snapshot, Touched
from vipd.proxy.sources.addresses import FollowedAddresses
from vipd.proxy.sources.protocol import Source
from vipd.proxy.stale import StaleFlows
from vipd.proxy.switch import Record
from vipd.proxy.switching import Switching
from vipd.proxy.sync import Sync
from vipd.proxy.taken import Taken
from vipd.proxy.virtualserver import Changes, Key, Table

log = structlog.get_logger()


class Parts:
    """The parts of one daemon. `inherited` are descriptors that its processes get, too."""

    def __init__(
        self,
        config: Config,
        source: Source,
        flags: Flags,
        start: Record,
        inherited: Sequence[int],
        started: float,
        on_synced: Callable[[], None],
    ) -> None:
        self._config = config
        self._flags = flags
        self._inherited = tuple(inherited)
        self._on_synced = on_synced
        self._state_directory = Path(config.socket).parent
        node, drain_seconds = config.node, config.dataplane.drain_seconds
        self.sync = Sync(node, self._updated, self._folded)
        self.programming = Programming(started)
        self.kernel_settings = KernelSettings(config.conntrack, config.oom_score_adjust)
        self.dns = DnsService(
            config.dns, self._state_directory, node.cluster_cidrs, node.service_cidrs
        )
        self.dns_way = DnsWay(self.dns, self.sync)
        self.own_addresses = FollowedAddresses(self.sync.take, NEED_OWN_ADDRESSES)
        self.switching = Switching(
            self.sync,
            start,
            self._state_directory / record.RECORD,
            self._backend,
            Skeleton(Nft(inherited=self._inherited)),
            drain_seconds,
            on_synced=self._synced,
            on_commit=self._committed,
            prepare=self.own_addresses.known,
            programming=self.programming,
        )
        self.departures = Departures(drain_seconds, self.switching.cut, self._now)
        self.stale_flows = StaleFlows(forgetting(lambda: self.sync.table.network), self._now)
        self.health = health(self.sync, self.switching, from_cluster=not config.manifests)
        self.http = HttpService(config.http, self.sync, self.health)
        self.noticing = Noticing(self.sync, self.switching, self.http, source.tell)
        self.taken = Taken(
            self.sync,
            self.switching,
            self.departures,
            self.kernel_settings,
            self.dns,
            self.dns_way,
            self.http,
        )
        self.reloading = Reloading(flags, self.taken.fields(), self.dns.reread)
        self.answers = Answers(
            config,
            self.sync,
            self.switching,
            self.departures,
            source,
            started,
            self.dns,
            self.http,
            self._notes,
        )
        self.metrics = Metrics(
            Subjects(
                programming=self.programming,
                sync=self.sync,
                switching=self.switching,
                departures=self.departures,
                source=source,
                counters=self._counters(),
                counts=lambda: self.http.settings.counts_endpoints,
                health=self.health,
                stale_flows=self.stale_flows,
                refusing=(self.kernel_settings,),
            ),
            lambda: self.answers.status(WORKERS),
        )
        self.http.show(self.pages)
        self.requests: dict[str, control.Reader] = {
            **self.answers.requests(),
            "dns": self.dns.status,
            "dns-trace": self.dns.trace,
            "metrics": self._exposition,
        }

    def running(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Return what runs beside the sync until the daemon ends."""
        work = [
            self.kernel_settings.run(),
            self.departures.run(),
            self.stale_flows.run(),
            self.dns_way.run(),
            Repair("dns", self.switching.repairs, self.dns_way.watches(), self.dns_way.mend).run(),
            self.reloading.run(),
            self.http.run(),
        ]
        if not self._config.manifests:  # nobody looks at objects in files
            work.append(self.noticing.run())
        return work

    async def stop(self) -> None:
        """End what the parts have begun by themselves."""
        await self.metrics.stop()
        await self.dns.stop()
        await self.own_addresses.stop()
        await self.http.stop()

    def pages(self) -> Mapping[str, Page]:
        """Return the pages of the metrics server by path; it asks for them when it is asked."""
        from vipd.proxy.http.metrics_pages import Asked, metrics_pages  # not before it is asked for

        return metrics_pages(
            Asked(
                exposition=self.metrics.exposition,
                status=lambda: self.answers.status(WORKERS),
                servers=self.answers.first,
                mode=lambda: self.switching.serving.mode,
                config=lambda: self.taken.in_effect(self._config),
                flags=self._flags,
            )
        )

    def on_hangup(self) -> None:
        """Look again at everything that is followed, because someone sent SIGHUP."""
        self.dns_way.look()
        if self._flags.config is not None:
            self.reloading.ask()
        else:
            log.info("nothing is read again: there is no configuration file (--config)")

    def _folded(
        self, events: Sequence[Event], before: Snapshot, after: Snapshot, touched: Touched
    ) -> None:
        self.programming.told(events, before, listed=self.sync.listed)
        self.stale_flows.folded(before, after, touched)
        self.dns.take(events, before, after, touched)
        self.dns_way.note(before, after, touched)
        self.http.note(after, touched)

    def _updated(self, before: Table, changes: Changes) -> None:
        self.programming.updated(before, changes)
        self.departures.note(before, changes)
        self.stale_flows.note(before, changes)
        self.http.update(changes)

    def _committed(self, keys: Collection[Key]) -> None:
        self.programming.committed(keys, self.sync.table)
        self.departures.committed(keys)
        self.stale_flows.committed(keys)
        self.dns_way.committed(keys)

    def _synced(self) -> None:
        self._on_synced()
        self.http.synced()

    def _notes(self) -> Sequence[str]:
        return *self.kernel_settings.refused, *self.reloading.notes()

    def _now(self) -> tuple[Snapshot, Table]:
        return self.sync.snapshot, self.sync.table

    def _backend(self, mode: str) -> Backend:
        return backend(mode, self._config.dataplane, self._inherited, self._state_directory)

    def _counters(self) -> Counters:
        return Counters(Connections(), lambda: self.switching.serving, lambda: self.sync.table)

    async def _exposition(self, _: str) -> str:
        return (await self.metrics.exposition()).decode()
