"""The model of a node in userspace mode: its rules, its local routes, and what workers serve.

Lives here: what becomes of a packet by these. Must not: know what a program should be. Workers
choose by weight here, which is what their own tests hold them to.
"""

from collections.abc import Collection, Iterator
from fractions import Fraction

from tests.properties import packets
from tests.properties.kernel import Kernel
from tests.properties.oracle import Outcome, Shares
from tests.properties.statements import Packet

from vipd.backends.nftables.objects import elements_command
from vipd.backends.userspace.objects import (
    TABLE,
    Element,
    Forwarding,
    Place,
    ReturnPath,
    Route,
    Surroundings,
    Thing,
)
from vipd.backends.userspace.operations import Operation, UserspacePlan
from vipd.proxy.names import Address, Family, Protocol
from vipd.proxy.virtualserver import Key


class Userspace:
    """A node, changed by plans."""

    def __init__(self) -> None:
        self.kernel = Kernel()
        self.routes: dict[Address, str] = {}
        self.places: dict[Place, Forwarding] = {}
        self.surroundings = Surroundings()
        self.return_paths: dict[Family, str] = {}

    def run(self, plan: UserspacePlan, taken: Collection[Thing] = ()) -> set[Key]:
        """Do a plan as the driver does, with what waits for old connections.

        `taken` is what another program has: places and routes. Return whom that concerns.
        """
        new = [one.thing for one in plan.standing() if one.verb == "add"]
        failed = dict.fromkeys((one for one in new if one in taken), "taken")
        rejected = set(plan.concerned(failed))
        for _ in self.steps(plan, rejected):
            pass
        return rejected

    def steps(self, plan: UserspacePlan, rejected: Collection[Key] = ()) -> Iterator[object]:
        """Do a plan, and stop wherever packets may come in between."""
        if plan.surroundings is not None:
            self.surroundings = plan.surroundings
            yield plan.surroundings
        now = plan.standing(rejected)
        later = [one for unit in plan.units if unit.key not in rejected for one in unit.later]
        brought = [one for one in now if one.verb != "del"]
        gone = [one for one in now if one.verb == "del"]
        for one in brought:
            if isinstance(one.thing, ReturnPath):
                self._do(one)
        for one in brought:
            if isinstance(one.thing, Place):
                self._do(one)
                yield one
        self._elements(plan.prologue, brought)
        yield plan.prologue
        for one in brought:
            if isinstance(one.thing, Route):
                self._do(one)
                yield one
        self._elements((), gone)
        yield "gone"
        for one in gone:
            if isinstance(one.thing, Place):
                self._do(one)
                yield one
        for one in later:
            self._do(one)
        self._elements((), [one for one in later if isinstance(one.thing, Element)])
        yield "later"

    def _elements(self, prologue: tuple[str, ...], operations: list[Operation]) -> None:
        lines = list(prologue)
        for verb, thing, _ in dict.fromkeys(operations):
            if isinstance(thing, Element):
                word = "delete" if verb == "del" else "add"
                lines.append(elements_command(word, thing.family, thing.set, [thing.text], TABLE))
        self.kernel.run("\n".join(lines))

    def _do(self, one: Operation) -> None:
        match one:
            case Operation("del", Route(_, address)):
                del self.routes[address]
            case Operation(_, Route(_, address), str(source)):
                self.routes[address] = source
            case Operation("del", ReturnPath(family)):
                del self.return_paths[family]
            case Operation(_, ReturnPath(family), str(mark)):
                self.return_paths[family] = mark
            case Operation("del", Place() as place):
                del self.places[place]
            case Operation(_, Place() as place, Forwarding() as forwarding):
                self.places[place] = forwarding

    def state(self) -> object:
        """Return everything that it holds, to be compared."""
        things = self.routes, self.places, self.return_paths
        return self.kernel.tables, things, self.surroundings

    def chances(self, packet: Packet, own: frozenset[Address]) -> Shares:
        """Return what becomes of a packet."""
        local = own | self.routes.keys()
        found: Shares = {}
        for outcome, share in packets.chances(self.kernel, packet, local, table=TABLE).items():
            ends = self._accepted(packet, own) if outcome.verdict == "pass" else {outcome: share}
            for one, part in ends.items():
                found[one] = found.get(one, Fraction(0)) + part * share
        return found

    def _accepted(self, packet: Packet, own: frozenset[Address]) -> Shares:
        """Return what becomes of a packet that no rule refuses."""
        passes, refused = ({Outcome(one): Fraction(1)} for one in ("pass", "reject"))
        if packet.destination not in own | self.routes.keys():
            return passes
        if packet.protocol == "tcp" and not packet.syn:  # the node has no such connection
            return passes if packet.destination in own else refused
        if packet.protocol not in ("tcp", "udp"):
            return passes
        protocol = Protocol(packet.protocol.upper())
        place = Place(packet.family, protocol, packet.destination, packet.port)
        forwarding = self.places.get(place)
        if forwarding is None or packet.destination.is_loopback:
            return passes
        sources = forwarding.allowed_sources
        if sources is not None and not any(packet.source in one for one in sources):
            return refused
        interface = self.surroundings.interface
        pods = any(packet.source in one for one in self.surroundings.pods)
        if interface.endswith("*"):
            pods = packet.interface.startswith(interface[:-1])
        elif interface:
            pods = packet.interface == interface
        inside = pods or packet.source in (*own, *self.surroundings.own)
        used = forwarding.inside if inside else forwarding.outside
        total = sum(one.weight for one in used)
        return {
            Outcome("dnat", f"{one.address} . {one.port}", one.address not in own): Fraction(
                one.weight, total
            )
            for one in used
        } or refused
