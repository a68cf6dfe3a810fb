"""From what there is and a program to a plan.

Lives here: the pure functions that make plans (operations.py). Must not: talk to the kernel or to
workers.

In a unit everything is added before anything goes: the listener, elements, the route last. What the
guard lets through has a listener at every moment, so that no port of the node's own shows. A
listener that goes takes no new connection; the route to its address and the guard of it stand in
`later`, until the connections have ended.
"""

from collections.abc import Container, Iterable, Mapping, Sequence

from immutables import Map

from vipd.backends import things as shared
from vipd.backends.things import Difference, Rules, against, changed, counted
from vipd.backends.userspace.compile import (
    is_shared,
    refusal,
    surroundings,
    things,
)
from vipd.backends.userspace.objects import (
    ADDRESSES,
    Element,
    Place,
    Route,
    Thing,
    Value,
)
from vipd.backends.userspace.observed import Fixed, Observed
from vipd.backends.userspace.operations import Needed, Operation, Unit, UserspacePlan
from vipd.backends.userspace.program import Program, beside, indexed, keys_at, owner_of
from vipd.backends.userspace.rules import commands, fixed
from vipd.proxy.names import Family
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, VirtualServer


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
    needed: dict[Thing, Needed] = {}
    for (key, old, new), why in against(held, wanted, _RULES, lambda new: _conflict(new, seen)):
        why = why or (refusal(wanted, key) if key is not None else "")
        units.append(_unit(key, old, new, why))
        _need(needed, key, new)
    around = surroundings(wanted.network)
    made = UserspacePlan(
        tuple(prologue),
        tuple(unit for unit in units if unit),
        around if around != seen.surroundings else None,
        needed,
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
    withdrawn: dict[Key, str] = {}
    for key in dict.fromkeys((*pairs, *changes.virtual_servers)):
        old, new = pairs.get(key, ({}, {}))
        units.append(_unit(key, old, new, refusal(after, key)))
        _withdraw(withdrawn, programmed, after, key)
    planned = pairs.keys() | changes.virtual_servers.keys()
    for key in _concerned(programmed, after, changes.virtual_servers):
        if key not in planned:
            why = refusal(after, key)
            if why and why != refusal(programmed, key):
                units.append(_unit(key, {}, {}, why))
            _withdraw(withdrawn, programmed, after, key)
    needed: dict[Thing, Needed] = {}
    for one in differences:
        _need(needed, one.key, one.new, programmed.shared)  # others need what was there before
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
        needed,
        withdrawn,
    )
    return made, after


def _concerned(programmed: Program, after: Program, changed: Iterable[Key]) -> dict[Key, None]:
    """Return the keys whose refusals may change, though they do not.

    O(change): those with an endpoint where a virtual server comes or goes, or at an address that
    becomes a service's, or ceases to be one. All of them where the node itself moved.
    """
    if _places(programmed.network) != _places(after.network):
        return dict.fromkeys(after.entries)
    addresses = {key.address: None for key in changed if key.address is not None}
    found = {
        key: None
        for address in addresses
        if owner_of(programmed, address) != owner_of(after, address)
        for key in keys_at(after.reached, address)
    }
    for key in changed:
        if (key in programmed.entries) != (key in after.entries):
            found |= dict.fromkeys(beside(programmed, key))
            found |= dict.fromkeys(beside(after, key))
    return found


def _withdraw(withdrawn: dict[Key, str], programmed: Program, after: Program, key: Key) -> None:
    """Note a refusal that holds no longer."""
    if (why := refusal(programmed, key)) and not refusal(after, key):
        withdrawn[key] = why


def _need(
    needed: dict[Thing, Needed],
    key: Key | None,
    new: Mapping[Thing, Value],
    before: Container[object] = (),
) -> None:
    """Note what of the things of a virtual server is shared, and was not there before."""
    if key is not None:
        for thing, value in new.items():
            if is_shared(thing) and thing not in before:
                needed.setdefault(thing, Needed(value, [])).keys.append(key)


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
