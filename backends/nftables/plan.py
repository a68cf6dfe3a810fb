"""Plans: the difference between what the kernel has and a program, as nft transactions.

Lives here: the plan, its text, and the pure functions that make plans. Must not: run nft.

A plan is a prologue (tables, containers, constant chains and new shapes) and one unit for each
virtual server that changes. Units are independent of each other, so a driver can cut a large plan
into transactions of bounded size at any unit, and leave out a unit that the kernel rejects.
"""

from collections.abc import Collection, Iterable, Sequence

from immutables import Map
from msgspec import Struct

from vipd.backends.nftables import compile as compiling
from vipd.backends.nftables.compile import Entry, Program, Shared
from vipd.backends.nftables.objects import (
    FAMILY_WORD,
    SKELETON,
    TABLE,
    Chain,
    Container,
    Element,
    declare,
    declare_chain,
    elements_command,
)
from vipd.backends.nftables.observed import Observed, slots_of
from vipd.backends.nftables.pipeline import chains, containers, shape_chain, skeleton
from vipd.proxy.names import Family
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, VirtualServer

MOST_IDLE_SHAPES = 64
"""Chains of shapes that nothing uses are left for the next service of that size; a full plan
removes them when there are more than this."""


class Unit(Struct, frozen=True):
    """What one virtual server changes; `key` is None for what belongs to none (stray elements)."""

    key: Key | None
    family: Family
    containers: tuple[Container, ...] = ()
    chains: tuple[Chain, ...] = ()
    delete: tuple[Element, ...] = ()
    add: tuple[Element, ...] = ()

    @property
    def size(self) -> int:
        """Return the number of objects it adds or removes."""
        return len(self.containers) + len(self.chains) + len(self.delete) + len(self.add)

    def __bool__(self) -> bool:
        return bool(self.containers or self.chains or self.delete or self.add)


class NftPlan(Struct, frozen=True):
    """A plan. `garbage` are own chains and maps that nothing uses after it.

    Garbage goes in a transaction of its own, and later: kernels before 6.2 hold a chain in use for
    a moment after the last element that led to it is gone.
    """

    prologue: tuple[str, ...]
    units: tuple[Unit, ...]
    garbage: tuple[Shared, ...] = ()
    whole: bool = False
    """Must be one transaction, because the prologue removes a table that traffic uses."""

    def __bool__(self) -> bool:
        return bool(self.prologue or self.units or self.garbage)

    def __str__(self) -> str:
        # The order of units means nothing to the kernel, but the same plan should read the same.
        ordered = sorted(self.units, key=lambda unit: (unit.family, _place(unit.key)))
        return transaction(self.prologue, ordered) + discard(self.garbage)

    def due(self, rejected: Collection[Key] = ()) -> bool:
        """Return whether the kernel is otherwise than wanted; garbage may wait."""
        return bool(self.prologue or self.units)

    @property
    def size(self) -> int:
        """Return the number of objects that are added or removed."""
        return len(self.prologue) + sum(unit.size for unit in self.units) + len(self.garbage)


def _place(key: Key | None) -> tuple[int, int, str, int]:
    return (0, 0, "", 0) if key is None else key.sort_key()


def transaction(prologue: Sequence[str], units: Iterable[Unit]) -> str:
    """Return the nft text of one transaction: elements are deleted, then added data first."""
    lines = list(prologue)
    declared: dict[tuple[Family, str], Container] = {}
    ruled: dict[tuple[Family, str], Chain] = {}
    deleted: dict[tuple[Family, str], dict[str, None]] = {}
    added: dict[tuple[Family, str], dict[str, None]] = {}
    for unit in units:
        family = unit.family
        declared.update({(family, one.name): one for one in unit.containers})
        ruled.update({(family, one.name): one for one in unit.chains})
        for container, key, _ in unit.delete:
            deleted.setdefault((family, container), {})[key] = None
        for container, key, value in unit.add:
            text = f"{key} : {value}" if value else key
            added.setdefault((family, container), {})[text] = None
    lines += [declare(family, one) for (family, _), one in declared.items()]
    for (family, _), chain in ruled.items():
        lines += declare_chain(family, chain)
    for verb, groups in (("delete", deleted), ("add", added)):
        lines += [
            elements_command(verb, family, container, list(texts))
            for (family, container), texts in groups.items()
        ]
    return "".join(f"{line}\n" for line in lines)


def discard(garbage: Iterable[Shared]) -> str:
    """Return the nft text that removes own chains and maps; chains first, they use the maps."""
    lines = []
    for family, word, name in sorted(garbage):
        where = f"{FAMILY_WORD[Family(family)]} {TABLE} {name}"
        if word == "chain":
            lines.append(f"flush chain {where}")
        lines.append(f"delete {word} {where}")
    return "".join(f"{line}\n" for line in lines)


def compile_program(virtual_servers: Iterable[VirtualServer], network: NodeNetwork) -> Program:
    """Return the program for virtual servers, as if the kernel were empty."""
    entries = {one.key: compiling.entry(one) for one in virtual_servers}
    counts: dict[Shared, int] = {}
    shapes: set[tuple[int, str]] = set()
    for one in entries.values():
        for item in compiling.shared(one):
            counts[item] = counts.get(item, 0) + 1
        shapes.update(compiling.shapes(one))
    return Program(network, Map(entries), Map(counts), frozenset(shapes))


