"""What this process answers with: the zone that is answered from and the one that is being fed.

Lives here: settings and changes, and what follows from them for sockets and forwarding. Must not:
know what a question means (answer.py), how it arrives (udp.py, tcp.py), or who tells (worker.py).

While nobody tells changes it goes on with the last zone: the daemon's restart is no reason to be
silent, and what it knows is as good as the kernel's rules, which stay too.
"""

import asyncio
import contextlib
import gc
import socket
from collections.abc import Sequence

from vipd.dns.answer import Answers
from vipd.dns.feed import Portion
from vipd.dns.server.access import Access, Refusals
from vipd.dns.server.counters import Counters
from vipd.dns.server.forwarding import Forwarding
from vipd.dns.server.messages import Begin, Fed, Feed
from vipd.dns.server.places import Places
from vipd.dns.server.query_log import logging_of
from vipd.dns.server.serving import Serving
from vipd.dns.server.tcp import Connections
from vipd.dns.server.waiting import Waiting
from vipd.dns.settings import DnsSettings, answer_settings, zone_settings
from vipd.dns.zone import Zone
from vipd.proxy.names import Network, parse_network

RETIRE_SECONDS = 10.0
"""How long what waits for upstreams may take when this process has to go."""
_LOOPBACK = ("127.0.0.0/8", "::1")


class Answering:
    """Answers, as it is told."""

    def __init__(self) -> None:
        self.settings = DnsSettings()
        self.zone = Zone()
        """What is answered from."""
        self.counters = Counters()
        now = asyncio.get_running_loop().time()
        self.serving = Serving(
            Answers(self.zone),
            Access(),
            Refusals(0, now),
            Waiting(self.settings.waiting, self.settings.waiting_of_client, self.counters),
            self.counters,
        )
        self.forwarding = Forwarding(self.serving)
        self.connections = Connections(0, 0, self.serving)
        self.places = Places(self.serving, self.connections)
        self.fed_at = now
        """When the last change was told."""
        self._fed: tuple[Zone, DnsSettings] = self.zone, self.settings
        """What changes go into: the zone that is answered from, or the next one."""
        self._own: list[Network] = []
        """Who may ask because of the settings."""
        self._told: set[str] = set()
        """Who may because of what is told."""

    async def begin(self, request: Begin, given: Sequence[socket.socket]) -> None:
        """Answer by other settings, at more or fewer addresses; two sockets each are given."""
        settings = request.settings
        zone = self._fed[0]
        if request.anew:
            zone = Zone(zone_settings(settings))
        self._fed = zone, settings
        self.places.add(request.listens, given)
        self.places.leave(request.leave)
        if zone is self.zone or not self.zone.synced:
            await self._adopt()
        else:
            self._admit()  # the zone before is answered from until the next one is whole

    async def feed(self, request: Feed) -> Fed:
        """Take changes. No later answer is from before them."""
        portion = request.portion
        zone = self._fed[0]
        for one in {zone, self.zone}:
            _put(one, portion)
            if request.serial:
                one.stamp(request.serial)
        self._take_sources(portion)
        if portion != Portion():
            self.fed_at = asyncio.get_running_loop().time()
        if request.synced and not zone.synced:
            zone.synced = True
            if zone is not self.zone:
                await self._adopt()
            gc.freeze()  # what is there now stays, most of it
        return Fed(zone.services, zone.serial)

    async def _adopt(self) -> None:
        """Answer from the zone that was fed, by its settings."""
        before = self.settings
        self.zone, settings = self._fed
        self.settings, serving = settings, self.serving
        if answer_settings(before) != answer_settings(settings):
            self.zone.prebuilt.drop(list(self.zone.prebuilt.replies))
        replaced = serving.answers
        self.counters.bad_versions += replaced.bad_versions
        serving.answers = Answers(self.zone, answer_settings(settings))
        # They refer to themselves, and what was frozen is never looked at by the collector: the
        # zone before would stay for good. What still waits asks for `finish` and `fail` only.
        del replaced.udp, replaced.tcp
        now = asyncio.get_running_loop().time()
        if serving.refusals.per_second != settings.refusals_per_second:
            serving.refusals = Refusals(settings.refusals_per_second, now)
        serving.waiting.most = settings.waiting
        serving.waiting.most_of_client = settings.waiting_of_client
        serving.tcp_seconds = (
            settings.tcp_first_seconds,
            settings.tcp_idle_seconds,
            settings.tcp_write_seconds,
        )
        serving.log = logging_of(serving.log, settings)
        self.connections.most = settings.tcp_connections
        self.connections.most_of_client = settings.tcp_connections_of_client
        self._admit()
        await self.forwarding.change(settings, self.places.listens)

    def _admit(self) -> None:
        """Let those ask who may by the settings."""
        listens = [address for address, _ in self.places.listens]
        own = [_network(one) for one in (*_LOOPBACK, *listens, *self.settings.allow)]
        if own != self._own:
            self.serving.access.admit(own)
            self.serving.access.expel(self._own)
            self._own = own

    def _take_sources(self, portion: Portion) -> None:
        """Let those ask who may by what is told."""
        come = set(portion.admit) - self._told
        gone = self._told.intersection(portion.expel)
        if come or gone:
            self.serving.access.admit(map(_network, come))
            self.serving.access.expel(map(_network, gone))
            self._told -= gone
            self._told |= come

    async def finish(self) -> None:
        """Return when what has arrived is answered, or does not end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETIRE_SECONDS):
                await self.connections.finish()
                await self.places.finish()

    async def close(self) -> None:
        """End everything that is open."""
        self.connections.close()
        self.places.close()
        if self.serving.log is not None:
            self.serving.log.close()
        await self.forwarding.close()


def _network(text: str) -> Network:
    return parse_network(text.partition("%")[0])


def _put(zone: Zone, portion: Portion) -> None:
    for facts in portion.put:
        zone.put(facts)
    for name in portion.drop:
        zone.drop(name)
    for pod in portion.put_pods:
        zone.put_pod(pod)
    for name in portion.drop_pods:
        zone.drop_pod(name)
    if portion.namespaces is not None:
        zone.namespaces(portion.namespaces or None)
