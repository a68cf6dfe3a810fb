"""The IPVS driver: does plans, watches what departs, and says what the kernel has.

Lives here: the one effect of this backend, as an order of calls. Must not: know what a program
means (compile.py) or how the kernel is told (kernel.py, firewall.py).

Netlink calls block, so they run beside the event loop. One thing at a time changes the kernel.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import structlog

from vipd.backends import removed_routes
from vipd.backends.counts import Take
from vipd.backends.ipvs import counters, probe, watching
from vipd.backends.ipvs import work as batches
from vipd.backends.ipvs.departing import Connections, Departing
from vipd.backends.ipvs.firewall import Firewall
from vipd.backends.ipvs.kernel import Kernel
from vipd.backends.ipvs.objects import (
    DELETE,
    ROUTE_PROTOCOL,
    SERVED,
    SET,
    Destination,
    Operation,
    Route,
    Service,
    Thing,
    Value,
    set_name,
)
from vipd.backends.ipvs.observed import Observed, record
from vipd.backends.ipvs.plan import IpvsPlan, Prologue, Unit
from vipd.backends.ipvs.rules import GUARD
from vipd.backends.ipvs.settings import CONNTRACK, version, wanted
from vipd.backends.ipvs.watching import Services
from vipd.backends.ipvs.work import Work
from vipd.backends.local_routes import DNS_ROUTE_PROTOCOL, LocalRoutes, Wanted
from vipd.backends.protocol import Capabilities, Committed, Departed, Flows
from vipd.backends.sysctl import Setting, Sysctls
from vipd.backends.watching import Watch
from vipd.proxy.errors import DataplaneError, Rejected, Unsupported
from vipd.proxy.names import Family, family_of
from vipd.proxy.settings import DataplaneSettings
from vipd.proxy.virtualserver import Key, VirtualServer

SHORTEST_SWEEP_SECONDS = 0.5
LONGEST_SWEEP_SECONDS = 10.0
"""Connections of what departs are counted this often; more rarely the longer it takes."""
FEW_SERVICES = 64
"""Up to so many services are asked one by one for their connections; else all are listed once."""
_DEFAULT = DataplaneSettings()
_T = TypeVar("_T")

log = structlog.get_logger()


class IpvsDriver:
    """Programs the IPVS, sets, rules and routes of this process's network namespace.

    `state` is the folder for the record of changed sysctls.
    """

    def __init__(
        self,
        settings: DataplaneSettings = _DEFAULT,
        inherited: Sequence[int] = (),
        state: Path = Path("/run/vipd"),
    ) -> None:
        self._settings = settings
        self._kernel = Kernel()
        self._local_routes = LocalRoutes(ROUTE_PROTOCOL)
        self._firewall = Firewall(inherited)
        self._sysctls = Sysctls(state / "sysctls-ipvs.json")
        self._departing = Departing()
        self._order = asyncio.Lock()
        self._sweeping: asyncio.Task[None] | None = None
        self._prepared = False
        self._services = Services()

    def watches(self) -> Sequence[Watch]:
        """Return the watches over services, rules, sets and routes of ours."""
        return (
            *self._firewall.watches(self._order),
            lambda: watching.drifts(self._kernel, self._services, self._order),
            lambda: removed_routes.drifts(ROUTE_PROTOCOL),
        )

    @property
    def lock_waits(self) -> int:
        """How often another program held the xtables lock."""
        return self._firewall.lock_waits

    async def probe(self) -> Capabilities:
        """Return what this host has and lacks for the mode. Changes nothing that stays."""
        return Capabilities("ipvs", await probe.capabilities(self._kernel, self._settings.ipvs))

    async def observe(self) -> Observed | None:
        """Return what the kernel has of ours and what others have; None where there is nothing."""
        members, sets = await self._firewall.listed_members()
        rules = await self._firewall.listed_rules()
        things: dict[Thing, Value] = dict.fromkeys(members, "")
        routes = await asyncio.to_thread(self._local_routes.listed)
        strange = set()
        for one in routes:
            if one.protocol == ROUTE_PROTOCOL:
                things[Route(family_of(one.address), one.address)] = one.source
            elif one.is_local and one.protocol != DNS_ROUTE_PROTOCOL:
                strange.add(one.address)
        services = await asyncio.to_thread(self._kernel.services)
        ours = {one for one in services if record(one) in things}
        held = await asyncio.to_thread(self._kernel.everything) if ours else {}
        for service in ours:
            things[service] = services[service]
            for counted in held.get(service, ()):
                things[Destination(service, counted.address, counted.port)] = counted.weight
        self._firewall.observed(rules, members, sets)
        self._services.observed(things)
        foreign = frozenset(services.keys() - ours)
        if not (things or foreign or rules or sets):
            return None
        return Observed(things, foreign, frozenset(strange), rules, sets)

    async def commit(self, plan: IpvsPlan) -> Committed:
        """Do the plan. A virtual server that is rejected does not keep the others out."""
        async with self._order:
            await self._prepare()
            await self._lay(plan.prologue)
            rejected = await self._units(plan.units)
        if self._departing and (self._sweeping is None or self._sweeping.done()):
            self._sweeping = asyncio.create_task(self._sweep())
        return Committed(rejected)

    async def quiesce(self) -> None:
        """Set every real server of ours to weight 0, and leave only the guard of the rules."""
        async with self._order:
            seen = await self.observe() or Observed()
            await self._ipvs(
                Operation(SET, one, 0)
                for one, weight in seen.things.items()
                if isinstance(one, Destination) and weight != 0
            )
            await self._firewall.remove_rules(keep=(GUARD,))

    async def flows(self) -> Flows:
        """Return the connections of our services, active and inactive (all of UDP is inactive)."""
        ours = set((await self._firewall.listed_members((SERVED,)))[0])
        found = {}
        for service, held in (await asyncio.to_thread(self._kernel.everything)).items():
            count = sum(one.connections for one in held)
            if count and record(service) in ours:
                key = Key(service.family, service.address, service.protocol, service.port)
                found[str(key)] = count
        return Flows(found)

    async def tally(self, servers: Collection[VirtualServer], take: Take, seconds: float) -> None:
        """Read what real servers have counted (see Tallying)."""
        await asyncio.to_thread(counters.read, self._kernel, servers, take, seconds)

    async def cut(self, departed: Sequence[Departed]) -> int:
        """Remove real servers that wait for their connections; these get no packet from now on."""
        async with self._order:
            places = {(one.key, one.address, one.port) for one in departed}
            wanted_ones = []
            for one in self._departing.destinations():
                service = one.service
                for address in (service.address, None):
                    key = Key(service.family, address, service.protocol, service.port)
                    if (key, one.address, one.port) in places:
                        wanted_ones.append(one)
            await self._ipvs(self._departing.cut(wanted_ones))
        return 0

    async def leftovers(self) -> Sequence[str]:
        """Return what `teardown` would remove, in its words. Changes nothing."""
        seen = await self.observe() or Observed()
        return [*_words(seen), *self._sysctls.changed()]

    async def teardown(self) -> Sequence[str]:
        """Remove what is ours: services, then routes, rules, sets; sysctls go back."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeping
        async with self._order:
            self._departing.clear()
            self._prepared = False
            seen = await self.observe() or Observed()
            await self._ipvs(_deletions(seen, Service))
            await self._routes(_deletions(seen, Route))
            await self._firewall.remove_rules()
            await self._firewall.destroy_sets(sorted(seen.sets))
            return [*_words(seen), *self._sysctls.restore()]

    async def set_up(self) -> Sequence[str]:
        """Load IPVS and set its sysctls."""
        refused = await self._refused()
        return [f"{one} is not set: {why} ({one.why})" for one, why in refused.items()]

    async def _refused(self) -> dict[Setting, str]:
        if not await asyncio.to_thread(self._kernel.available):
            await probe.load("ip_vs")
        kernel = version(os.uname().release)
        return self._sysctls.apply(wanted(self._settings.ipvs, kernel))

    # The steps of a commit

    async def _prepare(self) -> None:
        if self._prepared:
            return
        for setting, why in (await self._refused()).items():
            if setting.path == CONNTRACK:
                raise Unsupported(f"{setting}: {why}", "IPVS with connection tracking is needed")
            log.warning("sysctl not written", setting=str(setting), why=why, wanted=setting.why)
        told = self._settings.ipvs
        timeouts = (told.tcp_timeout, told.tcp_fin_timeout, told.udp_timeout)
        if any(timeouts):
            await asyncio.to_thread(self._kernel.set_timeouts, *timeouts)
        self._prepared = True

    async def _lay(self, prologue: Prologue) -> None:
        await self._firewall.create_sets(prologue.sets)
        await self._firewall.put_rules(prologue.chains, prologue.hooked)

    async def _units(self, units: Sequence[Unit]) -> dict[Key, DataplaneError]:
        """Do all units, kind by kind: each kind is one batch, whatever the number of units."""
        rejected: dict[Key, DataplaneError] = {
            unit.key: Rejected("", unit.conflict)
            for unit in units
            if unit.conflict and unit.key is not None
        }
        work = Work(units, lambda unit: self._departing.adapted(unit.now))
        work.failed(await self._firewall.members(work.batch(batches.brings_member)))
        work.failed(await self._ipvs(work.batch(batches.brings_service)))
        work.failed(await self._ipvs(work.batch(batches.brings_destination)))
        work.failed(await self._routes(work.batch(batches.brings_route)))
        await self._take(
            [
                *work.batch(batches.takes_ipvs),
                *work.batch(batches.takes_member),
                *work.backwards(),
            ]
        )
        self._departing.add(work.postponed())
        for unit in work.accepted():
            self._departing.add(unit.later)
        for number, error in work.refused.items():
            key = units[number].key
            if key is None:
                log.warning("stray things stay", why=str(error))
            else:
                rejected[key] = error
        return rejected

    async def _take(self, operations: Sequence[Operation]) -> None:
        """Do deletions: services before their routes, and the record of them last."""
        await self._ipvs(filter(batches.takes_ipvs, operations))
        await self._routes(filter(batches.takes_route, operations))
        failed = await self._firewall.members(filter(batches.takes_member, operations))
        for one, error in failed.items():
            log.warning("not removed", what=str(one), why=str(error))

    async def _ipvs(self, operations: Iterable[Operation]) -> dict[Operation, DataplaneError]:
        wanted_ones = list(operations)
        try:
            failed = await _aside(self._kernel.ipvs, wanted_ones)
        except DataplaneError:
            self._services.doubt()
            raise
        self._services.done(wanted_ones, failed)
        return failed

    async def _routes(self, operations: Iterable[Operation]) -> dict[Operation, DataplaneError]:
        wanted = {
            Wanted(one.verb.word, one.thing.address, str(one.value)): one
            for one in operations
            if isinstance(one.thing, Route)
        }
        failed = await asyncio.to_thread(self._local_routes.change, list(wanted))
        return {wanted[one]: error for one, error in failed.items()}

    # What departs

    async def _sweep(self) -> None:
        """Remove what departs once its connections have ended, until nothing departs any more."""
        pause = SHORTEST_SWEEP_SECONDS
        while self._departing:
            try:
                async with self._order:
                    due = self._departing.due(await self._connections())
                    await self._take(due)
            except DataplaneError as error:
                log.warning("departing endpoints were not looked at", why=str(error))
                due = []
            pause = SHORTEST_SWEEP_SECONDS if due else min(pause * 2, LONGEST_SWEEP_SECONDS)
            if self._departing:
                await asyncio.sleep(pause)

    async def _connections(self) -> dict[Service, Connections]:
        asked = self._departing.services()
        if len(asked) <= FEW_SERVICES:
            held = await asyncio.to_thread(self._kernel.connections, asked)
        else:
            held = await asyncio.to_thread(self._kernel.everything)
        return {
            service: {(one.address, one.port): one.connections for one in counted}
            for service, counted in held.items()
        }


async def _aside(work: Callable[[list[Operation]], _T], operations: list[Operation]) -> _T:
    """Do blocking work: a few messages at once, many beside the event loop."""
    if len(operations) <= FEW_SERVICES:
        return work(operations)
    return await asyncio.to_thread(work, operations)


def _deletions(seen: Observed, kind: type[Service] | type[Route]) -> Iterable[Operation]:
    return [
        Operation(DELETE, one, value) for one, value in seen.things.items() if type(one) is kind
    ]


def _words(seen: Observed) -> list[str]:
    services = [f"virtual server {one}" for one in seen.things if isinstance(one, Service)]
    routes = [f"route local {one.address}" for one in seen.things if isinstance(one, Route)]
    chains = [
        f"{'iptables' if family is Family.IPV4 else 'ip6tables'} {table} chain {name}"
        for family, table, name in seen.rules
        if name.startswith("VIPD-")
    ]
    sets = [f"ipset {set_name(*one)}" for one in sorted(seen.sets)]
    return [*services, *routes, *chains, *sets]