def plan(observed: Observed | None, wanted: Program) -> tuple[NftPlan, Program]:
    """Return the plan from what the kernel has to `wanted`, and the program with slots kept."""
    seen = observed or Observed()
    prologue: list[str] = []
    units: list[Unit] = []
    garbage: list[Shared] = []
    entries = dict(wanted.entries)
    whole = False
    known_shapes: set[tuple[int, str]] = set()
    for family in Family:
        mine = {key: one for key, one in entries.items() if key.family is family}
        rebuild = not _declared(seen, family)
        if rebuild and seen.has_table(family):
            whole = True
            prologue.append(f"delete table {FAMILY_WORD[family]} {TABLE}")
            seen = seen.without(family)
        if not seen.has_skeleton(family):
            prologue += skeleton_commands(family)
        if rebuild:
            prologue.append(f"add table {FAMILY_WORD[family]} {TABLE}")
            prologue += [declare(family, one) for one in containers(family)]
        constant = chains(family, wanted.network)
        for chain in constant:
            if seen.chains.get((family, chain.name)) != chain.comments:
                prologue += declare_chain(family, chain)
        shapes, strange = _shapes(seen, family, {chain.name for chain in constant})
        known_shapes |= shapes
        # A shape that is wanted is made anew.
        own = [
            Shared(family, "chain", name) for name in strange if (family, name) not in wanted.shapes
        ]
        own += [Shared(family, "map", name) for name in seen.own_maps(family)]
        garbage += [one for one in own if one not in wanted.shared]
        held = slots_of(seen, family)
        for key, one in mine.items():
            before = held.get(key)
            if before is not None:
                entries[key] = compiling.entry(
                    one.virtual_server, Entry(one.virtual_server, *before)
                )
        units += _differences(seen, family, {key: entries[key] for key in mine})
    idle = known_shapes - wanted.shapes
    if len(idle) > MOST_IDLE_SHAPES:
        garbage += [Shared(family, "chain", name) for family, name in sorted(idle)]
        known_shapes -= idle
    prologue += _new_shapes(wanted.shapes - known_shapes)
    # Slots may stand differently now, but who shares what depends on the endpoints alone.
    after = Program(wanted.network, Map(entries), wanted.shared, wanted.shapes | known_shapes)
    return NftPlan(tuple(prologue), tuple(units), tuple(garbage), whole), after


def expected(program: Program) -> Observed:
    """Return what `observe` finds where exactly `program` is in the kernel."""
    tables = {(family, name) for family in Family for name in (TABLE, SKELETON)}
    held: dict[tuple[Family, str], str] = {}
    rules: dict[tuple[Family, str], tuple[str, ...]] = {}
    elements: dict[tuple[Family, str], dict[str, str]] = {}
    for family in Family:
        for container in containers(family):
            held[family, container.name] = container.comment
            elements[family, container.name] = {}
        rules |= {(family, one.name): one.comments for one in chains(family, program.network)}
    for number, name in program.shapes:
        family = Family(number)
        rules[family, name] = shape_chain(name, family).comments
    for key, one in program.entries.items():
        own = compiling.own_objects(one)
        held |= {(key.family, it.name): it.comment for it in own.maps}
        rules |= {(key.family, it.name): it.comments for it in own.chains}
        shared = (_element(item) for item in compiling.shared(one) if _is_element(item))
        for container_name, text, value in (*compiling.elements(one), *shared):
            elements[key.family, container_name][text] = value
    return Observed(frozenset(tables), held, rules, elements, frozenset(Family))


def plan_changes(programmed: Program, changes: Changes) -> tuple[NftPlan, Program]:
    """Return the plan for one change, and the program after it. O(change)."""
    prologue: list[str] = []
    network = programmed.network
    if changes.network is not None:
        for family in Family:
            old = {chain.name: chain for chain in chains(family, network)}
            for chain in chains(family, changes.network):
                if old[chain.name] != chain:
                    prologue += declare_chain(family, chain)
        network = changes.network
    pairs = [
        (key, before, compiling.entry(server, before) if server is not None else None)
        for key, server in changes.virtual_servers.items()
        for before in [programmed.entries.get(key)]
    ]
    after, gone = _recount(programmed, pairs)
    units = [_change(key, before, now) for key, before, now in pairs]
    units += _gone_elements(gone)
    prologue += _new_shapes(after.shapes - programmed.shapes)
    garbage = [one for one in gone if one.container in ("chain", "map")]
    return (
        NftPlan(tuple(prologue), tuple(unit for unit in units if unit), tuple(garbage)),
        Program(network, after.entries, after.shared, after.shapes),
    )


def without(before: Program, after: Program, rejected: Iterable[Key]) -> Program:
    """Return `after` with the rejected keys as they were in `before`."""
    pairs = [(key, after.entries.get(key), before.entries.get(key)) for key in rejected]
    return _recount(after, pairs)[0]


