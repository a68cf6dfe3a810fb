"""The nftables driver: runs `nft` and says in our words what it said.

Lives here: the one effect of this backend. Must not: know what a program means (compile.py).
Only the tables of objects.py are ever listed or changed.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence

import msgspec
import structlog

from vipd.backends.counts import Take
from vipd.backends.nftables import counters, mending, probe, watching
from vipd.backends.nftables.chain_notes import ChainNotes
from vipd.backends.nftables.compile import Program, Shared
from vipd.backends.nftables.notified import SKELETONS, Ours, may_concern_chains
from vipd.backends.nftables.objects import FAMILY_WORD, SKELETON, TABLE
from vipd.backends.nftables.observed import Observed, decode
from vipd.backends.nftables.pipeline import GENERATION, GENERATION_MASK, REFUSING
from vipd.backends.nftables.plan import NftPlan, Unit, discard, transaction
from vipd.backends.nftables.tool import Nft
from vipd.backends.protocol import Capabilities, Committed, Departed, Flows
from vipd.backends.watching import Drift, Watch
from vipd.proxy.errors import Busy, DataplaneError, OutOfStep, Rejected, UnknownResult
from vipd.proxy.names import Family
from vipd.proxy.virtualserver import Key, VirtualServer

LARGEST_TRANSACTION = 10_000
"""Elements in one transaction. A cold start in larger ones is hardly faster, and `nft` needs
about 1 kB of memory for each element."""
AT_ONCE = 2
"""Runs of nft side by side."""

_OURS = Ours(frozenset((word, TABLE) for word in FAMILY_WORD.values()) | SKELETONS)

log = structlog.get_logger()


class NftablesDriver:
    """Runs `nft` in the network namespace of this process.

    `inherited` are descriptors that each `nft` holds too: the lock of instance.py.
    """

    def __init__(self, nft: str | None = None, inherited: Sequence[int] = ()) -> None:
        self.cleanup_failures: Counter[Family] = Counter()
        """How often something that nothing uses any more could not be removed yet."""
        self._nft = Nft(nft, inherited)
        self._garbage: set[Shared] = set()
        self._order = asyncio.Lock()
        self._places = asyncio.Semaphore(AT_ONCE)
        self._notes = ChainNotes()
        self._is_suspect = False
        """Whether somebody else changed chains, or may have, and they were not mended since."""

    def watches(self) -> Sequence[Watch]:
        """Return the watch over our tables."""
        return (self._told,)

    async def _told(self) -> AsyncIterator[Drift]:
        async for drift in watching.drifts(_OURS):
            self._is_suspect |= may_concern_chains(drift.what)
            yield drift

    async def probe(self) -> Capabilities:
        """Return what this host has and lacks for the mode. Changes nothing."""
        found = [await probe.tool(self._nft.run)]
        if found[0].present:
            found += await probe.kernel(self._nft.run)
        return Capabilities("nftables", tuple(found))

    async def observe(self) -> Observed | None:
        """Return what our tables hold, or None when there are none."""
        try:
            there = await self._nft.tables()
            ours = [
                (word, name)
                for word in FAMILY_WORD.values()
                for name in (TABLE, SKELETON)
                if (word, name) in there
            ]
            if all(name != TABLE for _, name in ours):
                return None
            return decode(
                [
                    await self._nft.run(["--json", "list", "table", word, name])
                    for word, name in ours
                ]
            )
        except Rejected as error:
            # A listing changes nothing, so it can always be tried again.
            raise UnknownResult(str(error)) from error
        except (msgspec.DecodeError, LookupError, TypeError, ValueError) as error:
            raise UnknownResult(f"nft's listing is not understood: {error!r}") from error

    async def commit(self, plan: NftPlan) -> Committed:
        """Do the plan in transactions of bounded size.

        A caller may commit plans side by side, to use two processors for a cold start: what nft
        does itself takes longer than the kernel's part. A plan that declares something runs alone,
        because those after it use what it declares.
        """
        async with self._running(AT_ONCE if plan.prologue else 1):
            return await self._commit(plan)

    async def mend(self, program: Program) -> int:
        """Put right what the kernel has otherwise than a program that was committed (see Mending).

        Raise DataplaneError.
        """
        async with self._running(AT_ONCE):
            is_suspect, self._is_suspect = self._is_suspect, False
            try:
                return await mending.mend(self._nft, program, self._notes, is_suspect=is_suspect)
            except DataplaneError:
                self._is_suspect |= is_suspect
                raise

    async def differing(self, program: Program) -> Sequence[str]:
        """Return what the kernel has otherwise than a program that was committed, in words.

        Raise DataplaneError.
        """
        async with self._running(AT_ONCE):
            work = await asyncio.to_thread(
                mending.difference, program, self._notes, is_suspect=self._is_suspect
            )
            return work.what

    @contextlib.asynccontextmanager
    async def _running(self, places: int) -> AsyncIterator[None]:
        held = 0
        try:
            async with self._order:
                while held < places:
                    await self._places.acquire()
                    held += 1
            yield
        finally:
            for _ in range(held):
                self._places.release()

    async def quiesce(self) -> None:
        """Remove the tables: the skeleton and connection tracking keep translated flows going."""
        await self.teardown()

    async def flows(self) -> Flows:
        """Return the flows that carry this dataplane's generation."""
        from vipd.backends import conntrack

        return await conntrack.flows(int(GENERATION, 16), int(GENERATION_MASK, 16))

    async def cut(self, departed: Sequence[Departed]) -> int:
        """Do nothing: a translated flow hangs on its conntrack entry alone."""
        return 0

    async def tally(self, servers: Collection[VirtualServer], take: Take, seconds: float) -> None:
        """Read what elements have counted (see Tallying)."""
        await asyncio.to_thread(counters.read, servers, take, seconds)

    async def leftovers(self) -> Sequence[str]:
        """Return our tables."""
        there = await self._nft.tables()
        return [f"table {word} {TABLE}" for word in FAMILY_WORD.values() if (word, TABLE) in there]

    async def teardown(self) -> Sequence[str]:
        """Remove our tables and say which there were."""
        ours = await self.leftovers()
        if ours:
            # The kernel unhooks the chains of a table one after the other: where it begins with
            # the translation, a packet would be refused that another mode is to take.
            emptied = (
                f"{one.removeprefix('table ')} {chain}" for one in ours for chain in REFUSING
            )
            await self._nft.run(
                ["-f", "-"], "".join(f"add chain {one}\nflush chain {one}\n" for one in emptied)
            )
            await self._nft.run(["-f", "-"], "".join(f"delete {one}\n" for one in ours))
        return ours

    async def _commit(self, plan: NftPlan) -> Committed:
        rejected: dict[Key, DataplaneError] = {}
        units, prologue = plan.units, plan.prologue
        if prologue:
            self._notes.forget_all()
        self._notes.forget(
            (FAMILY_WORD[unit.family], TABLE, chain.name) for unit in units for chain in unit.chains
        )
        if plan.whole:
            # Services are away between the prologue and what follows, so find out first.
            units, rejected = await self._accepted(prologue, units)
            await self._nft.run(["-f", "-"], transaction(prologue, units))
            units, prologue = (), ()
        for group in _cut(prologue, units):
            rejected |= await self._commit_units(prologue, group)
            prologue = ()
        await self._discard(plan)
        return Committed(rejected)

    async def _commit_units(
        self, prologue: Sequence[str], units: Sequence[Unit]
    ) -> dict[Key, DataplaneError]:
        """Commit units in one transaction, or in halves until the rejected ones stand alone."""
        try:
            await self._nft.run(["-f", "-"], transaction(prologue, units))
        except Rejected as error:
            if prologue:
                # Alone: if it is at fault, that is the whole program's.
                await self._nft.run(["-f", "-"], transaction(prologue, ()))
                return await self._commit_units((), units) if units else {}
            if len(units) == 1:
                return _alone(units[0], error)
            middle = len(units) // 2
            first = await self._commit_units((), units[:middle])
            return first | await self._commit_units((), units[middle:])
        return {}

    async def _accepted(
        self, prologue: Sequence[str], units: Sequence[Unit]
    ) -> tuple[tuple[Unit, ...], dict[Key, DataplaneError]]:
        """Return the units that would be accepted after the prologue, and the others' errors."""
        try:
            await self._nft.run(["--check", "-f", "-"], transaction(prologue, units))
        except Rejected as error:
            if not units:
                raise
            if len(units) == 1:
                return (), _alone(units[0], error)
            middle = len(units) // 2
            good, bad = await self._accepted(prologue, units[:middle])
            more, worse = await self._accepted(prologue, units[middle:])
            return (*good, *more), bad | worse
        return tuple(units), {}

    async def _discard(self, plan: NftPlan) -> None:
        """Remove own chains and maps that nothing uses, now or after a later commit.

        Before 6.2 the kernel holds a chain in use for a moment after the element that led to it
        is gone (EBUSY), which is no reason to fail a commit.
        """
        declared = {
            Shared(unit.family, word, one.name)
            for unit in plan.units
            for word, objects in (("chain", unit.chains), ("map", unit.containers))
            for one in objects
        }
        self._garbage = (self._garbage | set(plan.garbage)) - declared
        if not self._garbage:
            return
        for group in (
            tuple(self._garbage),
            *((one,) for one in sorted(self._garbage, key=_chains_first)),
        ):
            if not self._garbage.issuperset(group):
                continue
            try:
                await self._nft.run(["-f", "-"], discard(group))
            except Busy:
                continue  # one by one, or after a later commit
            except (Rejected, OutOfStep):
                if len(group) > 1:
                    continue
            self._garbage -= set(group)  # done, or somebody else did it
        self.cleanup_failures.update(Family(one.family) for one in self._garbage)


def _chains_first(one: Shared) -> tuple[bool, Shared]:
    return one.container != "chain", one


def _alone(unit: Unit, error: Rejected) -> dict[Key, DataplaneError]:
    """Return whom the rejection of a single unit concerns.

    Stray elements that cannot be removed concern nobody; the next observation meets them again.
    """
    if unit.key is None:
        log.warning("stray elements stay", why=str(error))
        return {}
    return {unit.key: error}


def _cut(prologue: Sequence[str], units: Sequence[Unit]) -> list[tuple[Unit, ...]]:
    """Return the units in groups of bounded size; at least one group where there is a prologue."""
    groups: list[tuple[Unit, ...]] = []
    group: list[Unit] = []
    size = 0
    for unit in units:
        if group and size + unit.size > LARGEST_TRANSACTION:
            groups.append(tuple(group))
            group, size = [], 0
        group.append(unit)
        size += unit.size
    if group or (prologue and not groups):
        groups.append(tuple(group))
    return groups
