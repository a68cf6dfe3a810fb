"""What a daemon is made of, and who tells whom.

Lives here: the parts, made in the order in which they need each other, and the wires between them.
Must not: run anything (daemon.py does), or decide anything about services.
"""

from collections.abc import Callable, Collection, Coroutine, Sequence
from pathlib import Path
from typing import Any

import structlog

from vipd.backends.nftables.tool import Nft
from vipd.backends.registry import NEED_OWN_ADDRESSES, Backend, backend
from vipd.backends.skeleton import Skeleton
from vipd.dns.server.service import DnsService
from vipd.proxy import control, record
from vipd.proxy.answers import Answers
from vipd.proxy.config import Config, Flags
from vipd.proxy.departures import Departures
from vipd.proxy.dns_way import DnsWay
from vipd.proxy.events import Event
from vipd.proxy.reload import Reloading
from vipd.proxy.repair import Repair
from vipd.proxy.snapshot import Snapshot, Touched
from vipd.proxy.sources.addresses import FollowedAddresses
from vipd.proxy.sources.protocol import Source
from vipd.proxy.switch import Record
from vipd.proxy.switching import Switching
from vipd.proxy.sync import Sync
from vipd.proxy.unreplied import Unreplied
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
        self._inherited = tuple(inherited)
        self._state_directory = Path(config.socket).parent
        node, drain_seconds = config.node, config.dataplane.drain_seconds
        self.sync = Sync(node, self._updated, self._folded)
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
            on_synced=on_synced,
            on_commit=self._committed,
            prepare=self.own_addresses.known,
        )
        self.departures = Departures(
            drain_seconds, self.switching.cut, lambda: (self.sync.snapshot, self.sync.table)
        )
        self.reloading = Reloading(flags, {"dns": self._change_dns}, self.dns.reread)
        self._follows_file = flags.config is not None
        answers = Answers(
            config, self.sync, self.switching, self.departures, source, started, self.dns
        )
        self.requests: dict[str, control.Reader] = {
            **answers.requests(),
            "dns": self.dns.status,
            "dns-trace": self.dns.trace,
        }

    def running(self) -> Sequence[Coroutine[Any, Any, None]]:
        """Return what runs beside the sync until the daemon ends."""
        dns_way, repairs = self.dns_way, self.switching.repairs
        guard = Repair("dns", repairs, dns_way.watches(), dns_way.mend)
        return self.departures.run(), dns_way.run(), guard.run(), self.reloading.run()

    async def stop(self) -> None:
        """End what the parts have begun by themselves."""
        await self.dns.stop()
        await self.unreplied.stop()
        await self.own_addresses.stop()

    def on_hangup(self) -> None:
        """Look again at everything that is followed, because someone sent SIGHUP."""
        self.dns_way.look()
        if self._follows_file:
            self.reloading.ask()
        else:
            log.info("nothing is read again: there is no configuration file (--config)")

    def _backend(self, mode: str) -> Backend:
        return backend(mode, self._config.dataplane, self._inherited, self._state_directory)

    def _folded(
        self, events: Sequence[Event], before: Snapshot, after: Snapshot, touched: Touched
    ) -> None:
        self.dns.take(events, before, after, touched)
        self.dns_way.note(before, after, touched)

    def _updated(self, before: Table, changes: Changes) -> None:
        self.departures.note(before, changes)
        self.unreplied.note(before, changes)

    def _committed(self, keys: Collection[Key]) -> None:
        self.departures.committed(keys)
        self.unreplied.committed(keys)
        self.dns_way.committed(keys)

    async def _forget_unreplied(self, keys: Collection[Key]) -> int:
        from vipd.backends import conntrack

        facts = self.sync.table.network
        return await conntrack.forget_unreplied(
            keys, facts.own_addresses or facts.primary_addresses
        )

    async def _change_dns(self, changed: Config) -> list[str]:
        return await self.dns_way.change(changed, lambda: self.dns.change(changed.dns))
