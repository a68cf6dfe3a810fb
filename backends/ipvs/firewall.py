"""The sets and fixed rules of IPVS mode, put in place, listed and removed.

Lives here: what the tools are told (backends/ipset.py, backends/xtables.py run them). Must not:
decide what should be there (plan.py, rules.py).
"""

import asyncio
import re
from collections.abc import Iterable, Mapping, Sequence

from vipd.backends.ipset import IpSets, SetSpec
from vipd.backends.ipvs.objects import DELETE, SETS, Member, Operation, set_name
from vipd.backends.ipvs.observed import Place
from vipd.backends.ipvs.rules import OUR_CHAINS, TABLES, Chain, chains
from vipd.backends.tally import Tally
from vipd.backends.watching import Watch
from vipd.backends.xtables import Xtables
from vipd.backends.xtables_watching import Hook, XtablesWatching
from vipd.proxy.errors import DataplaneError
from vipd.proxy.names import Family
from vipd.proxy.virtualserver import NodeNetwork

MOST_ELEMENTS = 1 << 20
_RULE = re.compile(r"-A (\S+) .*?--comment (?:\"([^\"]*)\"|(\S+))")
_HOOKS = [
    Hook(chain.table, hook, chain.name)
    for chain in chains(Family.IPV4, NodeNetwork())
    for hook, _ in chain.hooks
]
Hooked = tuple[Family, str, str, str]
"""Family, table, built-in chain and comment of a rule that leads to a chain of ours."""