def _change(key: Key, before: Entry | None, now: Entry | None) -> Unit:
    old = set(compiling.elements(before)) if before else set()
    new = compiling.elements(now) if now else []
    old_own = compiling.own_objects(before) if before else compiling.NOTHING_OWN
    new_own = compiling.own_objects(now) if now else compiling.NOTHING_OWN
    # Also what another virtual server has put there already: its commit may still be under way.
    had = set(compiling.shared(before)) if before else set()
    shared = [one for one in (compiling.shared(now) if now else []) if one not in had]
    kept = set(new)
    return Unit(
        key,
        key.family,
        containers=tuple(one for one in new_own.maps if one not in old_own.maps),
        chains=tuple(one for one in new_own.chains if one not in old_own.chains),
        delete=tuple(sorted(old - kept)),
        add=(
            *(_element(one) for one in shared if _is_element(one)),
            *(one for one in new if one not in old),
        ),
    )


def _recount(
    program: Program, pairs: Sequence[tuple[Key, Entry | None, Entry | None]]
) -> tuple[Program, set[Shared]]:
    """Return the program with entries replaced, and the shared objects that nobody needs now."""
    entries = program.entries.mutate()
    counts = program.shared.mutate()
    shapes = set()
    looked_at: dict[Shared, int] = {}
    for key, before, now in pairs:
        for one, step in (
            *((one, -1) for one in (compiling.shared(before) if before else ())),
            *((one, +1) for one in (compiling.shared(now) if now else ())),
        ):
            count = counts.get(one, 0)
            looked_at.setdefault(one, count)
            counts[one] = count + step
        if now is None:
            entries.pop(key, None)
        else:
            entries[key] = now
            shapes.update(compiling.shapes(now))
    gone = {one for one, was in looked_at.items() if was > 0 and counts[one] == 0}
    for one in looked_at:
        if counts[one] == 0:
            del counts[one]
    new_shapes = shapes - program.shapes
    after = Program(
        program.network,
        entries.finish(),
        counts.finish(),
        program.shapes | new_shapes if new_shapes else program.shapes,
    )
    return after, gone


def _differences(seen: Observed, family: Family, entries: dict[Key, Entry]) -> list[Unit]:
    """Return one unit for each entry that differs from the kernel, and one for what is stray."""
    left = {
        container: dict(held) for (of, container), held in seen.elements.items() if of is family
    }
    units = []
    for key, one in entries.items():
        delete, add = [], []
        wanted = compiling.elements(one)
        wanted += [_element(item) for item in compiling.shared(one) if _is_element(item)]
        for element in wanted:
            value = left.get(element.container, {}).pop(element.key, None)
            if value is None and not seen.has(family, element):
                add.append(element)
            elif value is not None and value != element.value:
                delete.append(Element(element.container, element.key, value))
                add.append(element)
        own = compiling.own_objects(one)
        unit = Unit(
            key,
            family,
            tuple(it for it in own.maps if seen.containers.get((family, it.name)) != it.comment),
            tuple(it for it in own.chains if seen.chains.get((family, it.name)) != it.comments),
            tuple(delete),
            tuple(add),
        )
        if unit:
            units.append(unit)
    stray = tuple(
        Element(container, key, value)
        for container, held in left.items()
        for key, value in held.items()
    )
    if stray:
        units.insert(0, Unit(None, family, delete=stray))
    return units


def _declared(seen: Observed, family: Family) -> bool:
    return all(seen.containers.get((family, one.name)) == one.comment for one in containers(family))


def skeleton_commands(family: Family) -> list[str]:
    """Return the nft commands that make a family's skeleton, or make it whole again."""
    return [
        f"add table {FAMILY_WORD[family]} {SKELETON}",
        *declare_chain(family, skeleton(), SKELETON),
    ]


def _shapes(
    seen: Observed, family: Family, constant: set[str]
) -> tuple[set[tuple[int, str]], list[str]]:
    """Return the shapes that the kernel has in good order, and the names of other chains: those of
    no shape, and shapes that somebody changed."""
    good: set[tuple[int, str]] = set()
    strange = []
    for of, name in seen.chains:
        if of is not family or name in constant:
            continue
        try:
            wanted = shape_chain(name, family).comments
        except ValueError:
            strange.append(name)
            continue
        if seen.chains[of, name] == wanted:
            good.add((family, name))
        else:
            strange.append(name)
    return good, strange


def _new_shapes(names: Iterable[tuple[int, str]]) -> list[str]:
    return [
        line
        for family, name in sorted(names)
        for line in declare_chain(Family(family), shape_chain(name, Family(family)))
    ]


def _gone_elements(gone: Iterable[Shared]) -> list[Unit]:
    by_family: dict[int, list[Element]] = {}
    for one in sorted(gone):
        if _is_element(one):
            by_family.setdefault(one.family, []).append(_element(one))
    return [
        Unit(None, Family(family), delete=tuple(elements)) for family, elements in by_family.items()
    ]


def _is_element(one: Shared) -> bool:
    return one.container not in ("chain", "map")


def _element(one: Shared) -> Element:
    return Element(one.container, one.key, "")
