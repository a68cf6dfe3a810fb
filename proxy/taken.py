"""What of a changed configuration is taken while the daemon runs.

Lives here: which part a field of the configuration concerns, telling it, and what is in effect.
Must not: read the file (reload.py does), or know what a part does about it.
"""

from collections.abc import Mapping

from msgspec import structs

from vipd.dns.server.service import DnsService
from vipd.proxy.config import Config
from vipd.proxy.departures import Departures
from vipd.proxy.dns_way import DnsWay
from vipd.proxy.http.service import HttpService
from vipd.proxy.kernel_settings import KernelSettings
from vipd.proxy.reload import Take
from vipd.proxy.switching import Switching
from vipd.proxy.sync import Sync

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


class Taken:
    """Tells the parts what is configured otherwise now."""

    def __init__(
        self,
        sync: Sync,
        switching: Switching,
        departures: Departures,
        kernel_settings: KernelSettings,
        dns: DnsService,
        dns_way: DnsWay,
        http: HttpService,
    ) -> None:
        self._sync = sync
        self._switching = switching
        self._departures = departures
        self._kernel_settings = kernel_settings
        self._dns = dns
        self._dns_way = dns_way
        self._http = http

    def fields(self) -> Mapping[str, Take]:
        """Return what takes a field, by its name in VipdConfiguration.

        What is not here counts at the next start.
        """
        return {
            **dict.fromkeys(_OF_THE_NODE, self._node),
            "drainSeconds": self._drain,
            "oomScoreAdj": self._kernel,
            "conntrack": self._kernel,
            "dns": self._names,
            "http": self._servers,
        }

    def in_effect(self, started: Config) -> Config:
        """Return what counts now in a process that was started with a configuration."""
        drain_seconds = self._departures.drain_seconds
        return structs.replace(
            started,
            node=self._sync.settings,
            dataplane=structs.replace(started.dataplane, drain_seconds=drain_seconds),
            oom_score_adjust=self._kernel_settings.oom_score,
            conntrack=self._kernel_settings.conntrack,
            dns=self._dns.settings,
            http=self._http.settings,
        )

    async def _node(self, changed: Config) -> list[str]:
        before, after = self._sync.settings, changed.node
        # Of the next start: who this node is, and the mark, which other programs may know.
        name, bit = before.node_name, before.masquerade_bit
        self._sync.change(structs.replace(after, node_name=name, masquerade_bit=bit))
        await self._dns.change_networks(after.cluster_cidrs, after.service_cidrs)
        self._dns_way.look()
        return []

    async def _drain(self, changed: Config) -> list[str]:
        seconds = changed.dataplane.drain_seconds
        self._departures.drain_seconds = self._switching.drain_seconds = seconds
        return []

    async def _kernel(self, changed: Config) -> list[str]:
        await self._kernel_settings.change(changed.conntrack, changed.oom_score_adjust)
        return []

    async def _names(self, changed: Config) -> list[str]:
        return await self._dns_way.change(changed, lambda: self._dns.change(changed.dns))

    async def _servers(self, changed: Config) -> list[str]:
        await self._http.change(changed.http)
        return []
