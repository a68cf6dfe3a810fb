"""What a daemon is made of, and who tells whom.

Lives here: the parts, made in the order in which they need each other, and the wires between them.
Must not: run anything (daemon.py does), or decide anything about services.
"""

import os
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import structlog
from msgspec import structs

from vipd.backends.nftables.tool import Nft
from vipd.backends.registry import NEED_OWN_ADDRESSES, Backend, backend
from vipd.backends.skeleton import Skeleton
from vipd.dns.server.service import DnsService
from vipd.proxy import control, oom, record
from vipd.proxy.answers import WORKERS, Answers
from vipd.proxy.config import Config, Flags
from vipd.proxy.departures import Departures
from vipd.proxy.dns_way import DnsWay
from vipd.proxy.events import Event
from vipd.proxy.http.answer import Page
from vipd.proxy.http.health import Facts, Health, is_eligible
from vipd.proxy.http.service import HttpService
from vipd.proxy.metrics.connections import Connections
from vipd.proxy.metrics.counters import Counters
from vipd.proxy.metrics.exposition import Metrics
from vipd.proxy.metrics.subjects import Subjects
from vipd.proxy.names import Family
from vipd.proxy.noticing import Noticing
from vipd.proxy.programming import Programming
from vipd.proxy.reload import Reloading
from vipd.proxy.snapshot import Snapshot, Touched
from vipd.proxy.sources.addresses import FollowedAddresses
from vipd.proxy.sources.protocol import Source
from vipd.proxy.switch import Record
from vipd.proxy.switching import Switching
from vipd.proxy.sync import Sync
from vipd.proxy.unreplied import Unreplied
from vipd.proxy.virtualserver import Changes, Key, Table

