"""The driver of userspace mode: nft tables, workers and local routes, in the order of a plan.

Lives here: the effects of this backend. Must not: know what a program means (compile.py).
"""

import asyncio
import contextlib
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import msgspec
import structlog

from vipd.backends import removed_routes
from vipd.backends.counts import Take
from vipd.backends.local_routes import DNS_ROUTE_PROTOCOL, LocalRoutes, Wanted
from vipd.backends.nftables import watching as nft_watching
from vipd.backends.nftables.notified import SKELETONS, Ours
from vipd.backends.nftables.objects import FAMILY_OF_WORD, FAMILY_WORD, elements_command
from vipd.backends.nftables.tool import Nft
from vipd.backends.protocol import Capabilities, Committed, Departed, Flows
from vipd.backends.sysctl import Setting, Sysctls
from vipd.backends.usage import Usage
from vipd.backends.userspace import messages, probe, return_path
from vipd.backends.userspace.assignment import served
from vipd.backends.userspace.compile import is_shared
from vipd.backends.userspace.objects import (
    ROUTE_PROTOCOL,
    TABLE,
    Element,
    Forwarding,
    Place,
    ReturnPath,
    Route,
    Thing,
    Value,
)
from vipd.backends.userspace.observed import Fixed, Observed, decode
from vipd.backends.userspace.operations import Operation, UserspacePlan
from vipd.backends.userspace.policy_routing import ReturnPaths, wrong_settings
from vipd.backends.userspace.workers import Workers
from vipd.backends.watching import Watch
from vipd.proxy.errors import DataplaneError, Rejected, UnknownResult
from vipd.proxy.names import Address, Family, family_of
from vipd.proxy.settings import DataplaneSettings
from vipd.proxy.virtualserver import Endpoint, Key, VirtualServer
from vipd.proxy.words import counted

ELEMENTS_AT_ONCE = 10_000
SHORTEST_SWEEP_SECONDS, LONGEST_SWEEP_SECONDS = 0.5, 10.0
"""Between two looks at whether what waits may go."""
MIGRATION = Setting(
    "net/ipv4/tcp_migrate_req",
    "1",
    "connections that wait for a worker that ends go to another one (Linux 5.14, IPv6 too)",
)
_DEFAULT = DataplaneSettings()
_OURS = Ours(
    SKELETONS
    | {(word, table) for word in FAMILY_WORD.values() for table in (TABLE, return_path.TABLE)}
)

log = structlog.get_logger()


