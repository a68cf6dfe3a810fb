"""Plans: the difference between what the kernel has and a program, as operations in order.

Lives here: the plan, its text, and the pure functions that make plans. Must not: talk to the
kernel.

A plan is a prologue (sets and fixed rules) and one unit for each virtual server that changes. In a
unit everything is added before anything goes, and a real server that goes is first set to weight 0;
what has to wait until its connections have ended stands in `later`.
"""

from collections.abc import Collection, Iterable, Mapping

from immutables import Map
from msgspec import Struct

from vipd.backends import things as shared
from vipd.backends.answering import beside
from vipd.backends.ipvs.compile import Program, is_shared, things
from vipd.backends.ipvs.objects import (
    ADD,
    DELETE,
    DROPPED,
    GUARDED,
    REJECTED,
    SERVED,
    SET,
    SETS,
    Destination,
    Member,
    Operation,
    Route,
    Service,
    Thing,
    Value,
    set_name,
)
from vipd.backends.ipvs.observed import Observed, record
from vipd.backends.ipvs.rules import Chain, chains
from vipd.backends.things import Rules, against, changed, counted
from vipd.proxy.names import Family, Protocol
from vipd.proxy.virtualserver import Changes, Key, NodeNetwork, VirtualServer


class Unit(Struct, frozen=True):
    """What one virtual server changes; `key` is None for what belongs to none (stray things).

    `conflict` says why it cannot be done at all: somebody else has what it needs.
    """

    key: Key | None
    now: tuple[Operation, ...] = ()
    later: tuple[Operation, ...] = ()
    conflict: str = ""

    def __bool__(self) -> bool:
        return bool(self.now or self.later or self.conflict)


class Prologue(Struct, frozen=True):
    """Sets to be created, and the fixed rules that are to be as they stand in `chains`.

    `hooked` are the rules of ours in built-in chains that are there already, by their comments.
    """

    sets: tuple[tuple[Family, str], ...] = ()
    chains: tuple[tuple[Family, Chain], ...] = ()
    hooked: tuple[tuple[Family, str, str, str], ...] = ()
    """Family, table, built-in chain, comment."""

    def __bool__(self) -> bool:
        return bool(self.sets or self.chains)


class IpvsPlan(Struct, frozen=True):
    """A plan for the driver; prints as ipvsadm, ip, ipset and iptables would be told it."""

    prologue: Prologue = Prologue()
    units: tuple[Unit, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.prologue or self.units)

    def due(self, rejected: Collection[Key] = ()) -> bool:
        """Return whether anything is to be done now; what waits for its connections is not.

        That the `rejected` cannot be done is known.
        """
        return bool(self.prologue) or any(
            unit.now or (unit.conflict and unit.key not in rejected) for unit in self.units
        )

    def __str__(self) -> str:
        lines = [
            f"ipset create {set_name(family, name)} {SETS[name]}"
            f"{' family inet6' if family is Family.IPV6 else ''}"
            for family, name in self.prologue.sets
        ]
        for family, chain in self.prologue.chains:
            tool = "iptables" if family is Family.IPV4 else "ip6tables"
            lines.append(f"{tool} -t {chain.table} -N {chain.name}")
            lines += [f"{tool} -t {chain.table} {one.line(chain.name)}" for one in chain.rules]
            lines += [
                f"{tool} -t {chain.table} {rule.line(hook, '-I')}" for hook, rule in chain.hooks
            ]
        for unit in self.units:
            if unit.conflict:
                lines.append(f"# {unit.key}: {unit.conflict}")
            lines += map(str, unit.now)
            lines += [f"{one} # when its connections have ended" for one in unit.later]
        return "".join(f"{line}\n" for line in lines)

    @property
    def size(self) -> int:
        """Return the number of operations, and of sets and rules of the prologue."""
        rules = sum(len(chain.rules) + len(chain.hooks) for _, chain in self.prologue.chains)
        units = sum(len(unit.now) + len(unit.later) for unit in self.units)
        return len(self.prologue.sets) + rules + units


def compile_program(
    servers: Iterable[VirtualServer], network: NodeNetwork, default_scheduler: str
) -> Program:
    """Return the program that serves these virtual servers."""
    entries = Map({one.key: one for one in servers})
    return counted(Program(network, entries, Map(), default_scheduler), _RULES)


def plan(observed: Observed | None, wanted: Program) -> tuple[IpvsPlan, Program]:
    """Return the plan from what the kernel has to `wanted`. History decides nothing here."""
    seen = observed or Observed()
    units = []
    for (key, old, new), why in against(
        seen.things, wanted, _RULES, lambda new: _conflict(new, seen)
    ):
        unit = Unit(key, conflict=why) if why else _unit(key, old, new)
        if unit:
            units.append(unit)
    return IpvsPlan(_prologue(seen, wanted.network), tuple(units)), wanted


