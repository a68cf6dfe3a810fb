"""The iptables driver: runs the tools, fills the sets, and finds the virtual server at fault.

Lives here: the one effect of this backend. Must not: know what a program means (compile.py).
Only chains and sets that carry our names are ever changed, and the jumps to them.

A service is never half there: entries that its rules rely on come before the rules, the entry that
makes it live comes after them, and what is not needed any more goes last.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import structlog

from vipd.backends.counts import Take
from vipd.backends.ipset import IpSets, SetSpec
from vipd.backends.iptables import counters, probe
from vipd.backends.iptables.objects import (
    GENERATION,
    GENERATION_MASK,
    NAT,
    TABLES,
    Element,
    set_name,
)
from vipd.backends.iptables.observed import Observed, decode
from vipd.backends.iptables.pipeline import FORWARD, JUMPS, LIVE, POSTROUTING, SETS
from vipd.backends.iptables.plan import IptablesPlan, TableWork, restore
from vipd.backends.protocol import Capabilities, Committed, Departed, Flows
from vipd.backends.tally import Tally
from vipd.backends.watching import Watch
from vipd.backends.xtables import RejectedAt, Tools, Variant, Xtables, program
from vipd.backends.xtables_watching import Hook, XtablesWatching
from vipd.proxy.errors import Busy, DataplaneError, Rejected, Unsupported
from vipd.proxy.names import Family
from vipd.proxy.settings import DataplaneSettings
from vipd.proxy.virtualserver import Key, VirtualServer

_HOOKS = [Hook(one.table, one.chain, one.to) for one in JUMPS]
LARGEST_SET = 1 << 20
"""Entries that a set can have; the kernel allocates as they come."""

log = structlog.get_logger()


class _Refused(Exception):
    """The kernel took everything but what these virtual servers need.

    `written` tells that their rules are in the tables already.
    """

    def __init__(self, keys: dict[Key, DataplaneError], *, written: bool = False) -> None:
        super().__init__()
        self.keys = keys
        self.written = written


class _Ours(NamedTuple):
    """What there is of ours in one table of one variant."""

    variant: Variant
    family: Family
    table: str
    chains: tuple[str, ...]
    jumps: tuple[tuple[str, str], ...]


class IptablesDriver:
    """Runs the iptables tools in the network namespace of this process.

    `settings` say nothing that this mode needs.
    `inherited` are descriptors that each tool holds too: the lock of instance.py. `variant` None:
    the one that the host uses. `largest_set` is how many entries a set may have.
    """

    def __init__(
        self,
        settings: DataplaneSettings | None = None,
        inherited: Sequence[int] = (),
        *,
        variant: Variant | None = None,
        tools: Xtables | None = None,
        largest_set: int = LARGEST_SET,
    ) -> None:
        self.tools = tools or Xtables(variant, inherited)
        self.sets = IpSets()
        self.rules: dict[tuple[str, Family], int] = {}
        """How many rules of ours each table had when it was listed last."""
        self.written: Counter[tuple[str, Family]] = Counter()
        """How many rules the last commit wrote into each table."""
        self._largest_set = largest_set
        self._order = asyncio.Lock()
        self._tally = Tally()

    def watches(self) -> Sequence[Watch]:
        """Return the watches over our chains, the jumps to them, and our sets."""
        names = [set_name(name, family) for family in Family for name in SETS]
        return XtablesWatching(self.tools, self._tally, _HOOKS, names, self._order).watches()

    @property
    def lock_waits(self) -> int:
        """How often another program held the xtables lock."""
        return self.tools.lock_waits

    async def probe(self) -> Capabilities:
        """Return what this host has and lacks for the mode. Changes nothing."""
        return Capabilities("iptables", tuple(await probe.capabilities(self.tools, self.sets)))

    async def observe(self) -> Observed | None:
        """Return what the kernel has of ours, or None when there is nothing."""
        families = await self._families()
        places = [(family, table) for family in families for table in TABLES]
        texts = await asyncio.gather(*(self.tools.save(*place) for place in places))
        there = await self.sets.names()
        sets = {}
        for family in families:
            for name in SETS:
                if set_name(name, family) in there:
                    held = await self.sets.entries(set_name(name, family))
                    if held is not None:
                        sets[family, name] = held
        seen = decode(dict(zip(places, texts, strict=True)), sets)
        self._tally.observed(
            {
                place: {name: len(one.targets) for name, one in chains.items()}
                for place, chains in seen.chains.items()
            },
            {set_name(name, family): len(held) for (family, name), held in sets.items()},
        )
        return seen or None

    async def commit(self, plan: IptablesPlan) -> Committed:
        """Do the plan, each table at once. Plans follow each other in the order they came."""
        async with self._order:
            rejected: dict[Key, DataplaneError] = {}
            self.written.clear()
            jumped: set[tuple[Family, str]] = set()
            while True:
                try:
                    await self._do(plan, jumped)
                    return Committed(rejected)
                except _Refused as refused:
                    rejected |= refused.keys
                    await self._undo(plan, refused)
                    plan = plan.excluding(refused.keys)

    async def quiesce(self) -> None:
        """Take the jumps away that lead new flows to us; what serves established flows stays."""
        keep = {f"-j {FORWARD}", f"-j {POSTROUTING}"}
        # As in teardown, what refuses first.
        for one in reversed(await self._ours()):
            jumps = tuple(jump for jump in one.jumps if _last(jump[1]) not in keep)
            if jumps:
                await self._restore(one.family, one.table, TableWork(stray=jumps), one.variant)

    async def flows(self) -> Flows:
        """Return the flows that carry this dataplane's generation."""
        from vipd.backends import conntrack

        return await conntrack.flows(GENERATION, GENERATION_MASK)

    async def cut(self, departed: Sequence[Departed]) -> int:
        """Do nothing: a translated flow hangs on its conntrack entry alone."""
        return 0

    async def tally(self, servers: Collection[VirtualServer], take: Take, seconds: float) -> None:
        """Read what rules have counted (see Tallying), and how many there are."""
        rules: dict[tuple[str, Family], int] = {}
        try:
            async with asyncio.timeout(seconds):
                for family in await self._families():
                    for table in TABLES:
                        text = await self.tools.save(family, table, counters=True)
                        rules[table, family] = await asyncio.to_thread(counters.rules, text)
                        if table == NAT:
                            counted = counters.counts(text, servers, family)
                            await asyncio.to_thread(take, counted)
        except TimeoutError as error:
            raise Busy(f"rules are not listed within {seconds:g} s") from error
        self.rules = rules

    async def leftovers(self) -> Sequence[str]:
        """Return our chains of each table, in either variant, and our sets."""
        found = [
            f"{program(one.variant, one.family)} table {one.table}: {len(one.chains)} chains "
            f"{one.chains[0]}…, {len(one.jumps)} jumps"
            for one in await self._ours()
        ]
        return [*found, *(f"ipset {name}" for name in await self._our_sets())]

    async def teardown(self) -> Sequence[str]:
        """Remove our chains and jumps, of both variants, and our sets, and say what there was."""
        async with self._order:
            found = await self.leftovers()
            # The filter table first: it refuses what the other one does not translate any more.
            for one in reversed(await self._ours()):
                work = TableWork(remove=one.chains, stray=one.jumps)
                await self._restore(one.family, one.table, work, one.variant)
            for name in await self._our_sets():
                await self.sets.destroy(name)
            return found

    async def _do(self, plan: IptablesPlan, jumped: set[tuple[Family, str]]) -> None:
        """Do a plan; raise _Refused where it has to be done again without some virtual servers.

        `jumped` are the tables whose jumps are in order since an earlier time.
        """
        work = plan.work
        families = await self._families()
        for family in families:
            for of, name in work.sets:
                if of is family:
                    await self.sets.create(self._spec(name, family))
                    self._tally.made_set(set_name(name, family))
            await self._add(plan, family, (name for name in SETS if name not in LIVE))
        for family in families:
            for table in TABLES:
                change = work.tables.get((family, table))
                if change and (family, table) in jumped:
                    change = TableWork(change.write, change.remove)
                if change:
                    await self._write(plan, family, table, change)
                    jumped.add((family, table))
            await self._add(plan, family, LIVE, written=True)
            for name in reversed(SETS):
                entries = work.delete.get((family, name))
                if entries:
                    failed = await self._delete(set_name(name, family), entries)
                    for entry, error in failed.items():
                        log.warning("an entry stays", entry=entry, why=str(error))

    async def _add(
        self, plan: IptablesPlan, family: Family, names: Iterable[str], *, written: bool = False
    ) -> None:
        refused: dict[Key, DataplaneError] = {}
        for name in names:
            entries = plan.work.add.get((family, name))
            if not entries:
                continue
            failed = await self._put(set_name(name, family), entries)
            for entry, error in failed.items():
                keys = plan.owners(Element(name, entry), family)
                if not keys:
                    raise error
                refused |= dict.fromkeys(keys, error)
        if refused:
            raise _Refused(refused, written=written)

    async def _undo(self, plan: IptablesPlan, refused: _Refused) -> None:
        """Take back what was done for virtual servers that cannot be served after all."""
        work = plan.undoing(refused.keys).work
        if refused.written:
            for (family, table), change in work.tables.items():
                await self._restore(family, table, change)
        for (family, name), entries in work.delete.items():
            await self._delete(set_name(name, family), entries)

    async def _put(self, name: str, entries: list[str]) -> dict[str, DataplaneError]:
        """Add entries to a set; return those that were not taken."""
        try:
            failed = await self.sets.add(name, entries)
        except DataplaneError:
            self._tally.doubt_set(name)
            raise
        self._tally.added(name, entries, failed)
        return failed

    async def _delete(self, name: str, entries: list[str]) -> dict[str, DataplaneError]:
        """Delete entries from a set; return those that stay."""
        try:
            failed = await self.sets.delete(name, entries)
        except DataplaneError:
            self._tally.doubt_set(name)
            raise
        self._tally.deleted(name, entries, failed)
        return failed

    async def _write(
        self, plan: IptablesPlan, family: Family, table: str, change: TableWork
    ) -> None:
        """Write a table; raise _Refused with the virtual server that the kernel does not take."""
        self.written[table, family] += sum(len(one.rules) for one in change.write)
        try:
            await self._restore(family, table, change, jumped=plan.before is not None)
        except (RejectedAt, Unsupported) as error:
            if table != NAT or not plan.changed_keys():
                raise
            raise _Refused(await self._at_fault(plan, family, change, error)) from error

    async def _at_fault(
        self, plan: IptablesPlan, family: Family, change: TableWork, error: DataplaneError
    ) -> dict[Key, DataplaneError]:
        """Return the virtual servers because of which a table was refused.

        By the line that the tool names, or else by trying halves: the legacy variant is refused by
        the kernel as a whole. `--test` does not ask the kernel, so halves are tried for good: each
        is a plan of its own, and what it wrote is right.
        """
        if isinstance(error, RejectedAt) and error.line:
            line = next(islice(restore(NAT, change), error.line - 1, None))
            key = line.key or (plan.owner(line.chain) if line.chain else None)
            if key is not None:
                server = plan.after.servers.get(key)
                same = {
                    one
                    for one in plan.changed_keys()
                    if one.family is family
                    and server is not None
                    and (other := plan.after.servers.get(one)) is not None
                    and other.owner == server.owner
                }
                return dict.fromkeys({key} if line.key else same, error)
        keys = sorted(
            (key for key in plan.changed_keys() if key.family is family), key=Key.sort_key
        )
        if not keys or not await self._taken(plan.excluding(keys), family):
            raise error
        return await self._halved(plan, family, keys, error)

    async def _halved(
        self, plan: IptablesPlan, family: Family, keys: Sequence[Key], error: DataplaneError
    ) -> dict[Key, DataplaneError]:
        """Return those of `keys` that are refused; `plan` is taken without all of them."""
        if len(keys) == 1:
            return {keys[0]: error}
        middle = len(keys) // 2
        found: dict[Key, DataplaneError] = {}
        for part, rest in ((keys[:middle], keys[middle:]), (keys[middle:], ())):
            smaller = plan.excluding([*rest, *found])
            if not await self._taken(smaller, family):
                found |= await self._halved(smaller, family, part, error)
        return found

    async def _taken(self, plan: IptablesPlan, family: Family) -> bool:
        """Return whether the kernel takes the nat table of a plan. It has it then."""
        change = plan.work.tables.get((family, NAT))
        if change is None:
            return True
        try:
            # Without the jumps: they are part of the plan that is done in the end.
            await self._restore(family, NAT, TableWork(change.write, ()))
        except (Rejected, Unsupported):
            return False
        return True

    async def _restore(
        self,
        family: Family,
        table: str,
        work: TableWork,
        variant: Variant | None = None,
        *,
        jumped: bool = False,
    ) -> None:
        """Restore a table. `jumped`: only where our jumps are there, or it is OutOfStep.

        --noflush makes a chain that somebody took away anew, so nothing else would tell that the
        rest of the table has been flushed.
        """
        lines = [line.text for line in restore(table, work)]
        if jumped:
            lines[-1:-1] = [f"-C {one.chain} {one.rule}" for one in JUMPS if one.table == table]
        text = "".join(f"{line}\n" for line in lines)
        try:
            await self.tools.restore(family, text, variant=variant)
        except DataplaneError:
            self._tally.doubt((family, table))
            raise
        if variant in (None, await self.tools.variant()):
            written = {one.name: len(one.rules) for one in work.write}
            self._tally.wrote((family, table), written, work.remove)

    async def _families(self) -> list[Family]:
        """Return the families for which there are tools."""
        variant = await self.tools.variant()
        return [family for family in Family if self.tools.has(family, variant)]

    def _spec(self, name: str, family: Family) -> SetSpec:
        return SetSpec(set_name(name, family), SETS[name].type, family, self._largest_set)

    async def _ours(self) -> list[_Ours]:
        """Return what there is of ours in every table, also in the variant that is not in use."""
        found = []
        tools: Tools = await self.tools.find()
        for variant in tools.present:
            for family in Family:
                if not self.tools.has(family, variant):
                    continue
                for table in TABLES:
                    text = await self.tools.save(family, table, variant)
                    seen = decode({(family, table): text}, {})
                    chains = tuple(seen.chains[family, table])
                    if chains:
                        jumps = tuple(seen.jumps[family, table])
                        found.append(_Ours(variant, family, table, chains, jumps))
        return found

    async def _our_sets(self) -> list[str]:
        there = await self.sets.names()
        ours = {set_name(name, family) for family in Family for name in SETS}
        return sorted(ours & there)


def _last(rule: str) -> str:
    """Return the jump at the end of a rule."""
    return rule[rule.rfind("-j ") :]
