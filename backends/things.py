"""Programs whose objects stand side by side: what each virtual server needs, and who shares it.

Lives here: from two states to what each virtual server adds and gives up, with things that several
need added once and removed last. Pure. Must not: know what a thing is, or in which order a
dataplane wants its operations (the plan.py of a backend).
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from immutables import Map
from msgspec import Struct, structs

from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, VirtualServer


class Entries(Struct, frozen=True):
    """The part of a program that this module knows; a backend's program adds to it.

    `shared` counts the virtual servers that need a thing which several can need.
    """

    network: NodeNetwork
    entries: Map[Key, VirtualServer]
    shared: "Map[Hashable, int]"


ProgramT = TypeVar("ProgramT", bound=Entries)
ThingT = TypeVar("ThingT", bound=Hashable)
ValueT = TypeVar("ValueT")


class Rules(Struct, Generic[ProgramT, ThingT, ValueT], frozen=True):
    """What a backend says of its things."""

    things: Callable[[ProgramT, Key], dict[ThingT, ValueT]]
    """Everything that a key of the program needs, in the order of adding."""
    is_shared: Callable[[ThingT], bool]
    """Whether several virtual servers can need the thing."""
    beside: Callable[[ProgramT, Key], list[Key]]
    """The keys whose things change when a key comes or goes."""
    places: Callable[[NodeNetwork], object]
    """What of the network decides on the things of every virtual server."""


class Difference(NamedTuple, Generic[ThingT, ValueT]):
    """What one virtual server has and should have; no key: what belongs to none."""

    key: Key | None
    old: dict[ThingT, ValueT]
    new: dict[ThingT, ValueT]


def counted(program: ProgramT, rules: Rules[ProgramT, ThingT, ValueT]) -> ProgramT:
    """Return the program with its shared things counted. O(everything)."""
    counts: dict[Hashable, int] = {}
    for key in program.entries:
        for thing in rules.things(program, key):
            if rules.is_shared(thing):
                counts[thing] = counts.get(thing, 0) + 1
    return structs.replace(program, shared=Map(counts))


def expected(program: ProgramT, rules: Rules[ProgramT, ThingT, ValueT]) -> dict[ThingT, ValueT]:
    """Return what a kernel has that holds exactly this program."""
    held: dict[ThingT, ValueT] = {}
    for key in program.entries:
        held |= rules.things(program, key)
    return held


def against(
    seen: Mapping[ThingT, ValueT],
    wanted: ProgramT,
    rules: Rules[ProgramT, ThingT, ValueT],
    conflict: Callable[[Mapping[ThingT, ValueT]], str],
) -> Iterator[tuple[Difference[ThingT, ValueT], str]]:
    """Yield what each virtual server needs beside what is there, then what is there for nobody.

    `conflict` says why a virtual server cannot have its things at all, or nothing; its text is
    yielded beside, and its things are then left out.
    """
    left = dict(seen)
    brought: set[ThingT] = set()
    for key in sorted(wanted.entries, key=Key.sort_key):  # the same text for the same services
        new = rules.things(wanted, key)
        why = conflict(new)
        if why:
            new = {}
        old: dict[ThingT, ValueT] = {}
        for thing, value in new.items():
            if thing in brought:
                old[thing] = value
            elif thing in seen:
                old[thing] = seen[thing]
                left.pop(thing, None)
            if rules.is_shared(thing):
                brought.add(thing)
        yield Difference(key, old, new), why
    yield Difference(None, left, {}), ""


def changed(
    programmed: ProgramT, changes: Changes, rules: Rules[ProgramT, ThingT, ValueT]
) -> tuple[Sequence[Difference[ThingT, ValueT]], ProgramT]:
    """Return what each virtual server that is concerned had and should have, and the program
    after it. O(change)."""
    network = changes.network or programmed.network
    keys = dict.fromkeys(changes.virtual_servers)
    entries = programmed.entries.mutate()
    for key, server in changes.virtual_servers.items():
        if server is None:
            entries.pop(key, None)
        else:
            entries[key] = server
    after = structs.replace(programmed, network=network, entries=entries.finish())
    if rules.places(network) != rules.places(programmed.network):
        keys |= dict.fromkeys(programmed.entries)
    for key in list(keys):
        keys |= dict.fromkeys(rules.beside(after, key))
        keys |= dict.fromkeys(rules.beside(programmed, key))
    counts = after.shared.mutate()
    pairs = []
    for key in sorted(keys, key=Key.sort_key):
        old, new = rules.things(programmed, key), rules.things(after, key)
        if old == new:
            continue
        for held, step in ((old, -1), (new, +1)):
            for thing in filter(rules.is_shared, held):
                counts[thing] = counts.get(thing, 0) + step
        pairs.append((key, old, new))
    shared_before = [one for _, old, _ in pairs for one in old if rules.is_shared(one)]
    gone = {one for one in shared_before if counts.get(one) == 0}
    found = []
    brought: set[ThingT] = set()
    for key, old, new in pairs:
        # What another virtual server needs on stays; what another one has brought is there already.
        kept = {
            one: value
            for one, value in old.items()
            if rules.is_shared(one) and one not in new and one not in gone
        }
        there = {
            one: value
            for one, value in new.items()
            if rules.is_shared(one) and (one in brought or programmed.shared.get(one, 0) > 0)
        }
        brought |= set(filter(rules.is_shared, new))
        found.append(Difference(key, {**there, **old}, {**kept, **new}))
        gone -= set(old)  # taken away by the first that had it
    for thing in set(shared_before):
        if counts.get(thing) == 0:
            del counts[thing]
    return found, structs.replace(after, shared=counts.finish())


def without(
    before: ProgramT,
    after: ProgramT,
    rejected: Iterable[Key],
    rules: Rules[ProgramT, ThingT, ValueT],
) -> ProgramT:
    """Return `after`, with the rejected virtual servers as they were in `before`."""
    entries = after.entries.mutate()
    counts = after.shared.mutate()
    for key in rejected:
        for program, step in ((after, -1), (before, +1)):
            for thing in filter(rules.is_shared, rules.things(program, key)):
                counts[thing] = counts.get(thing, 0) + step
                if counts[thing] == 0:
                    del counts[thing]
        if key in before.entries:
            entries[key] = before.entries[key]
        else:
            entries.pop(key, None)
    return structs.replace(after, entries=entries.finish(), shared=counts.finish())