class UserspaceDriver:
    """Workers and rules of this process's network namespace.

    `state` is the folder under which the workers' control sockets and the record of the changed
    sysctl are.
    """

    def __init__(
        self,
        settings: DataplaneSettings = _DEFAULT,
        inherited: Sequence[int] = (),
        state: Path = Path("/run/vipd"),
    ) -> None:
        self._nft = Nft(inherited=inherited)
        self._routes = LocalRoutes(ROUTE_PROTOCOL)
        self._return_paths = ReturnPaths(self._nft)
        self._transparent = settings.userspace.transparent
        self._folder = state / "workers"
        self._workers = Workers(
            settings.userspace.workers or len(os.sched_getaffinity(0)),
            self._folder,
            transparent=self._transparent,
        )
        self._sysctls = Sysctls(state / "sysctls-userspace.json")
        self._waiting: dict[Thing, Value] = {}
        self._staying: set[str] = set()
        """Addresses whose route could not be removed, which is said once."""
        self._order = asyncio.Lock()
        self._sweeping: asyncio.Task[None] | None = None

    def watches(self) -> Sequence[Watch]:
        """Return the watches over our tables, routes and the policy rule."""
        return (
            lambda: nft_watching.drifts(_OURS),
            lambda: removed_routes.drifts(ROUTE_PROTOCOL, return_path.ROUTE_TABLE),
        )

    async def probe(self) -> Capabilities:
        """Return what this host has and lacks for the mode. Changes nothing."""
        return Capabilities("userspace", await probe.capabilities(self._nft, self._transparent))

    async def observe(self) -> Observed | None:
        """Return what there is of ours, or None when there is nothing."""
        things: dict[Thing, Value] = {}
        strange = set()
        for one in await asyncio.to_thread(self._routes.listed):
            if one.protocol == ROUTE_PROTOCOL:
                things[Route(family_of(one.address), one.address)] = one.source
            elif one.is_local and one.protocol != DNS_ROUTE_PROTOCOL:
                strange.add(one.address)
        fixed: dict[Family, Fixed] = {}
        for word in await self._tables():
            listing = await self._nft.run(["--json", "list", "table", word, TABLE])
            family = FAMILY_OF_WORD[word]
            try:
                fixed[family], elements = decode(listing)
            except (msgspec.DecodeError, LookupError, TypeError, ValueError) as error:
                raise UnknownResult(f"nft's listing is not understood: {error!r}") from error
            things |= {Element(family, *each): "" for each in elements}
        for family, mark in (await self._return_paths.observe()).items():
            things[ReturnPath(family)] = mark
        told = await self._workers.reports()
        for place, forwarding in served(told, self._workers.count).items():
            things[place] = forwarding
        if not (things or fixed or told):
            return None
        around = {messages.surroundings_of(one.surroundings) for one in told if not one.retired}
        return Observed(
            things, fixed, around.pop() if len(around) == 1 else None, frozenset(strange)
        )

    async def set_up(self) -> Sequence[str]:
        """Set the one sysctl there is."""
        refused = self._sysctls.apply([MIGRATION])
        return [f"{one} is not set: {why} ({one.why})" for one, why in refused.items()]

    async def commit(self, plan: UserspacePlan) -> Committed:
        """Do the plan. A virtual server that is rejected does not keep the others out."""
        async with self._order:
            # Where it cannot be written, those that wait are reset, as with any other server.
            self._sysctls.apply([MIGRATION])
            await self._workers.complete()
            if plan.surroundings is not None:
                await self._workers.surround(plan.surroundings)
            rejected = await self._do(plan)
            if self._waiting:
                await self._remove_idle()
        if self._waiting and (self._sweeping is None or self._sweeping.done()):
            self._sweeping = asyncio.create_task(self._sweep())
        return Committed(rejected, {key: Rejected("", why) for key, why in plan.withdrawn.items()})

    async def quiesce(self) -> None:
        """Accept nothing any more; what is open goes on, and its addresses stay the node's."""
        async with self._order:
            await self._workers.pause()

    async def flows(self) -> Flows:
        """Return the connections and sessions that are open."""
        await self._workers.find()
        found: dict[str, int] = {}
        for place, count in (await self._workers.open()).items():
            key = str(Key(place.family, place.address, place.protocol, place.port))
            found[key] = found.get(key, 0) + count
        return Flows(found)

    async def cut(self, departed: Sequence[Departed]) -> int:
        """Reset what is open to endpoints that left."""
        open_places = await self._workers.open()
        found = [
            (place, Endpoint(one.address, one.port))
            for one in departed
            for place in open_places
            if (place.family, place.protocol, place.port)
            == (one.key.family, one.key.protocol, one.key.port)
            and one.key.address in (None, place.address)
        ]
        return await self._workers.cut(found) if found else 0

    async def leftovers(self) -> Sequence[str]:
        """Return what `teardown` would remove, in its words. Changes nothing."""
        words = [f"table {word} {TABLE}" for word in await self._tables()]
        words += [f"local route {one}" for one in await self._addresses()]
        paths = await self._return_paths.observe()
        words += [f"return path of transparent connections ({one})" for one in paths]
        words += self._sysctls.changed()
        await self._workers.find()
        if running := self._workers.running:
            is_open = (await self._workers.open()).total()
            words.append(f"{counted(running, 'worker')} with {counted(is_open, 'open connection')}")
        # Each worker has a socket there; more are those of another network namespace.
        with contextlib.suppress(OSError):
            if len(os.listdir(self._folder)) == running:
                words.append(f"folder {self._folder}")
        return words

    async def teardown(self) -> Sequence[str]:
        """Remove what is ours: workers, routes, tables."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeping
        async with self._order:
            words = await self.leftovers()
            self._waiting.clear()
            await self._workers.quit()
            with contextlib.suppress(OSError):  # one that is not empty is in use
                self._folder.rmdir()
            gone = [Wanted("del", one) for one in await self._addresses()]
            for error in (await asyncio.to_thread(self._routes.change, gone)).values():
                raise error  # the guard of its address stays with it
            tables = [f"delete table {word} {TABLE}\n" for word in await self._tables()]
            if tables:
                await self._nft.run(["-f", "-"], "".join(tables))
            await self._return_paths.remove(await self._return_paths.observe())
            self._sysctls.restore()
            return words

    async def usage(self, servers: Collection[VirtualServer], client: str = "") -> Usage:
        """Return what workers have counted (see Counting)."""
        return await self._workers.usage(servers, client)

    async def tally(self, servers: Collection[VirtualServer], take: Take, seconds: float) -> None:
        """Read what workers have counted (see Tallying)."""
        await self._workers.tally(servers, take, seconds)

    # The steps of a commit

    async def _do(self, plan: UserspacePlan) -> dict[Key, DataplaneError]:
        """Do all units kind by kind, whatever their number, in the order that plan.py explains.

        Return who is rejected. Nothing of them is left but what was there before.
        """
        wanted, _ = _parted(plan.standing())
        failed = await self._return(wanted)  # first: no answer may be lost
        rejected = plan.concerned(failed | await self._listen(wanted))
        brought, gone = _parted(plan.standing(rejected))
        for one in brought:
            self._waiting.pop(one.thing, None)
        # Without a route in between it is one transaction.
        apart = any(isinstance(one.thing, Route) for one in brought)
        await self._elements(plan.prologue, brought if apart else [*brought, *gone])
        if failed := await self._route(brought):
            rejected |= plan.concerned(failed)
            stays, gone = _parted(plan.standing(rejected))
            await self._elements((), _undone(brought, stays))
        if rejected:
            stays, _ = _parted(plan.standing(rejected))
            await self._listen(_undone(wanted, stays))
            self._waiting |= plan.unneeded(rejected)
        if apart:
            await self._elements((), gone)
        await self._listen(gone)
        for unit in plan.units:
            if unit.key not in rejected:
                self._waiting |= {one.thing: one.value for one in unit.later}
        conflicts = {
            unit.key: Rejected("", unit.conflict)
            for unit in plan.units
            if unit.conflict and unit.key is not None
        }
        return {**conflicts, **rejected}

    async def _elements(self, prologue: Sequence[str], operations: Iterable[Operation]) -> None:
        groups: dict[tuple[str, Family, str], list[str]] = {}
        for verb, thing, _ in operations:
            if isinstance(thing, Element):
                word = "delete" if verb == "del" else "add"
                groups.setdefault((word, thing.family, thing.set), []).append(thing.text)
        lines = list(prologue)
        for (word, family, name), texts in groups.items():
            unique = list(dict.fromkeys(texts))
            lines += [
                elements_command(
                    word, family, name, unique[first : first + ELEMENTS_AT_ONCE], TABLE
                )
                for first in range(0, len(unique), ELEMENTS_AT_ONCE)
            ]
        if lines:
            await self._nft.run(["-f", "-"], "".join(f"{line}\n" for line in lines))

    async def _listen(self, operations: Iterable[Operation]) -> dict[Thing, DataplaneError]:
        wanted: dict[Place, Forwarding] = {}
        gone: list[Place] = []
        for verb, thing, value in operations:
            if isinstance(thing, Place) and verb == "del":
                gone.append(thing)
            elif isinstance(thing, Place) and isinstance(value, Forwarding):
                wanted[thing] = value
        if not wanted and not gone:
            return {}
        failed = await self._workers.serve(wanted, gone)
        return {place: error for place, error in failed.items()}  # noqa: C416 - another key type

    async def _return(self, operations: Iterable[Operation]) -> dict[Thing, DataplaneError]:
        failed: dict[Thing, DataplaneError] = {}
        for one in {
            one.thing: one for one in operations if isinstance(one.thing, ReturnPath)
        }.values():
            family = one.thing.family
            wrong = wrong_settings() if family is Family.IPV4 else []
            if wrong:
                log.error(
                    "endpoints that see their clients do not reach them",
                    why=f"{' '.join(wrong)} set", remedy=probe.SOURCE_REMEDY,
                )  # fmt: skip
            try:
                await self._return_paths.bring(family, str(one.value))
            except Rejected as error:
                failed[one.thing] = error
        return failed

    async def _route(self, operations: Iterable[Operation]) -> dict[Thing, DataplaneError]:
        wanted = {
            Wanted(one.verb, one.thing.address, str(one.value)): one.thing
            for one in operations
            if isinstance(one.thing, Route)
        }
        failed = await asyncio.to_thread(self._routes.change, list(wanted))
        return {wanted[one]: error for one, error in failed.items()}

    # What waits for its connections

    async def _sweep(self) -> None:
        """Remove what waits once its connections have ended, until nothing waits any more."""
        pause = SHORTEST_SWEEP_SECONDS
        while self._waiting:
            try:
                async with self._order:
                    await self._remove_idle()
            except DataplaneError as error:
                log.warning("what has ended is not removed yet", why=str(error))
            if self._waiting:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_SWEEP_SECONDS)

    async def _remove_idle(self) -> None:
        busy = {str(place.address) for place in await self._workers.open()}
        staying = await self._unroute(
            Operation("del", one, value)
            for one, value in self._waiting.items()
            if isinstance(one, Route) and _address(one) not in busy
        )
        due = [
            Operation("del", one, value)
            for one, value in self._waiting.items()
            if not isinstance(one, ReturnPath) and _address(one) not in busy | staying
        ]
        await self._remove_unused([one for one in self._waiting if isinstance(one, ReturnPath)])
        # Added first: whoever took one away meanwhile must not keep the others from going.
        await self._elements((), [*(one._replace(verb="add") for one in due), *due])
        for one in due:
            self._waiting.pop(one.thing, None)

    async def _unroute(self, due: Iterable[Operation]) -> set[str]:
        """Remove routes; return the addresses that stay the node's, and so keep their guard."""
        failed = await self._route(due)
        staying = {_address(one) for one in failed if isinstance(one, Route)}
        if staying - self._staying:
            why = "; ".join(map(str, failed.values()))
            log.warning("addresses stay the node's; it is tried again", why=why)
        self._staying = staying
        return staying

    async def _remove_unused(self, waiting: Sequence[ReturnPath]) -> None:
        """Remove return paths that no connection of a transparent worker can need any more."""
        if not waiting:
            return
        busy = {place.family for place in await self._workers.open(transparent=True)}
        due = [one for one in waiting if one.family not in busy]
        await self._return_paths.remove([one.family for one in due])
        for one in due:
            self._waiting.pop(one, None)

    async def _tables(self) -> list[str]:
        there = await self._nft.tables()
        return [word for word in FAMILY_WORD.values() if (word, TABLE) in there]

    async def _addresses(self) -> list[Address]:
        listed = await asyncio.to_thread(self._routes.listed)
        return [one.address for one in listed if one.protocol == ROUTE_PROTOCOL]


def _address(thing: Route | Element | Place) -> str:
    """Return the address that a route or its guard is about."""
    return thing.text if isinstance(thing, Element) else str(thing.address)


def _parted(operations: Iterable[Operation]) -> tuple[list[Operation], list[Operation]]:
    """Return what is brought, and what goes."""
    brought: list[Operation] = []
    gone: list[Operation] = []
    for one in operations:
        (gone if one.verb == "del" else brought).append(one)
    return brought, gone


def _undone(brought: Iterable[Operation], stays: Iterable[Operation]) -> list[Operation]:
    """Return what takes back what was added and does not stay; what is shared waits instead."""
    kept = {one.thing for one in stays}
    return [
        one._replace(verb="del")
        for one in brought
        if one.verb == "add" and one.thing not in kept and not is_shared(one.thing)
    ]
