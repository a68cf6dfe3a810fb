"""What one packet meets in the IPVS program: `vipd explain`, rule by rule.

Lives here: a reading of the very rules that are loaded, and of the virtual server that answers, for
the first packet of one connection. Must not: follow chance (a choice among real servers is one
step), nor guess: a rule that it cannot read is a ValueError.
"""

import re
from collections.abc import Sequence

from vipd.backends.ipvs.compile import Program, things
from vipd.backends.ipvs.objects import (
    GUARDED,
    HAIRPIN,
    SETS,
    SOURCES,
    Destination,
    Manner,
    Member,
    Route,
    Service,
    member_text,
    place,
    set_name,
)
from vipd.backends.ipvs.rules import Chain, Rule, chains
from vipd.backends.protocol import Packet, Step
from vipd.proxy.names import family_of, parse_network
from vipd.proxy.virtualserver import Key

MOST_TARGETS = 4
"""Real servers that the step of a choice names; the others are counted."""
_MATCH = re.compile(
    r"-m set (?P<not_set>! )?--match-set (?P<set>\S+) (?P<sides>\S+) ?"
    r"|-m addrtype --src-type (?P<type>LOCAL) ?"
    r"|-m mark ! --mark (?P<mark>\S+) ?"
    r"|-m conntrack --ctstate (?P<state>NEW) ?"
    r"|-p tcp (?P<not_syn>!) --syn ?"
    r"|-p (?P<protocol>tcp|udp|sctp) ?"
    r"|-m tcp --dport (?P<port>\d+) ?"
    r"|-s (?P<source>\S+) ?"
    r"|-d (?P<destination>\S+) ?"
    r"|-i (?P<interface>\S+) ?"
)
_VERDICT = re.compile(r"-j (?P<target>\S+)(?P<options>.*)")


def trace(program: Program, packet: Packet) -> Sequence[Step]:
    """Return every rule that the packet matches, hook after hook, and what IPVS makes of it."""
    walk = _Walk(program, packet)
    if packet.from_node:
        if walk.hooks(("mangle", "OUTPUT"), ("nat", "OUTPUT")) or walk.balance():
            return walk.steps
        if walk.targets:
            walk.hooks(("nat", "POSTROUTING"))
            return walk.steps
        if walk.hooks(("filter", "OUTPUT")):
            return walk.steps
    elif walk.hooks(("nat", "PREROUTING")):
        return walk.steps
    if not walk.arrives():
        walk.hooks(("filter", "FORWARD"), ("nat", "POSTROUTING"))
        return walk.steps
    if walk.hooks(("mangle", "INPUT"), ("filter", "INPUT")) or walk.balance():
        return walk.steps
    if walk.targets:
        walk.hooks(("nat", "POSTROUTING"))
    return walk.steps


