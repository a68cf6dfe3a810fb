"""Watching chains and sets of iptables and ipset: told by the kernel, or looked at twice a second.

Lives here: when it is looked, and how closely. Must not: know what chains are for, or what is done
about a difference (proxy/repair.py).

The nft variant: nf_tables tells of every change. The legacy variant: the number of rules and the
size of a table are asked twice a second; where they are others than before, the table is read and
its chains of ours are counted. Other programs change these tables now and then (a container gets a
port), so the closer look waits the longer the more it costs.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Collection, Sequence

from msgspec import Struct

from vipd.backends import ipset_counts, legacy_tables
from vipd.backends.legacy_tables import Info, Known, Shape
from vipd.backends.nftables import tables
from vipd.backends.nftables.notified import SKELETONS, Ours
from vipd.backends.nftables.objects import FAMILY_WORD
from vipd.backends.nftables.watching import transactions
from vipd.backends.tally import Place, Tally
from vipd.backends.watching import Drift, Watch
from vipd.backends.xtables import PREFIX, Variant, Xtables, loaded
from vipd.proxy.names import Family

LOOK_SECONDS = 0.5
"""Between two cheap looks: 0.1 ms of a processor each."""
REST = 20.0
"""A closer look is followed by another after so many times what it took: 5 % of a processor."""
MOST_TOLD = 8
_FAMILY_OF_WORD = {word: family for family, word in FAMILY_WORD.items()}


class Hook(Struct, frozen=True):
    """A rule of a built-in chain that leads to a chain of ours."""

    table: str
    chain: str
    to: str


class XtablesWatching:
    """The watches over chains and sets of one mode.

    `sets` are the names of its sets; `order` is held by whoever changes any of it.
    """

    def __init__(
        self,
        tools: Xtables,
        tally: Tally,
        hooks: Sequence[Hook],
        sets: Collection[str],
        order: asyncio.Lock,
    ) -> None:
        self._tools = tools
        self._tally = tally
        self._hooks = hooks
        self._sets = sets
        self._order = order
        self._tables = sorted({one.table for one in hooks})
        self._infos: dict[Place, Info] = {}
        self._known: dict[Place, Known] = {}
        self._took = 0.0

    def watches(self) -> Sequence[Watch]:
        """Return what has to be watched side by side."""
        return (self._told, self._rules_looked_at, self._sets_looked_at)

    async def _told(self) -> AsyncIterator[Drift]:
        """Yield what nf_tables tells: of the skeleton, and of the nft variant's tables."""
        shared = frozenset((word, table) for word in FAMILY_WORD.values() for table in self._tables)
        async for one in transactions(Ours(SKELETONS, shared, PREFIX)):
            what = one.touched
            if not what and await self._tools.variant() is Variant.NFT:
                what = tuple(map(str, self._missing_jumps(one.beside)))
            if what:
                yield Drift(what, one.name, one.process)

    def _missing_jumps(self, beside: Collection[tuple[str, str, str]]) -> list[str]:
        """Return the jumps of ours that are not in these chains."""
        missing = []
        for word, table, chain in beside:
            wanted = [one.to for one in self._hooks if (one.table, one.chain) == (table, chain)]
            known = self._tally.chains.get((_FAMILY_OF_WORD[word], table), {})
            rules = tables.rules(word, table, chain) if wanted else []
            missing += [
                f"rule deleted from {word} {table} {chain}, to {to}"
                for to in wanted
                if to in known and not any(f"{to}\0".encode() in rule for rule in rules)
            ]
        return missing

    async def _rules_looked_at(self) -> AsyncIterator[Drift]:
        """Yield what is wrong in tables of the legacy variant."""
        await asyncio.sleep(LOOK_SECONDS)
        if await self._tools.variant() is not Variant.LEGACY:
            return
        while True:
            wrong: list[str] = []
            self._took = 0.0
            for family in Family:
                for table in self._tables:
                    wrong += await self._wrong((family, table))
            if wrong:
                yield Drift(tuple(wrong[:MOST_TOLD]))
            await asyncio.sleep(max(LOOK_SECONDS, REST * self._took))

    async def _wrong(self, place: Place) -> list[str]:
        """Return what is wrong in a table, if it may have changed since the last look."""
        is_known = place in self._tally.chains
        if not self._tally.chains or (is_known and not self._tally.chains[place]):
            return []  # nothing of ours
        if not loaded(*place):
            return [f"table {place[1]} of {place[0]} is gone"] if is_known else []
        if legacy_tables.info(*place) == self._infos.get(place):
            return []
        async with self._order:  # nothing of ours is half done then
            self._infos[place] = legacy_tables.info(*place)
            found, took = await asyncio.to_thread(self._shape, place)
            self._took += took
            return self._differences(place, found)

    def _shape(self, place: Place) -> tuple[Shape, float]:
        """Return what a table has, and the seconds of a processor that this took."""
        started = time.thread_time()
        known = self._known.setdefault(place, {})
        return legacy_tables.shape(*place, PREFIX, known), time.thread_time() - started

    def _differences(self, place: Place, found: Shape) -> list[str]:
        family, table = place
        return [
            *self._tally.wrong_chains(place, found.rules),
            *(
                f"rule deleted from {family} {table} {one.chain}, to {one.to}"
                for one in self._hooks
                if one.table == table
                and one.to in self._tally.chains.get(place, {})
                and (one.chain, one.to) not in found.jumps
            ),
        ]

    async def _sets_looked_at(self) -> AsyncIterator[Drift]:
        """Yield which sets have more or fewer entries than they should."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._tally.sets:
                continue
            if not self._tally.wrong_sets(self._sets, ipset_counts.held()):
                continue
            async with self._order:
                found = ipset_counts.held()
                wrong = self._tally.wrong_sets(self._sets, found)
                for name in self._sets:  # told once; whoever puts it right observes anew
                    self._tally.doubt_set(name)
                self._tally.wrong_sets(self._sets, found)
            if wrong:
                yield Drift(tuple(wrong[:MOST_TOLD]))
