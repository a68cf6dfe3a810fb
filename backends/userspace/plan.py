"""Plans: the difference between what there is and a program, as operations in order.

Lives here: the plan, its text, and the pure functions that make plans. Must not: talk to the kernel
or to workers.

In a unit everything is added before anything goes: the listener, elements, the route last. What the
guard lets through has a listener at every moment, so that no port of the node's own shows. A
listener that goes takes no new connection; the route to its address and the guard of it stand in
`later`, until the connections have ended.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from immutables import Map
from msgspec import Struct

from vipd.backends import things as shared
from vipd.backends.local_routes import Verb, Wanted, told
from vipd.backends.nftables.objects import elements_command
from vipd.backends.things import Difference, Rules, against, changed, counted
from vipd.backends.userspace import return_path
from vipd.backends.userspace.compile import (
    Program,
    beside,
    indexed,
    is_shared,
    refusal,
    surroundings,
    things,
)
from vipd.backends.userspace.objects import (
    ADDRESSES,
    ROUTE_PROTOCOL,
    TABLE,
    Element,
    Place,
    ReturnPath,
    Route,
    Surroundings,
    Thing,
    Value,
)
from vipd.backends.userspace.observed import Fixed, Observed
from vipd.backends.userspace.rules import commands, fixed
from vipd.proxy.names import Family
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, VirtualServer


class Operation(NamedTuple):
    """One thing that is added, changed or taken away; `value` is what it is then (or was)."""

    verb: Verb
    thing: Thing
    value: Value

    def __str__(self) -> str:
        thing, value = self.thing, self.value
        if isinstance(thing, Route):
            return told(Wanted(self.verb, thing.address, str(value)), ROUTE_PROTOCOL)
        if isinstance(thing, Element):
            verb = "delete" if self.verb == "del" else "add"
            return f"nft {elements_command(verb, thing.family, thing.set, [thing.text], TABLE)}"
        if isinstance(thing, ReturnPath):
            return return_path.told(self.verb, thing.family, str(value))
        words = {"add": "listen", "replace": "change", "del": "close"}
        return f"{words[self.verb]} {thing}" + ("" if self.verb == "del" else f": {value}")


class Unit(Struct, frozen=True):
    """What one virtual server changes; `key` is None for what belongs to none (stray things).

    `conflict` says why it cannot be done at all, or not as it should be.
    """

    key: Key | None
    now: tuple[Operation, ...] = ()
    later: tuple[Operation, ...] = ()
    conflict: str = ""

    def __bool__(self) -> bool:
        return bool(self.now or self.later or self.conflict)


class UserspacePlan(Struct, frozen=True):
    """A plan for the driver. `prologue` are nft commands that make the fixed rules."""

    prologue: tuple[str, ...] = ()
    units: tuple[Unit, ...] = ()
    surroundings: Surroundings | None = None
    """What the workers are told of the node, where that changes."""

    def __bool__(self) -> bool:
        return bool(self.prologue or self.units or self.surroundings is not None)

    @property
    def due(self) -> bool:
        """Return whether anything is to be done now; what waits for its connections is not."""
        if self.prologue or self.surroundings is not None:
            return True
        return any(unit.now or unit.conflict for unit in self.units)

    def __str__(self) -> str:
        lines = [f"nft {line}" for line in self.prologue]
        if self.surroundings is not None:
            lines.append(f"tell workers: {self.surroundings}")
        for unit in self.units:
            if unit.conflict:
                lines.append(f"# {unit.key}: {unit.conflict}")
            lines += map(str, unit.now)
            lines += [f"{one} # when its connections have ended" for one in unit.later]
        return "".join(f"{line}\n" for line in lines)

    @property
    def size(self) -> int:
        """Return the number of operations, and of commands of the prologue."""
        return len(self.prologue) + sum(len(unit.now) + len(unit.later) for unit in self.units)


def compile_program(
    servers: Iterable[VirtualServer], network: NodeNetwork, mark: int = 0
) -> Program:
    """Return the program that serves these virtual servers; `mark` as Program has it."""
    entries = Map({one.key: one for one in servers})
    program = Program(network, entries, Map(), mark=mark)
    return counted(indexed(program, (), entries.values()), _RULES)


def plan(observed: Observed | None, wanted: Program) -> tuple[UserspacePlan, Program]:
    """Return the plan from what there is to `wanted`. History decides nothing here."""
    seen = observed or Observed()
    prologue: list[str] = []
    held = dict(seen.things)
    for family in Family:
        there, right = seen.fixed.get(family), fixed(family, wanted.network)
        if there == right:
            continue
        whole = there is None or there[0] != right[0]
        prologue += commands(family, wanted.network, whole=whole)
        if whole:
            gone = [one for one in held if isinstance(one, Element) and one.family is family]
            for one in gone:
                del held[one]
    units = []
    for (key, old, new), why in against(held, wanted, _RULES, lambda new: _conflict(new, seen)):
        why = why or (refusal(wanted, key) if key is not None else "")
        units.append(_unit(key, old, new, why))
    around = surroundings(wanted.network)
    made = UserspacePlan(
        tuple(prologue),
        tuple(unit for unit in units if unit),
        around if around != seen.surroundings else None,
    )
    return made, wanted


def plan_changes(programmed: Program, changes: Changes) -> tuple[UserspacePlan, Program]:
    """Return the plan for one change, and the program after it. O(change)."""
    ahead = indexed(
        programmed,
        (programmed.entries[key] for key in changes.virtual_servers if key in programmed.entries),
        (one for one in changes.virtual_servers.values() if one is not None),
    )
    differences, after = changed(ahead, changes, _RULES)
    pairs = _handed_over(differences)
    units = []
    for key in dict.fromkeys((*pairs, *changes.virtual_servers)):
        old, new = pairs.get(key, ({}, {}))
        units.append(_unit(key, old, new, refusal(after, key)))
    prologue: list[str] = []
    if changes.network is not None:
        for family in Family:
            if fixed(family, changes.network) != fixed(family, programmed.network):
                prologue += commands(family, changes.network, whole=False)
    around = surroundings(after.network)
    made = UserspacePlan(
        tuple(prologue),
        tuple(unit for unit in units if unit),
        around if around != surroundings(programmed.network) else None,
    )
    return made, after


def _handed_over(
    differences: Sequence[Difference[Thing, Value]],
) -> dict[Key, tuple[Mapping[Thing, Value], Mapping[Thing, Value]]]:
    """Return by key what each has and should have, where one may take over what another has.

    So a node port and a service at the same port of the node do: what stays is changed, for it
    would otherwise be added by one and then taken away for the other.
    """
    had: dict[Thing, Value] = {}
    wanted: set[Thing] = set()
    for one in differences:
        had |= {thing: value for thing, value in one.old.items() if not is_shared(thing)}
        wanted.update(thing for thing in one.new if not is_shared(thing))
    return {
        one.key: (
            {thing: value for thing, value in one.old.items() if thing not in wanted}
            | {thing: had[thing] for thing in one.new if thing in had},
            one.new,
        )
        for one in differences
        if one.key is not None
    }


def without(before: Program, after: Program, rejected: Iterable[Key]) -> Program:
    """Return `after`, with the rejected virtual servers as they were in `before`.

    Those that a plan itself reported are as the plan made them.
    """
    undone = [key for key in rejected if not refusal(after, key)]
    ahead = indexed(
        after,
        (after.entries[key] for key in undone if key in after.entries),
        (before.entries[key] for key in undone if key in before.entries),
    )
    return shared.without(before, ahead, undone, _RULES)


def expected(program: Program) -> Observed:
    """Return what there is where exactly this program is served."""
    right: dict[Family, Fixed] = {family: fixed(family, program.network) for family in Family}
    return Observed(shared.expected(program, _RULES), right, surroundings(program.network))


def _places(network: NodeNetwork) -> object:
    """Return what of the network decides on which addresses virtual servers answer."""
    return (network.own_addresses, network.primary_addresses, network.node_port_ranges)


_RULES: Rules[Program, Thing, Value] = Rules(things, is_shared, beside, _places)


def _conflict(new: Mapping[Thing, Value], seen: Observed) -> str:
    for thing in new:
        if isinstance(thing, Route) and thing.address in seen.strange:
            return f"another program has the local route to {thing.address}"
    return ""


def _unit(
    key: Key | None, old: Mapping[Thing, Value], new: Mapping[Thing, Value], why: str = ""
) -> Unit:
    """Return the operations that lead from `old` to `new`, in the order that loses no packet."""
    now = [
        Operation("replace" if one in old else "add", one, value)
        for one, value in new.items()
        if one not in old or old[one] != value
    ]
    gone = [Operation("del", one, value) for one, value in old.items() if one not in new]
    now += sorted(
        (one for one in gone if not is_shared(one.thing)),
        key=lambda one: isinstance(one.thing, Place),
    )
    later = sorted(
        (one for one in gone if is_shared(one.thing)),
        key=lambda one: isinstance(one.thing, Element) and one.thing.set == ADDRESSES,
    )
    return Unit(key, tuple(now), tuple(later), why)
