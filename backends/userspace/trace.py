"""What one packet meets in the userspace program: `vipd explain`, rule by rule.

Lives here: a reading of the very rules that are loaded, and of the listener that accepts, for the
first packet of one connection. Must not: follow chance (a choice among endpoints is one step), nor
guess: a rule that it cannot read is a ValueError.
"""

import re
from collections.abc import Sequence

from vipd.backends.nftables.objects import Chain, Rule
from vipd.backends.nftables.pipeline import NOT_A_SYN
from vipd.backends.protocol import Packet, Step
from vipd.backends.userspace.compile import things
from vipd.backends.userspace.objects import (
    ADDRESSES,
    ALLOWED,
    ROUTE_PROTOCOL,
    Element,
    Forwarding,
    Place,
    Route,
)
from vipd.backends.userspace.program import Program
from vipd.backends.userspace.rules import chains
from vipd.proxy.names import family_of, parse_network
from vipd.proxy.virtualserver import Key

MOST_ENDPOINTS = 4
"""Endpoints that the step of a choice names; the others are counted."""
_K = r"ip6? daddr \. meta l4proto \. th dport"
_MATCH = re.compile(
    rf"(?P<not_syn>{re.escape(NOT_A_SYN)}) ?"
    rf"|(?P<sources>{_K} \. ip6? saddr != @{ALLOWED}) ?"
    rf"|{_K} @(?P<set>[a-z-]+) ?"
    rf"|ip6? daddr @(?P<addresses>{ADDRESSES}) ?"
    r"|fib (?P<local>[sd]addr) type local ?"
    r'|iifname "(?P<interface>[^"]+)" ?'
    r"|ip6? (?P<side>[sd]addr) (?P<networks>\{ [^}]+ \}|[0-9a-f.:/]+) ?"
    r"|(?P<new>ct state new) ?"
    r"|meta l4proto (?P<protocol>tcp) ?"
)


def trace(program: Program, packet: Packet) -> Sequence[Step]:
    """Return every rule that the packet matches, hook after hook, and the listener it reaches."""
    walk = _Walk(program, packet)
    if packet.from_node and walk.hook("filter-output"):
        return walk.steps
    if not walk.arrives():
        if not packet.from_node:
            walk.hook("filter-forward")
        return walk.steps
    if not walk.hook("filter-input"):
        walk.listen()
    return walk.steps


class _Walk:
    """A packet on its way."""

    def __init__(self, program: Program, packet: Packet) -> None:
        self.packet = packet
        self.program = program
        self.family = family_of(packet.destination)
        self.steps: list[Step] = []
        self.place = Place(self.family, packet.protocol, packet.destination, packet.port)
        self._chains = {one.name: one for one in chains(self.family, program.network)}
        self._held = {
            thing: value
            for address in (packet.destination, None)
            for thing, value in things(
                program, Key(self.family, address, packet.protocol, packet.port)
            ).items()
        }

    def hook(self, name: str) -> bool:
        """Walk a base chain; return whether the packet ends there."""
        return self._chain(self._chains[name]) == "end"

    def arrives(self) -> bool:
        """Return whether the kernel takes the packet for the node itself."""
        route = Route(self.family, self.packet.destination)
        if route in self.program.shared:
            told = f"local {route.address} dev lo proto {ROUTE_PROTOCOL}"
            self.steps.append(Step("table local", told, "arrives here"))
        return self._is_here()

    def listen(self) -> None:
        """Meet the listener, if there is one."""
        forwarding = self._held.get(self.place)
        if not isinstance(forwarding, Forwarding):
            return
        pods = self.program.network.pod_sources
        inside = self.packet.from_node or any(self.packet.source in one for one in pods.cidrs)
        inside |= bool(pods.interface) and self._came_by(pods.interface)
        used = forwarding.inside if inside else forwarding.outside
        names = ", ".join(str(one) for one in used[:MOST_ENDPOINTS])
        more = len(used) - MOST_ENDPOINTS
        said = names + (f" and {more} more" if more > 0 else "")
        how = ", ".join((forwarding.algorithm, *forwarding.options))
        self.steps.append(Step("a worker", f"listens at {self.place}: {how}", f"to {said}"))

    def _came_by(self, name: str) -> bool:
        if name.endswith("*"):
            return self.packet.interface.startswith(name[:-1])
        return self.packet.interface == name

    def _is_here(self) -> bool:
        destination = self.packet.destination
        return (
            self.packet.to_node
            or destination in self.program.network.own_addresses
            or Route(self.family, destination) in self.program.shared
        )

    def _chain(self, chain: Chain) -> str:
        for rule in chain.rules:
            done = self._rule(chain, rule)
            if done:
                return done
        return ""

    def _rule(self, chain: Chain, rule: Rule) -> str:
        """Return ``end`` where the packet ends, ``return`` where the chain does, else nothing."""
        rest = rule.text
        while match := _MATCH.match(rest):
            if not self._matches(match):
                return ""
            rest = rest[match.end() :]
        self.steps.append(Step(f"nft {chain.name}", rule.text, rule.why))
        word, _, target = rest.partition(" ")
        match word:
            case "drop" | "reject":
                return "end"
            case "return":
                return "return"
            case "goto":
                return self._chain(self._chains[target]) or "return"
            case "jump":
                return "end" if self._chain(self._chains[target]) == "end" else ""
            case _:
                raise ValueError(f"{rest!r} in {rule.text!r}")

    def _matches(self, match: re.Match[str]) -> bool:
        packet = self.packet
        if match["not_syn"]:
            return False  # the first packet of a TCP connection is a SYN
        if match["sources"]:
            return not any(
                packet.source in parse_network(one.text.rpartition(" . ")[2])
                for one in self._held
                if isinstance(one, Element) and one.set == ALLOWED
            )
        if match["set"]:
            return Element(self.family, match["set"], self.place.key) in self._held
        if match["addresses"]:
            guard = Element(self.family, ADDRESSES, str(packet.destination))
            return guard in self.program.shared
        if match["local"] == "saddr":
            return packet.from_node or packet.source in self.program.network.own_addresses
        if match["local"]:
            return self._is_here()
        if match["interface"]:
            return self._came_by(match["interface"])
        if match["networks"]:
            address = packet.source if match["side"] == "saddr" else packet.destination
            listed = match["networks"].strip("{} ").split(", ")
            return any(address in parse_network(one) for one in listed)
        return bool(match["new"]) or match["protocol"] == packet.protocol.lower()
