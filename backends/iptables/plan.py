"""Plans: the difference between what the kernel has and a program, as restores and set entries.

Lives here: the plan, its text, and the pure functions that make plans. Must not: run a tool.

A plan knows both its ends, so that it can be made again without the virtual servers that the
kernel rejects: chains of the dispatch are shared, so a rejected one cannot just be left out.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import NamedTuple

from msgspec import Struct

from vipd.backends.iptables import balance, dispatch
from vipd.backends.iptables.compile import (
    CHAIN,
    NOTHING,
    Program,
    Shared,
    all_chains,
    changed,
    elements,
    own_elements,
    roots,
    shared,
)
from vipd.backends.iptables.objects import (
    NAT,
    TABLES,
    Chain,
    Element,
    Jump,
    set_name,
)
from vipd.backends.iptables.observed import Observed
from vipd.backends.iptables.pipeline import JUMPS, LIVE, SETS, chains
from vipd.proxy.names import Family
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, Use

Place = tuple[Family, str]
"""Family, and table or set."""


class TableWork(Struct, frozen=True):
    """What changes in one table, all at once."""

    write: tuple[Chain, ...] = ()
    remove: tuple[str, ...] = ()
    stray: tuple[tuple[str, str], ...] = ()
    """Jumps to ours that nobody wants: chain and rule as printed."""
    jumps: tuple[Jump, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.write or self.remove or self.stray or self.jumps)


class Work(Struct, frozen=True):
    """What a plan does: sets, entries and tables, in the order in which SETS and TABLES stand."""

    sets: tuple[Place, ...] = ()
    """Sets that have to be made."""
    add: Mapping[Place, list[str]] = {}
    delete: Mapping[Place, list[str]] = {}
    tables: Mapping[Place, TableWork] = {}

    def __bool__(self) -> bool:
        return bool(self.sets or self.add or self.delete or self.tables)


class Line(NamedTuple):
    """A line of a restore, with the chain and the virtual server it belongs to, if any."""

    text: str
    chain: str = ""
    key: Key | None = None


class IptablesPlan(Struct, frozen=True):
    """A plan. `keys` are the virtual servers that it changes; None: all of them."""

    before: Program | None
    """What the kernel has, None where `seen` says it."""
    after: Program
    seen: Observed
    keys: frozenset[Key] | None
    work: Work

    def __bool__(self) -> bool:
        return bool(self.work)

    def due(self, rejected: Collection[Key] = ()) -> bool:
        """Return whether the kernel is otherwise than wanted."""
        return bool(self.work)

    def __str__(self) -> str:
        return "\n".join(_text(self.work))

    @property
    def size(self) -> int:
        """Return the number of rules, chains and entries that are written or removed."""
        work = self.work
        entries = (*work.add.values(), *work.delete.values())
        return (
            len(work.sets)
            + sum(map(len, entries))
            + sum(
                len(one.write)
                + sum(len(chain.rules) for chain in one.write)
                + len(one.remove)
                + len(one.stray)
                + len(one.jumps)
                for one in work.tables.values()
            )
        )

    def changed_keys(self) -> frozenset[Key]:
        """Return the virtual servers that the plan is about."""
        return frozenset(self.after.servers) if self.keys is None else self.keys

    def excluding(self, rejected: Iterable[Key]) -> "IptablesPlan":
        """Return the plan without these virtual servers: they stay as the kernel has them."""
        after = without(self.before or NOTHING, self.after, rejected)
        if self.before is None:
            return _full(self.seen, after)
        keys = self.changed_keys() - set(rejected)
        return _incremental(self.before, after, keys)

    def undoing(self, rejected: Iterable[Key]) -> "IptablesPlan":
        """Return the plan from where this one leads to the same without these virtual servers."""
        keys = frozenset(rejected)
        return _incremental(self.after, self.excluding(keys).after, keys)

    def owner(self, chain: str) -> Key | None:
        """Return a virtual server that a chain is there for; None for one of the fixed part."""
        for key in self.changed_keys():
            server = self.after.servers.get(key)
            if server is not None and any(
                one.name == chain for one in balance.chains(server, self.after.network)
            ):
                return key
        return None

    def owners(self, element: Element, family: Family) -> set[Key]:
        """Return the virtual servers that need an entry of a set."""
        found = set()
        for key in self.changed_keys():
            server = self.after.servers.get(key)
            if server is None or key.family is not family:
                continue
            if element in own_elements(server) or Shared(family, *element) in shared(server):
                found.add(key)
        return found


def plan(observed: Observed | None, wanted: Program) -> tuple[IptablesPlan, Program]:
    """Return the plan from what the kernel has to `wanted`, and `wanted`."""
    return _full(observed or Observed(), wanted), wanted


def plan_changes(programmed: Program, changes: Changes) -> tuple[IptablesPlan, Program]:
    """Return the plan for one change, and the program after it. O(change)."""
    after = changed(programmed, changes.virtual_servers, changes.network)
    return _incremental(programmed, after, frozenset(changes.virtual_servers)), after


def without(before: Program, after: Program, rejected: Iterable[Key]) -> Program:
    """Return `after`, with the rejected virtual servers as they were in `before`."""
    return changed(after, {key: before.servers.get(key) for key in rejected})


def restore(table: str, work: TableWork) -> Iterator[Line]:
    """Yield what iptables-restore is told for a table, line by line."""
    yield Line(f"*{table}")
    # Sorted: iptables-nft 1.8.9 keeps chains in a sorted list, and takes three times as long for
    # 13,000 that come in any order.
    written = sorted(work.write, key=attrgetter("name"))
    for chain in written:
        yield Line(f":{chain.name} - [0:0]", chain.name)
    for name in work.remove:
        yield Line(f":{name} - [0:0]", name)
    for name, rule in work.stray:
        yield Line(f"-D {name} {rule}")
    for chain in written:
        for text, one in zip(chain.lines, chain.rules, strict=True):
            yield Line(text, chain.name, one.key)
    for jump in work.jumps:
        yield Line(f"-I {jump.chain} 1 {jump.rule}")
    for name in work.remove:
        yield Line(f"-X {name}", name)
    yield Line("COMMIT")


def _text(work: Work) -> Iterator[str]:
    """Yield the plan as ipset and iptables-restore would be told it, in the driver's order."""
    for family in Family:
        word = "inet6" if family is Family.IPV6 else "inet"
        for of, name in work.sets:
            if of is family:
                yield f"create {set_name(name, family)} {SETS[name].type} family {word}"
        for live in (False, True):
            if live:
                for table in TABLES:
                    if (family, table) in work.tables:
                        yield f"# ip{'6' if family is Family.IPV6 else ''}tables-restore --noflush"
                        yield from (one.text for one in restore(table, work.tables[family, table]))
            for name in SETS:
                if (name in LIVE) is live:
                    for entry in work.add.get((family, name), ()):
                        yield f"add {set_name(name, family)} {entry}"
        for name in reversed(SETS):
            for entry in work.delete.get((family, name), ()):
                yield f"del {set_name(name, family)} {entry}"


