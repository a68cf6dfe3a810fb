"""A model of IPVS in the kernel, with its routes, sets and rules: takes plans, sends packets.

Lives here: virtual servers, schedulers as shares, persistence, and a packet's way through the hooks
where IPVS stands (6.1, net/netfilter/ipvs: INPUT at 99, after filter; OUTPUT at -98, between nat
and filter). Written from ipvsadm(8), ip-route(8) and the kernel, not from the backend.
"""

import re
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction
from ipaddress import ip_address

from tests.properties.chance import Chance, every
from tests.properties.kernel import Refused
from tests.properties.oracle import Outcome
from tests.properties.statements import Packet
from tests.properties.xtables import Xtables, arrive_again
from tests.properties.xtables_rules import Flight

from vipd.proxy.names import Address, Family

LATER = " # when its connections have ended"
"""What a plan's line ends with that waits for old connections."""
EQUAL, WEIGHTED, HASHED = ("rr", "lc"), ("wrr", "wlc", "sed", "nq", "lblc", "lblcr"), ("sh", "mh")
_SOURCE_HASH_SLOTS = 256
"""CONFIG_IP_VS_SH_TAB_BITS=8."""
_SERVICE = re.compile(r"(-t|-u|--sctp-service) (\S+):([0-9]+)")
_ROUTE = re.compile(
    r"ip (?:(-6) )?route (add|replace|del) local (\S+) dev lo table local proto ([0-9]+)"
    r"(?: src (\S+))?"
)
_PROTOCOLS = {"-t": "tcp", "-u": "udp", "--sctp-service": "sctp"}

Place = tuple[str, Address, int]
"""Protocol, address, port."""
Templates = dict[Place, dict[Address, tuple[Address, int]]]
"""Persistence: for each virtual server the real server of each client."""


@dataclass
class VirtualServer:
    """What ipvsadm calls a virtual service; real servers in the order of adding, with weights."""

    scheduler: str
    flags: tuple[str, ...]
    persistence: int
    real: dict[tuple[Address, int], int] = field(default_factory=dict)

    def usable(self) -> bool:
        """Return whether a new connection finds a real server."""
        return any(self.real.values())

    def shares(self) -> dict[tuple[Address, int], Fraction]:
        """Return how large a part of new connections each real server gets, in the long run."""
        able = {one: weight for one, weight in self.real.items() if weight}
        match self.scheduler:
            case "rr" | "lc":
                counts = dict.fromkeys(able, 1)
            case "sh":
                counts = self._table()
            case "fo":
                most = max(able.values(), default=0)
                counts = {one: 1 for one, weight in list(able.items())[:1] if weight == most}
                counts = counts or {max(able, key=lambda one: able[one]): 1} if able else {}
            case "dh" | "ovf":
                raise Refused(f"no shares are known for {self.scheduler}")
            case _:
                counts = able
        total = sum(counts.values())
        return {one: Fraction(count, total) for one, count in counts.items()}

    def _table(self) -> dict[tuple[Address, int], int]:
        """Return slots of the source hash (ip_vs_sh_reassign); one at weight 0 has none.

        Weight 0 in the kernel keeps a turn of no length, which `sh-fallback` passes on.
        """
        turn = [one for one, weight in self.real.items() for _ in range(weight)]
        if not turn:
            return {}
        return Counter(turn[at % len(turn)] for at in range(_SOURCE_HASH_SLOTS))