_OF_THE_NODE = (
    "nodeIPs",
    "clusterCIDRs",
    "serviceCIDRs",
    "detectLocalMode",
    "detectLocal",
    "masqueradeAll",
    "nodePortAddresses",
    "serveExternalIPs",
)
"""Fields that are in the table, so that a table of others is all it takes."""

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
        self._inherited = tuple(inherited)
        self._on_synced = on_synced
        self._state_directory = Path(config.socket).parent
        node, drain_seconds = config.node, config.dataplane.drain_seconds
        self.sync = Sync(node, self._updated, self._folded)
        self.programming = Programming(started)
        self.dns = DnsService(
            config.dns, self._state_directory, node.cluster_cidrs, node.service_cidrs
        )
        self.dns_way = DnsWay(self.dns, self.sync)
        self.unreplied = Unreplied(self._forget_unreplied)
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
        self.departures = Departures(
            drain_seconds, self.switching.cut, lambda: (self.sync.snapshot, self.sync.table)
        )
        # By field of VipdConfiguration, whatever kind of file says it; what is not here counts at
        # the next start.
        self.reloading = Reloading(
            flags,
            {
                **dict.fromkeys(_OF_THE_NODE, self._change_node),
                "drainSeconds": self._change_drain,
                "oomScoreAdj": self._change_oom_score,
                "dns": self._change_dns,
                "http": self._change_http,
            },
            self.dns.reread,
        )
        self.noticing = Noticing(self.sync, self.switching, source.tell)
        self._follows_file = flags.config is not None
        self.health = Health(self._health_facts, _families(), time.monotonic, time.time)
        self.http = HttpService(config.http, self.sync, self.health)
        answers = Answers(
            config, self.sync, self.switching, self.departures, source, started, self.dns, self.http
        )
        self.metrics = Metrics(
            Subjects(
                programming=self.programming,
                sync=self.sync,
                switching=self.switching,
                departures=self.departures,
                unreplied=self.unreplied,
                source=source,
                counters=self._counters() if config.http.counts_endpoints else None,
                health=self.health,
            ),
            lambda: answers.status(WORKERS),
        )
        self.http.show(lambda: self._metrics_pages(answers, flags))
        self.requests: dict[str, control.Reader] = {
            **answers.requests(),
            "dns": self.dns.status,
            "dns-trace": self.dns.trace,
            "metrics": self._exposition,
        }

    def running(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Return what runs beside the sync until the daemon ends."""
        work = [
            self.departures.run(),
            self.dns_way.run(),
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
        await self.unreplied.stop()
        await self.own_addresses.stop()
        await self.http.stop()

    def on_hangup(self) -> None:
        """Look again at everything that is followed, because someone sent SIGHUP."""
        self.dns_way.look()
        if self._follows_file:
            self.reloading.ask()
        else:
            log.info("nothing is read again: there is no configuration file (--config)")

    def _counters(self) -> Counters:
        return Counters(Connections(), lambda: self.switching.serving, lambda: self.sync.table)

    async def _exposition(self, _: str) -> str:
        return (await self.metrics.exposition()).decode()

    def _backend(self, mode: str) -> Backend:
        return backend(mode, self._config.dataplane, self._inherited, self._state_directory)

    def _folded(
        self, events: Sequence[Event], before: Snapshot, after: Snapshot, touched: Touched
    ) -> None:
        self.programming.told(events, before, listed=self.sync.listed)
        self.dns.take(events, before, after, touched)
        self.dns_way.note(before, after, touched)
        self.http.note(after, touched)

    def _updated(self, before: Table, changes: Changes) -> None:
        self.programming.updated(before, changes)
        self.departures.note(before, changes)
        self.unreplied.note(before, changes)
        self.http.update(changes)

    def _committed(self, keys: Collection[Key]) -> None:
        self.programming.committed(keys, self.sync.table)
        self.departures.committed(keys)
        self.unreplied.committed(keys)
        self.dns_way.committed(keys)

    def _metrics_pages(self, answers: Answers, flags: Flags) -> Mapping[str, Page]:
        from vipd.proxy.http.metrics_pages import Asked, metrics_pages  # not before it is asked for

        return metrics_pages(
            Asked(
                exposition=self.metrics.exposition,
                status=lambda: answers.status(WORKERS),
                servers=answers.first,
                mode=lambda: self.switching.serving.mode,
                config=self._effective,
                flags=flags,
            )
        )

    async def _change_http(self, changed: Config) -> list[str]:
        await self.http.change(changed.http)
        return []

    def _effective(self) -> Config:
        return structs.replace(self._config, node=self.sync.settings, http=self.http.settings)

    def _synced(self) -> None:
        self._on_synced()
        self.http.synced()

    def _health_facts(self) -> Facts:
        serving, sync = self.switching.serving, self.sync
        return Facts(
            waiting_since=serving.waiting_since,
            updated_at=None if serving.last_sync is None else serving.last_sync.at,
            eligible=is_eligible(
                sync.snapshot,
                sync.settings.node_name,
                listed=sync.listed,
                from_cluster=not self._config.manifests,
            ),
        )

    async def _forget_unreplied(self, keys: Collection[Key]) -> int:
        from vipd.backends import conntrack

        facts = self.sync.table.network
        return await conntrack.forget_unreplied(
            keys, facts.own_addresses or facts.primary_addresses
        )

    async def _change_dns(self, changed: Config) -> list[str]:
        return await self.dns_way.change(changed, lambda: self.dns.change(changed.dns))

    async def _change_node(self, changed: Config) -> list[str]:
        before, after = self.sync.settings, changed.node
        # Of the next start: who this node is, and the mark, which other programs may know.
        name, bit = before.node_name, before.masquerade_bit
        self.sync.change(structs.replace(after, node_name=name, masquerade_bit=bit))
        await self.dns.change_networks(after.cluster_cidrs, after.service_cidrs)
        self.dns_way.look()
        return []

    async def _change_drain(self, changed: Config) -> list[str]:
        seconds = changed.dataplane.drain_seconds
        self.departures.drain_seconds = self.switching.drain_seconds = seconds
        return []

    async def _change_oom_score(self, changed: Config) -> list[str]:
        oom.adjust(changed.oom_score_adjust)
        return []


def _families() -> Sequence[Family]:
    """Return the IP families of this host; without IPv6 there is no such file."""
    return tuple(Family) if os.path.exists("/proc/net/if_inet6") else (Family.IPV4,)