def _full(seen: Observed, wanted: Program) -> IptablesPlan:
    tables = {}
    sets = []
    add: dict[Place, list[str]] = {}
    delete: dict[Place, list[str]] = {}
    held = elements(wanted)
    for family in Family:
        for table in TABLES:
            work = _table(seen, wanted, family, table)
            if work:
                tables[family, table] = work
        for name in SETS:
            place = family, name
            there, should = seen.sets.get(place), held.get(place, set())
            if there is None:
                sets.append(place)
                there = set()
            if should - there:
                add[place] = sorted(should - there)
            if there - should:
                delete[place] = sorted(there - should)
    return IptablesPlan(None, wanted, seen, None, Work(tuple(sets), add, delete, tables))


def _table(seen: Observed, wanted: Program, family: Family, table: str) -> TableWork:
    there = seen.chains.get((family, table), {})
    should = all_chains(wanted, family, table)
    stray = []
    missing = [one for one in JUMPS if one.table == table]
    for chain, rule in seen.jumps.get((family, table), ()):
        found = next((one for one in missing if (one.chain, one.rule) == (chain, rule)), None)
        if found is None:
            stray.append((chain, rule))
        else:
            missing.remove(found)
    return TableWork(
        tuple(one for name, one in should.items() if name not in there or there[name] != one.seen),
        tuple(name for name in there if name not in should),
        tuple(stray),
        tuple(missing),
    )