class Ipvs:
    """Everything that a node in IPVS mode has in its kernel."""

    def __init__(self) -> None:
        self.xtables = Xtables()
        self.routes: dict[Address, str] = {}
        """Local routes with their preferred source."""
        self.servers: dict[Place, VirtualServer] = {}

    def run(self, text: str, *, later: bool = True) -> None:
        """Do a plan, line by line; without what waits unless `later`."""
        for _ in self.steps(text, later=later):
            pass

    def steps(self, text: str, *, later: bool = True) -> Iterator[str]:
        """Do a plan and stop after each line: the lines in order, then those that wait."""
        lines = text.splitlines()
        waiting = [one.removesuffix(LATER) for one in lines if one.endswith(LATER)]
        for line in [one for one in lines if not one.endswith(LATER)] + (waiting if later else []):
            self._line(line)
            yield line

    def local(self, own: frozenset[Address]) -> frozenset[Address]:
        """Return what the kernel takes for its own addresses."""
        return own | self.routes.keys()

    def _line(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        match word:
            case "ipset":
                if rest.startswith("create VIPD6") and "inet6" not in rest:
                    rest += " family inet6"
                used = self.xtables.used_sets() if rest.startswith("destroy") else frozenset()
                self.xtables.sets.run(rest, used)
            case "iptables" | "ip6tables":
                self._rule(Family.IPV4 if word == "iptables" else Family.IPV6, rest)
            case "ip":
                self._route(line)
            case "-A" | "-E" | "-D":
                self._virtual(word, rest)
            case "-a" | "-e" | "-d":
                self._real(word, rest)
            case _:
                raise Refused(f"no command: {line}")

    def _rule(self, family: Family, rest: str) -> None:
        """Do an iptables command; a chain that is there is emptied, a hook that is there stays."""
        _, table, verb, chain, *_ = rest.split(" ", 4)
        there = self.xtables.tables[family, table]
        if verb == "-N" and chain in there:
            rest = f"-t {table} -F {chain}"
        if verb == "-I" and rest.split(" ", 4)[4] in there[chain].rules:
            return
        self.xtables.command(family, rest)

    def _route(self, line: str) -> None:
        match = _ROUTE.fullmatch(line)
        if not match:
            raise Refused(f"no command: {line}")
        six, verb, text, _, source = match.groups()
        address = ip_address(text)
        if (address.version == 6) != bool(six):
            raise Refused(f"another family: {line}")
        if verb == "add" and address in self.routes:
            raise Refused(f"RTNETLINK answers: File exists: {line}")
        if verb == "del":
            if self.routes.pop(address, None) is None:
                raise Refused(f"RTNETLINK answers: No such process: {line}")
        else:
            self.routes[address] = source or ""

    def _virtual(self, verb: str, rest: str) -> None:
        place, options = _place(rest)
        held = self.servers.get(place)
        if (held is None) is not (verb == "-A"):
            raise Refused(
                f"{'No such service' if held is None else 'Service already exists'}: {rest}"
            )
        if verb == "-D":
            if options:
                raise Refused(f"unexpected: {rest}")
            del self.servers[place]
            return
        scheduler, persistence = "wlc", 0
        flags: tuple[str, ...] = ()
        while options:
            option = options.pop(0)
            match option:
                case "-s":
                    scheduler = options.pop(0)
                    known = (*EQUAL, *WEIGHTED, *HASHED, "dh", "fo", "ovf")
                    if scheduler not in known:
                        raise Refused(f"Scheduler or persistence engine not found: {scheduler}")
                case "-p":
                    persistence = int(options.pop(0))
                    if persistence <= 0:
                        raise Refused(f"Expected a timeout: {rest}")
                case "-b":
                    flags = tuple(options.pop(0).split(","))
                    if any(one not in _flags(scheduler) for one in flags):
                        raise Refused(f"unknown flags: {rest}")
                case _:
                    raise Refused(f"unknown option {option}: {rest}")
        made = VirtualServer(scheduler, flags, persistence, held.real if held else {})
        self.servers[place] = made

    def _real(self, verb: str, rest: str) -> None:
        place, options = _place(rest)
        server = self.servers.get(place)
        if server is None:
            raise Refused(f"Service not defined: {rest}")
        if options[:1] != ["-r"]:
            raise Refused(f"no real server: {rest}")
        host, _, port = options[1].rpartition(":")
        real = (ip_address(host.strip("[]")), int(port))
        if real[0].version != place[1].version:
            raise Refused(f"another family: {rest}")
        if (real in server.real) is (verb == "-a"):
            raise Refused(
                f"Destination {'exists' if real in server.real else 'is not there'}: {rest}"
            )
        match verb, options[2:]:
            case "-d", []:
                del server.real[real]
            case "-a" | "-e", ["-m", "-w", weight] if 0 <= int(weight) < 65536:
                server.real[real] = int(weight)
            case _:
                raise Refused(f"unknown options: {rest}")


def _flags(scheduler: str) -> tuple[str, ...]:
    return (f"{scheduler}-fallback", f"{scheduler}-port") if scheduler in HASHED else ()


def _place(rest: str) -> tuple[Place, list[str]]:
    match = _SERVICE.match(rest)
    if not match:
        raise Refused(f"no service: {rest}")
    word, host, port = match.groups()
    if not 0 < int(port) < 65536 or (":" in host) is not host.startswith("["):
        raise Refused(f"no service: {rest}")
    return (_PROTOCOLS[word], ip_address(host.strip("[]")), int(port)), rest[match.end() :].split()


def ways(
    kernel: Ipvs, packet: Packet, own: frozenset[Address], templates: Templates | None = None
) -> dict[Outcome, Fraction]:
    """Return what can become of the packet, with probabilities that add up to 1."""
    found: dict[Outcome, Fraction] = {}
    for (outcome, _), probability in every(
        lambda chance: _sent(kernel, packet, own, templates, chance)
    ):
        found[outcome] = found.get(outcome, Fraction(0)) + probability
    return found


def remembered(
    kernel: Ipvs, packet: Packet, own: frozenset[Address], templates: Templates | None = None
) -> list[tuple[Outcome, Templates]]:
    """Return what can become of the packet, each with the templates that it leaves."""

    def run(chance: Chance) -> tuple[Outcome, Templates]:
        return _sent(kernel, packet, own, templates, chance)

    return [one for one, _ in every(run)]


def _sent(
    kernel: Ipvs, packet: Packet, own: frozenset[Address], templates: Templates | None,
    chance: Chance,
) -> tuple[Outcome, Templates]:  # fmt: skip
    left = deepcopy(templates or {})
    flight = Flight(packet, kernel.local(own), chance, kernel.xtables.sets.by_name, {})
    verdict = _travel(kernel, flight, left)
    if verdict != "accept":
        return Outcome(verdict), left
    if not flight.translated:
        lost = packet.protocol == "tcp" and not packet.syn and flight.destination not in own
        if lost and flight.destination in flight.own:  # the node has no such connection
            return Outcome("reject"), left
        return Outcome("pass", masqueraded=flight.masqueraded), left
    masqueraded = flight.masqueraded and flight.destination not in flight.own
    return Outcome("dnat", f"{flight.destination} . {flight.port}", masqueraded), left


def _travel(kernel: Ipvs, flight: Flight, templates: Templates) -> str:
    rules = kernel.xtables
    if flight.packet.interface:
        verdict = rules.run_hook(flight, "PREROUTING")
        if verdict != "accept":
            return verdict
        if flight.destination not in flight.own:
            verdict = rules.run_hook(flight, "FORWARD")
            return rules.run_hook(flight, "POSTROUTING") if verdict == "accept" else verdict
        verdict = rules.run_hook(flight, "INPUT", ("mangle", "filter"))
        if verdict != "accept":
            return verdict
        verdict = _schedule(kernel, flight, templates)
        if verdict == "reject":
            return verdict
        if not flight.translated or flight.destination in flight.own:
            return "accept"
        flight.interface = ""
        return _out(kernel, flight, ("raw", "mangle", "filter"))
    verdict = rules.run_hook(flight, "OUTPUT", ("raw", "mangle", "nat"))
    if verdict != "accept":
        return verdict
    verdict = _schedule(kernel, flight, templates)
    if verdict == "reject":
        return verdict
    # What IPVS sends away enters OUTPUT anew; what it leaves to the node goes on where it was.
    anew = flight.translated and flight.destination not in flight.own
    return _out(kernel, flight, ("raw", "mangle", "filter") if anew else ("filter",))


def _out(kernel: Ipvs, flight: Flight, tables: tuple[str, ...]) -> str:
    verdict = kernel.xtables.run_hook(flight, "OUTPUT", tables)
    if verdict == "accept":
        verdict = kernel.xtables.run_hook(flight, "POSTROUTING")
    if verdict == "accept" and flight.destination in flight.own:
        return arrive_again(kernel.xtables, flight)
    return verdict


def _schedule(kernel: Ipvs, flight: Flight, templates: Templates) -> str:
    """Let IPVS have the packet: it takes what has a virtual server, of TCP only a SYN."""
    packet = flight.packet
    place = (packet.protocol, flight.destination, flight.port)
    server = kernel.servers.get(place)
    if server is None or (packet.protocol == "tcp" and not packet.syn):
        return "accept"
    known = templates.get(place, {}).get(packet.source) if server.persistence else None
    if known is not None and server.real.get(known):  # expire_quiescent_template=1
        chosen = known
    elif server.usable():
        chosen = flight.chance.pick(server.shares())
    else:
        return "reject"
    if server.persistence:
        templates.setdefault(place, {})[packet.source] = chosen
    flight.destination, flight.port = chosen
    flight.translated = True
    return "accept"