class Firewall:
    """ipset and iptables in the network namespace of this process."""

    def __init__(self, inherited: Sequence[int] = ()) -> None:
        self._sets = IpSets()
        self._tables = Xtables(inherited=inherited)
        self._tally = Tally()

    def watches(self, order: asyncio.Lock) -> Sequence[Watch]:
        """Return the watches over our chains, the jumps to them, and our sets.

        `order` is held by whoever changes any of it.
        """
        names = [set_name(family, name) for family in Family for name in SETS]
        return XtablesWatching(self._tables, self._tally, _HOOKS, names, order).watches()

    def observed(
        self,
        rules: Mapping[Place, Sequence[str]],
        members: Iterable[Member],
        sets: Iterable[tuple[Family, str]],
    ) -> None:
        """Begin anew to count what there is, from what was listed."""
        counted: dict[tuple[Family, str], dict[str, int]] = {
            (family, table): {} for family in Family for table in TABLES
        }
        for (family, table, name), told in rules.items():
            if name in OUR_CHAINS:
                counted[family, table][name] = len(told)
        counts = {set_name(*one): 0 for one in sets}
        for one in members:
            counts[set_name(one.family, one.set)] += 1
        self._tally.observed(counted, counts)

    @property
    def lock_waits(self) -> int:
        """How often another program held the xtables lock."""
        return self._tables.lock_waits

    async def create_sets(self, wanted: Iterable[tuple[Family, str]]) -> None:
        """Create sets; Rejected where one is there with another type."""
        for family, name in wanted:
            spec = SetSpec(set_name(family, name), SETS[name], family, MOST_ELEMENTS)
            await self._sets.create(spec)
            self._tally.made_set(spec.name)

    async def members(self, operations: Iterable[Operation]) -> dict[Operation, DataplaneError]:
        """Add and delete elements, each set in one go; return what was not taken."""
        by_set: dict[tuple[Family, str, bool], dict[str, Operation]] = {}
        for one in operations:
            if isinstance(one.thing, Member):
                place = (one.thing.family, one.thing.set, one.verb is DELETE)
                by_set.setdefault(place, {})[one.thing.text] = one
        failed: dict[Operation, DataplaneError] = {}
        for (family, name, gone), texts in by_set.items():
            whole = set_name(family, name)
            change = self._sets.delete if gone else self._sets.add
            count = self._tally.deleted if gone else self._tally.added
            try:
                refused = await change(whole, texts)
            except DataplaneError:
                self._tally.doubt_set(whole)
                raise
            count(whole, texts, refused)
            failed |= {texts[text]: error for text, error in refused.items()}
        return failed

    async def listed_members(
        self, names: Iterable[str] = SETS
    ) -> tuple[list[Member], frozenset[tuple[Family, str]]]:
        """Return the elements of our sets of these names, and which of the sets there are."""
        found, sets = [], set()
        there = await self._sets.names()
        for family in Family:
            for name in names:
                whole = set_name(family, name)
                entries = await self._sets.entries(whole) if whole in there else None
                if entries is not None:
                    sets.add((family, name))
                    found += [Member(family, name, text) for text in entries]
        return found, frozenset(sets)

    async def destroy_sets(self, there: Iterable[tuple[Family, str]]) -> None:
        """Remove sets; no rule may use them any more."""
        for one in there:
            await self._sets.destroy(set_name(*one))

    async def put_rules(
        self, wanted: Iterable[tuple[Family, Chain]], hooked: Iterable[Hooked]
    ) -> None:
        """Make chains hold exactly their rules and hook each in once, one commit for each table."""
        by_table: dict[tuple[Family, str], list[str]] = {}
        counts: dict[tuple[Family, str], dict[str, int]] = {}
        there = set(hooked)
        for family, chain in wanted:
            counts.setdefault((family, chain.table), {})[chain.name] = len(chain.rules)
            lines = by_table.setdefault((family, chain.table), [])
            lines.insert(0, f":{chain.name} - [0:0]")
            lines += [rule.line(chain.name) for rule in chain.rules]
            lines += [
                rule.line(hook, "-I")
                for hook, rule in chain.hooks
                if (family, chain.table, hook, rule.comment) not in there
            ]
        for (family, table), lines in by_table.items():
            try:
                await self._restore(family, table, lines)
            except DataplaneError:
                self._tally.doubt((family, table))
                raise
            self._tally.wrote((family, table), counts[family, table])

    async def listed_rules(self) -> dict[Place, tuple[str, ...]]:
        """Return the comments of our rules, by family, table and chain."""
        found: dict[Place, list[str]] = {}
        for family in Family:
            for table in TABLES:
                for line in await self._save(family, table):
                    if (name := _declared(line)) in OUR_CHAINS:
                        found.setdefault((family, table, name), [])
                    elif (match := _RULE.match(line)) and (
                        match[1] in OUR_CHAINS or _target(line) in OUR_CHAINS
                    ):
                        told = match[2] or match[3]
                        found.setdefault((family, table, match[1]), []).append(told)
        return {
            place: tuple(told if place[2] in OUR_CHAINS else sorted(told))
            for place, told in found.items()
        }

    async def remove_rules(self, keep: Iterable[str] = ()) -> None:
        """Remove our chains and what leads to them, but for the chains `keep`."""
        going = set(OUR_CHAINS) - set(keep)
        for family in Family:
            for table in TABLES:
                listing = await self._save(family, table)
                there = [name for line in listing if (name := _declared(line)) in going]
                lines = [
                    f"-D {line.removeprefix('-A ')}"
                    for line in listing
                    if _target(line) in going and line.split()[1] not in going
                ]
                lines += [f"-F {one}" for one in there] + [f"-X {one}" for one in there]
                if lines:
                    await self._restore(family, table, lines)
                    self._tally.wrote((family, table), {}, there)

    async def _save(self, family: Family, table: str) -> list[str]:
        return (await self._tables.save(family, table)).splitlines()

    async def _restore(self, family: Family, table: str, lines: Sequence[str]) -> None:
        text = "".join(f"{line}\n" for line in (f"*{table}", *lines, "COMMIT"))
        await self._tables.restore(family, text)


def _declared(line: str) -> str:
    return line[1:].split()[0] if line.startswith(":") else ""


def _target(line: str) -> str:
    """Return the chain that a rule of iptables-save's leads to; empty for anything else."""
    if not line.startswith("-A "):
        return ""
    _, jump, rest = line.rpartition(" -j ")
    return rest.split()[0] if jump else ""