def _incremental(before: Program, after: Program, keys: frozenset[Key]) -> IptablesPlan:
    add: dict[Place, list[str]] = {}
    delete: dict[Place, list[str]] = {}
    things: set[Shared] = set()
    writes: dict[Place, dict[str, Chain]] = {}
    removes: dict[Place, set[str]] = {}
    for key in sorted(keys, key=Key.sort_key):
        was, now = before.servers.get(key), after.servers.get(key)
        old, new = (list(own_elements(one)) if one else [] for one in (was, now))
        for element in new:
            if element not in old:
                add.setdefault((key.family, element.set), []).append(element.text)
        for element in old:
            if element not in new:
                delete.setdefault((key.family, element.set), []).append(element.text)
        things |= {thing for one in (was, now) if one for thing in shared(one)}
    for family, name, text in sorted(things):
        thing = Shared(family, name, text)
        if name == CHAIN or (thing in before.shared) == (thing in after.shared):
            continue
        group = add if thing in after.shared else delete
        group.setdefault((Family(family), name), []).append(text)
    _own_chains(before, after, keys, writes, removes)
    if before.network != after.network:
        _constant_chains(before.network, after, writes)
    for family in Family:
        pairs = zip(
            roots(before.trees[family], family), roots(after.trees[family], family), strict=True
        )
        for (old_node, root, width), (node, _, _) in pairs:
            for change in dispatch.differences(old_node, node, root, width):
                if change.new is not None:
                    writes.setdefault((family, NAT), {})[change.new.name] = change.new
                elif change.old is not None:
                    removes.setdefault((family, NAT), set()).add(change.old.name)
    tables = {
        place: TableWork(
            tuple(writes.get(place, {}).values()), tuple(sorted(removes.get(place, ())))
        )
        for place in sorted(writes.keys() | removes.keys(), key=lambda it: (it[0], it[1] != NAT))
    }
    return IptablesPlan(before, after, Observed(), keys, Work((), add, delete, tables))


def _own_chains(
    before: Program,
    after: Program,
    keys: Iterable[Key],
    writes: dict[Place, dict[str, Chain]],
    removes: dict[Place, set[str]],
) -> None:
    """Find the chains of service ports that are new, other than before, or of no use now."""
    olds: dict[Family, dict[str, list[Chain]]] = {}
    news: dict[Family, dict[str, list[Chain]]] = {}
    for key in keys:
        for program, groups in ((before, olds), (after, news)):
            server = program.servers.get(key)
            held = groups.setdefault(key.family, {})
            if server is not None and any(name not in held for name in balance.names(server)):
                held |= balance.groups(server, program.network)
    for family, held in olds.items():
        had = {one.name: one for group in held.values() for one in group}
        now = {one.name: one for group in news[family].values() for one in group}
        for name, group in held.items():
            if Shared(family, CHAIN, name) in after.shared and name not in news[family]:
                now |= {one.name: one for one in group}  # another virtual server needs it
        writes.setdefault((family, NAT), {}).update(
            {name: one for name, one in now.items() if had.get(name) != one}
        )
        removes.setdefault((family, NAT), set()).update(had.keys() - now.keys())
        if not writes[family, NAT]:
            del writes[family, NAT]
        if not removes[family, NAT]:
            del removes[family, NAT]


def _constant_chains(
    old: NodeNetwork, after: Program, writes: dict[Place, dict[str, Chain]]
) -> None:
    """Find what a change of the node-wide part rewrites: fixed chains, and those from outside."""
    for family in Family:
        for table in TABLES:
            had = {one.name: one for one in chains(table, old, family)}
            for one in chains(table, after.network, family):
                if had.get(one.name) != one:
                    writes.setdefault((family, table), {})[one.name] = one
    for server in after.servers.values():
        if server.use is Use.LOCAL_FROM_OUTSIDE and balance.target(server):
            (one,) = balance.groups(server, after.network)[balance.target(server)]
            (had_one,) = balance.groups(server, old)[balance.target(server)]
            if one != had_one:
                writes.setdefault((server.key.family, NAT), {})[one.name] = one