class _Walk:
    """A packet on its way; `targets` are the real servers that IPVS may have sent it to."""

    def __init__(self, program: Program, packet: Packet) -> None:
        self.packet = packet
        self.program = program
        self.family = family_of(packet.destination)
        self.steps: list[Step] = []
        self.targets: dict[Destination, int] = {}
        self.marked = False
        self._chains = {one.name: one for one in chains(self.family, program.network)}
        self._sets = {set_name(self.family, name): name for name in SETS}
        self.service = Service(self.family, packet.protocol, packet.destination, packet.port)
        self._held = {
            thing: value
            for address in (packet.destination, None)
            for thing, value in things(
                program, Key(self.family, address, packet.protocol, packet.port)
            ).items()
        }

    def hooks(self, *places: tuple[str, str]) -> bool:
        """Walk what is hooked in there; return whether the packet ends."""
        for table, hook in places:
            for chain in self._chains.values():
                for built_in, rule in chain.hooks:
                    if (chain.table, built_in) == (table, hook):
                        where = f"{table} {hook}"
                        if self._rule(where, chain, rule) == "end":
                            return True
        return False

    def arrives(self) -> bool:
        """Return whether the kernel takes the packet for the node itself, as IPVS needs it."""
        route = Route(self.family, self.packet.destination)
        if route in self.program.shared:
            self.steps.append(Step("table local", f"local {route.address} dev lo", "arrives here"))
            return True
        return self.packet.to_node or self.packet.destination in self.program.network.own_addresses

    def balance(self) -> bool:
        """Meet the virtual server; return whether it refuses."""
        manner = self._held.get(self.service)
        if not isinstance(manner, Manner):
            return False
        self.targets = {
            thing: weight
            for thing, weight in self._held.items()
            if isinstance(thing, Destination)
            and thing.service == self.service
            and isinstance(weight, int)
        }
        total = sum(self.targets.values())
        names = [
            f"{place(one.address, one.port)} (weight {weight} of {total})"
            for one, weight in list(self.targets.items())[:MOST_TARGETS]
        ]
        more = len(self.targets) - len(names)
        said = ", ".join(names) + (f" and {more} more" if more > 0 else "")
        outcome = f"to {said}" if self.targets else "refused: it has no real server"
        self.steps.append(Step("IPVS", f"{self.service} {manner}", outcome))
        return not self.targets

    def _chain(self, chain: Chain) -> str:
        where = f"{chain.table} {chain.name}"
        for rule in chain.rules:
            done = self._rule(where, chain, rule)
            if done:
                return done if done == "end" else ""
        return ""

    def _rule(self, where: str, chain: Chain, rule: Rule) -> str:
        """Return ``end`` where the packet ends, ``return`` where the chain does, else nothing."""
        rest = rule.text
        while match := _MATCH.match(rest):
            if not self._matches(match):
                return ""
            rest = rest[match.end() :]
        verdict = _VERDICT.fullmatch(rest)
        if verdict is None:
            raise ValueError(f"{rest!r} in {rule.text!r}")
        target, options = verdict["target"], verdict["options"]
        self.steps.append(Step(where, rule.text, rule.why))
        match target:
            case "DROP" | "REJECT":
                return "end"
            case "RETURN" | "MASQUERADE" | "ACCEPT":
                return "return"
            case "MARK":
                self.marked = "0x0/" not in options
                return ""
            case _:
                return self._chain(self._chains[target])

    def _matches(self, match: re.Match[str]) -> bool:
        packet = self.packet
        if match["set"]:
            held = self._holds(self._sets[match["set"]])
            return held is not bool(match["not_set"])
        if match["type"]:
            own = packet.source in self.program.network.own_addresses
            return packet.from_node or own
        if match["mark"]:
            return not self.marked
        if match["state"]:
            return True
        if match["not_syn"]:
            return False  # the first packet of a TCP connection is a SYN
        if match["protocol"]:
            return match["protocol"] == packet.protocol.lower()
        if match["port"]:
            return int(match["port"]) == packet.port
        if match["source"]:
            return packet.source in parse_network(match["source"])
        if match["destination"]:
            return packet.destination in parse_network(match["destination"])
        name = match["interface"]
        came = packet.interface
        return came.startswith(name[:-1]) if name.endswith("+") else came == name

    def _holds(self, name: str) -> bool:
        packet, here = self.packet, self.packet.destination
        if name == GUARDED:
            return Member(self.family, name, str(here)) in self.program.shared
        if name == HAIRPIN:
            return self._reaches_itself()
        text = member_text(here, packet.protocol, packet.port)
        if name != SOURCES:
            return Member(self.family, name, text) in self._held
        return any(
            isinstance(one, Member)
            and one.set == SOURCES
            and one.text.startswith(f"{text},")
            and packet.source in parse_network(one.text.rpartition(",")[2])
            for one in self._held
        )

    def _reaches_itself(self) -> bool:
        packet = self.packet
        return any(
            one.address == packet.source
            and Member(
                self.family,
                HAIRPIN,
                member_text(one.address, packet.protocol, one.port, one.address),
            )
            in self.program.shared
            for one in self.targets
        )