def plan_changes(programmed: Program, changes: Changes) -> tuple[IpvsPlan, Program]:
    """Return the plan for one change, and the program after it. O(change)."""
    differences, after = changed(programmed, changes, _RULES)
    units = tuple(unit for one in differences if (unit := _unit(*one)))
    prologue = Prologue()
    if changes.network is not None:
        held = expected_rules(programmed.network)
        prologue = _prologue(Observed(rules=held, sets=_all_sets()), changes.network)
    return IpvsPlan(prologue, units), after


def without(before: Program, after: Program, rejected: Iterable[Key]) -> Program:
    """Return `after`, with the rejected virtual servers as they were in `before`."""
    return shared.without(before, after, rejected, _RULES)


def expected(program: Program) -> Observed:
    """Return what a kernel has that holds exactly this program."""
    held = shared.expected(program, _RULES)
    return Observed(held, rules=expected_rules(program.network), sets=_all_sets())


def expected_rules(
    network: NodeNetwork, *, quiesced: bool = False
) -> dict[tuple[Family, str, str], tuple[str, ...]]:
    """Return the comments of our rules in each chain, as `Observed.rules` has them."""
    held: dict[tuple[Family, str, str], tuple[str, ...]] = {}
    for family in Family:
        for chain in chains(family, network, quiesced=quiesced):
            held[family, chain.table, chain.name] = tuple(one.comment for one in chain.rules)
            for hook, rule in chain.hooks:
                place = (family, chain.table, hook)
                held[place] = tuple(sorted((*held.get(place, ()), rule.comment)))
    return held


def _prologue(seen: Observed, network: NodeNetwork) -> Prologue:
    missing = tuple(one for one in sorted(_all_sets()) if one not in seen.sets)
    wanted = expected_rules(network)
    changed: list[tuple[Family, Chain]] = []
    for family in Family:
        # Chains that a wanted one jumps to are written with it, so all of a table go together.
        for chain in chains(family, network):
            places = [(family, chain.table, one) for one in (chain.name, *dict(chain.hooks))]
            if any(sorted(seen.rules.get(one, ())) != sorted(wanted[one]) for one in places):
                changed.append((family, chain))
    hooked = tuple(
        (*place, comment)
        for place, comments in seen.rules.items()
        for comment in comments
        if not place[2].startswith("VIPD-")
    )
    return Prologue(missing, tuple(changed), hooked if changed else ())


def _all_sets() -> frozenset[tuple[Family, str]]:
    return frozenset((family, name) for family in Family for name in SETS)


def _places(network: NodeNetwork) -> object:
    """Return what of the network decides on which addresses, and from which, servers answer."""
    return (network.own_addresses, network.primary_addresses, network.node_port_ranges)


_RULES: Rules[Program, Thing, Value] = Rules(things, is_shared, beside, _places)


def _conflict(new: Mapping[Thing, Value], seen: Observed) -> str:
    for thing in new:
        if isinstance(thing, Service) and thing in seen.foreign:
            return f"another program has the IPVS virtual server {thing}"
        if isinstance(thing, Route) and thing.address in seen.strange:
            return f"another program has the local route to {thing.address}"
    return ""


def _unit(key: Key | None, old: Mapping[Thing, Value], new: Mapping[Thing, Value]) -> Unit:
    """Return the operations that lead from `old` to `new`, in the order that loses no packet."""
    add = [
        Operation(SET if one in old else ADD, one, value)
        for one, value in new.items()
        if one not in old or old[one] != value
    ]
    now: list[Operation] = []
    later: list[Operation] = []
    departing = [one for one in old if isinstance(one, Service) and one not in new]
    for service in departing:
        # Before its real servers stop taking connections, so that these are refused in our words.
        refused = Member(service.family, REJECTED, record(service).text)
        if refused not in old:
            now.append(Operation(ADD, refused, ""))
        later.append(Operation(DELETE, refused, ""))
    for thing, value in old.items():
        if thing in new:
            continue
        gone = Operation(DELETE, thing, value)
        match thing:
            case Destination(service) if service.protocol is not Protocol.UDP:
                if value != 0:
                    now.append(Operation(SET, thing, 0))
                later.insert(0, gone)
            case Destination():
                now.append(gone)
            case Service() | Route():
                later.append(gone)
            case Member(set=name) if name in _LAST or (name in _REFUSALS and departing):
                if gone not in later:
                    later.append(gone)
            case _:
                now.append(gone)
    now.sort(key=lambda one: isinstance(one.thing, Member) and one.verb is DELETE)
    return Unit(key, (*add, *now), tuple(sorted(later, key=_last)))


def _last(one: Operation) -> int:
    """Order what goes later: real servers, services, routes, then what guards their addresses.

    The record that a service is ours goes before its refusal, and both before the guard, which
    refuses what has no record.
    """
    match one.thing:
        case Destination():
            return 0
        case Service():
            return 1
        case Route():
            return 2
        case Member(set=name) if name in _REFUSALS:
            return 4
        case Member(set=name) if name == GUARDED:
            return 5
        case _:
            return 3


_LAST = (SERVED, GUARDED)
"""Sets that tell of what may still be there, so they outlive it."""
_REFUSALS = (REJECTED, DROPPED)
