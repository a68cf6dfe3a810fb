"""The matches and targets of iptables rules that vipd writes, each with what it does to a packet.

Any other match, option or target is refused, so a new shape of rule needs a line here. Written from
iptables-extensions(8) and the kernel's net/netfilter/xt_*.c.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import NamedTuple

from tests.properties.chance import Chance
from tests.properties.ipsets import TYPES, IpSet
from tests.properties.statements import Packet

from vipd.proxy.names import Address, Family

Memory = dict[str, set[Address]]
"""Addresses that lists of the recent match remember, by the list's name."""


class NoSuchRule(Exception):
    """A rule holds something that this model does not know, or the tool would not take."""


@dataclass
class Flight:
    """A packet on its way: where it is, what it is now, and what was decided."""

    packet: Packet
    own: frozenset[Address]
    chance: Chance
    sets: Mapping[str, IpSet]
    memory: Memory
    hook: str = ""
    table: str = ""
    interface: str = ""
    out_interface: str = ""
    destination: Address = field(init=False)
    port: int = field(init=False)
    mark: int = field(init=False)
    connection_mark: int = 0
    translated: bool = False
    masqueraded: bool = False
    met: int = 0
    """Rules met so far."""
    path: list[tuple[str, str, int]] = field(default_factory=list)
    """Table, chain and number of each rule that held, in order."""
    hashed: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.destination, self.port = self.packet.destination, self.packet.port
        self.mark, self.interface = self.packet.mark, self.packet.interface


Match = Callable[[Flight], bool]
Target = Callable[[Flight], str | None]
"""Returns the verdict, or None to go on with the next rule."""
Options = dict[str, tuple[bool, tuple[str, ...]]]
"""For each option whether it was negated, and its arguments."""


class Rule(NamedTuple):
    """A rule: all matches must hold; the jump names a chain of the table."""

    matches: tuple[Match, ...]
    target: Target
    jump: str
    """``-j CHAIN`` or ``-g CHAIN``; empty where the target is none of the table's chains."""
    target_name: str
    sets: tuple[str, ...]
    comment: str


_WORD = re.compile(r'"((?:[^"\\]|\\.)*)"|(\S+)')
_PROTOCOLS = ("tcp", "udp", "sctp", "icmp", "ipv6-icmp", "all")
_ARITY = {
    "comment": {"--comment": 1},
    "tcp": {"--dport": 1, "--sport": 1, "--tcp-flags": 2, "--syn": 0},
    "udp": {"--dport": 1, "--sport": 1},
    "sctp": {"--dport": 1, "--sport": 1},
    "multiport": {"--dports": 1},
    "addrtype": {"--dst-type": 1, "--src-type": 1},
    "set": {"--match-set": 2},
    "statistic": {"--mode": 1, "--probability": 1, "--every": 1, "--packet": 1},
    "recent": {
        "--name": 1, "--seconds": 1, "--reap": 0, "--rsource": 0, "--set": 0, "--rcheck": 0,
        "--update": 0, "--remove": 0, "--mask": 1,
    },
    "conntrack": {
        "--ctstate": 1, "--ctstatus": 1, "--ctdir": 1, "--ctorigdst": 1, "--ctorigdstport": 1,
        "--ctproto": 1,
    },
    "mark": {"--mark": 1},
    "connmark": {"--mark": 1},
    "cluster": {
        "--cluster-total-nodes": 1, "--cluster-local-node": 1, "--cluster-local-nodemask": 1,
        "--cluster-hash-seed": 1,
    },
}  # fmt: skip
_TARGET_ARITY = {
    "DNAT": {"--to-destination": 1},
    "MARK": {"--set-xmark": 1, "--set-mark": 1, "--or-mark": 1, "--xor-mark": 1, "--and-mark": 1},
    "CONNMARK": {"--set-xmark": 1, "--set-mark": 1, "--or-mark": 1, "--xor-mark": 1},
    "MASQUERADE": {"--random-fully": 0},
    "REJECT": {"--reject-with": 1},
    "DROP": {},
    "ACCEPT": {},
    "RETURN": {},
}
_REJECTIONS = {
    Family.IPV4: ("icmp-port-unreachable", "tcp-reset"),
    Family.IPV6: ("icmp6-port-unreachable", "tcp-reset"),
}
_WORLD = 0xFFFFFFFF


def words(text: str) -> list[str]:
    """Return the words of a line as iptables-restore splits it."""
    return [
        one[1] if one[0] is None else one[0].replace('\\"', '"').replace("\\\\", "\\")
        for one in (match.groups() for match in _WORD.finditer(text))
    ]


@lru_cache(maxsize=1 << 14)
def parse(text: str, family: Family, table: str, hook: str = "") -> Rule:
    """Return a rule from what stands after ``-A CHAIN``; `hook` is set for a built-in chain."""
    return _Parser(text, family, table, hook).rule()


class _Parser:
    def __init__(self, text: str, family: Family, table: str, hook: str) -> None:
        self.text, self.family, self.table, self.hook = text, family, table, hook
        self.words = words(text)
        self.base: list[Match] = []
        self.modules: list[tuple[str, Options]] = []
        self.protocol = ""
        self.target, self.goto = "", False
        self.target_options: Options = {}
        self.comment = ""
        self.sets: list[str] = []

    def rule(self) -> Rule:
        while self.words:
            self._option()
        matches = [*self.base]
        for name, options in self.modules:
            if not options:
                if name in ("tcp", "udp", "sctp"):
                    continue
                raise self._unknown(f"-m {name} without options")
            matches.append(getattr(self, f"_{name}")(options))
        if self.target in _TARGET_ARITY:
            if self.goto:
                raise self._unknown("goto to a target")
            target, jump = self._target(), ""
        else:
            if self.target_options:
                raise self._unknown("options of a chain")
            target, jump = _nothing, ("-g " if self.goto else "-j ") + self.target
            jump = jump if self.target else ""
        return Rule(tuple(matches), target, jump, self.target, tuple(self.sets), self.comment)

    def _unknown(self, what: str) -> NoSuchRule:
        return NoSuchRule(f"{what} in {self.text!r}")

    def _option(self) -> None:
        word = self.words.pop(0)
        negated = word == "!"
        if negated:
            word = self.words.pop(0)
        match word:
            case "-s" | "-d":
                self.base.append(_network(word, self._next(), negated, self.family))
            case "-i" | "-o":
                name = self._next()
                wrong = {"-i": ("OUTPUT", "POSTROUTING"), "-o": ("INPUT", "PREROUTING")}[word]
                if self.hook in wrong:
                    raise self._unknown(f"Can't use {word} with {self.hook}")
                self.base.append(_interface(word, name, negated))
            case "-p":
                self.protocol = self._next()
                if self.protocol not in _PROTOCOLS:
                    raise self._unknown(f"-p {self.protocol}")
                if self.protocol != "all":
                    self.base.append(_is_protocol(self.protocol, negated))
                if negated:
                    self.protocol = ""
                elif self.protocol in _ARITY:
                    self.modules.append((self.protocol, {}))
            case "-m" if not negated:
                name = self._next()
                if name not in _ARITY:
                    raise self._unknown(f"-m {name}")
                if name in ("tcp", "udp", "sctp") and name != self.protocol:
                    raise self._unknown(f"-m {name} without -p {name}")
                if not (self.modules and self.modules[-1] == (name, {})):
                    self.modules.append((name, {}))
            case "-j" | "-g" if not negated and not self.target:
                self.target, self.goto = self._next(), word == "-g"
            case _:
                self._of_module(word, negated)

    def _of_module(self, word: str, negated: bool) -> None:
        known = _TARGET_ARITY.get(self.target, {})
        if word in known and not negated:
            self.target_options[word] = (False, tuple(self._next() for _ in range(known[word])))
            return
        for name, options in reversed(self.modules):
            if word in _ARITY[name]:
                if word in options:
                    raise self._unknown(f"{word} twice")
                arguments = tuple(self._next() for _ in range(_ARITY[name][word]))
                options[word] = (negated, arguments)
                return
        raise self._unknown(word)

    def _next(self) -> str:
        if not self.words:
            raise self._unknown("too short")
        return self.words.pop(0)

    def _comment(self, options: Options) -> Match:
        self.comment = options["--comment"][1][0]
        if len(self.comment) > 255:
            raise self._unknown("a comment of more than 255 characters")
        return _always

    def _tcp(self, options: Options) -> Match:
        tests: list[Match] = []
        for name, (negated, arguments) in options.items():
            match name:
                case "--dport" | "--sport":
                    tests.append(_ports(name, arguments[0], negated))
                case _:
                    given = arguments or ("FIN,SYN,RST,ACK", "SYN")
                    if given not in (("FIN,SYN,RST,ACK", "SYN"), ("SYN,RST,ACK,FIN", "SYN")):
                        raise self._unknown("other flags than --syn")
                    tests.append(_not(lambda f: f.packet.syn, negated))
        return lambda flight: all(one(flight) for one in tests)

    _udp = _sctp = _tcp

    def _multiport(self, options: Options) -> Match:
        if self.protocol not in ("tcp", "udp", "sctp"):
            raise self._unknown("multiport without protocol")
        negated, (text,) = options["--dports"]
        ports = {int(one) for one in text.split(",")}
        if len(ports) > 15:
            raise self._unknown("more than 15 ports")
        return _not(lambda flight: flight.port in ports, negated)

    def _addrtype(self, options: Options) -> Match:
        tests = []
        for name, (negated, (kind,)) in options.items():
            if kind != "LOCAL":
                raise self._unknown(f"address type {kind}")
            source = name == "--src-type"
            tests.append(_not(_local(source), negated))
        return lambda flight: all(one(flight) for one in tests)

    def _set(self, options: Options) -> Match:
        negated, (name, flags) = options["--match-set"]
        sides = flags.split(",")
        if any(side not in ("src", "dst") for side in sides):
            raise self._unknown(f"--match-set with {flags}")
        self.sets.append(name)
        family = self.family

        def do(flight: Flight) -> bool:
            held = flight.sets[name]
            kinds = TYPES[held.type]
            if held.family != family and held.type.split(":")[1] != "port":
                raise NoSuchRule(f"{name} is a set of the other family")
            if len(kinds) != len(sides):
                raise NoSuchRule(f"{name} has {kinds}, not {sides}")
            return held.holds(
                [
                    _looked_up(flight, kind, side, held.type)
                    for kind, side in zip(kinds, sides, strict=True)
                ]
            )

        return _not(do, negated)

    def _statistic(self, options: Options) -> Match:
        mode = options["--mode"][1][0]
        given = {name: one for name, (_, (one,)) in options.items()}
        if mode == "random" and set(given) == {"--mode", "--probability"}:
            exact = Fraction(given["--probability"])
            if not 0 <= exact <= 1:
                raise self._unknown("no probability")
            # libxt_statistic.c: lround(0x80000000 * probability), compared with 31 random bits
            probability = Fraction(round(exact * 2**31), 2**31)
        elif (
            mode == "nth"
            and "--every" in given
            and int(given.get("--packet", "0")) < int(given["--every"])
        ):
            # a counter of the rule's own: in the long run its share of the packets
            probability = Fraction(1, int(given["--every"]))
        else:
            raise self._unknown("statistic")
        negated = options.get("--probability", options.get("--every", (False, ())))[0]
        return _not(lambda flight: flight.chance.happens(probability), negated)

    def _recent(self, options: Options) -> Match:
        verbs = [one for one in ("--set", "--rcheck", "--update", "--remove") if one in options]
        name = options.get("--name", (False, ("DEFAULT",)))[1][0]
        if len(verbs) != 1 or len(name) > 199:
            raise self._unknown("recent")
        if ("--seconds" in options or "--reap" in options) and verbs[0] in ("--set", "--remove"):
            raise self._unknown("recent: seconds")
        if "--reap" in options and "--seconds" not in options:
            raise self._unknown("recent: --reap without --seconds")
        if "--seconds" in options and int(options["--seconds"][1][0]) <= 0:
            raise self._unknown("recent: --seconds")
        negated = options[verbs[0]][0]

        def do(flight: Flight) -> bool:
            held, source = flight.memory.setdefault(name, set()), flight.packet.source
            known = source in held
            if verbs[0] == "--set":
                held.add(source)
                known = True
            if verbs[0] == "--remove":
                held.discard(source)
            return known

        return _not(do, negated)

    def _conntrack(self, options: Options) -> Match:
        tests: list[Match] = []
        for name, (negated, (text,)) in options.items():
            tests.append(_not(self._tracked(name, text), negated))
        return lambda flight: all(one(flight) for one in tests)

    def _tracked(self, name: str, text: str) -> Match:
        match name:
            case "--ctstate":
                states = set(text.split(","))
                if not states <= {"NEW", "RELATED", "ESTABLISHED", "INVALID", "DNAT"}:
                    raise self._unknown(text)
                return lambda flight: (
                    ("INVALID" if flight.table == "raw" else "NEW") in states
                    or ("DNAT" in states and flight.translated)
                )
            case "--ctstatus" if text == "DNAT":
                return lambda flight: flight.translated
            case "--ctdir" if text == "ORIGINAL":
                return _always
            case "--ctorigdst":
                network = ip_network(text)
                return lambda flight: flight.packet.destination in network
            case "--ctorigdstport":
                return lambda flight: flight.packet.port == int(text)
            case "--ctproto" if text in _PROTOCOLS:
                return lambda flight: flight.packet.protocol == text
        raise self._unknown(f"{name} {text}")

    def _mark(self, options: Options) -> Match:
        negated, (text,) = options["--mark"]
        value, mask = _masked(text)
        return _not(lambda flight: flight.mark & mask == value, negated)

    def _connmark(self, options: Options) -> Match:
        negated, (text,) = options["--mark"]
        value, mask = _masked(text)
        return _not(lambda flight: flight.connection_mark & mask == value, negated)

    def _cluster(self, options: Options) -> Match:
        """Source hash: xt_cluster hashes the address of the original source."""
        given = {name: int(one, 0) for name, (_, (one,)) in options.items()}
        total, seed = given["--cluster-total-nodes"], given["--cluster-hash-seed"]
        if not 0 < total <= 32:
            raise self._unknown("cluster: total nodes")
        if "--cluster-local-nodemask" in given:
            mask = given["--cluster-local-nodemask"]
        else:
            mask = 1 << (given["--cluster-local-node"] - 1)
        if mask >= 1 << total:
            raise self._unknown("cluster: node")

        def do(flight: Flight) -> bool:
            if (seed, total) not in flight.hashed:
                shares = {node: Fraction(1, total) for node in range(total)}
                flight.hashed[seed, total] = flight.chance.pick(shares)
            return bool(mask >> flight.hashed[seed, total] & 1)

        return do

    def _target(self) -> Target:
        given = {name: arguments for name, (_, arguments) in self.target_options.items()}
        match self.target:
            case "DNAT":
                return self._dnat(given["--to-destination"][0])
            case "MARK" | "CONNMARK":
                if len(given) != 1:
                    raise self._unknown("mark")
                ((how, (text,)),) = given.items()
                return _marking(self.target == "CONNMARK", how, text)
            case "MASQUERADE":
                if self.table != "nat":
                    raise self._unknown("MASQUERADE outside nat")
                return _masquerade
            case "REJECT":
                if self.table != "filter":
                    raise self._unknown("REJECT outside filter")
                how = given.get("--reject-with", _REJECTIONS[self.family][:1])[0]
                if how not in _REJECTIONS[self.family]:
                    raise self._unknown(how)
                if how == "tcp-reset" and self.protocol != "tcp":
                    raise self._unknown("tcp-reset without -p tcp")
                return _reject
            case "DROP":
                if self.table == "nat":
                    raise self._unknown('The "nat" table is not intended for filtering')
                return lambda flight: "drop"
            case "ACCEPT":
                return lambda flight: "accept"
            case _:
                return lambda flight: "return"

    def _dnat(self, text: str) -> Target:
        place = re.fullmatch(r"(?:\[([0-9a-f:]+)\]|([0-9.]+)):([0-9]+)", text)
        if self.table != "nat" or not place or self.protocol not in ("tcp", "udp", "sctp"):
            raise self._unknown("DNAT")
        address = ip_address(place[1] or place[2])
        if address.version != self.family:
            raise self._unknown("DNAT to another family")

        def do(flight: Flight) -> str:
            if flight.hook not in ("PREROUTING", "OUTPUT"):
                raise NoSuchRule(f"DNAT in {flight.hook}")
            flight.destination, flight.port = address, int(place[3])
            flight.translated = True
            return "accept"

        return do


def _not(test: Match, negated: bool) -> Match:
    return (lambda flight: not test(flight)) if negated else test


def _always(flight: Flight) -> bool:
    return True


def _nothing(flight: Flight) -> str | None:
    return None


def _network(word: str, text: str, negated: bool, family: Family) -> Match:
    network = ip_network(text)
    if network.version != family:
        raise NoSuchRule(f"{text} is of another family")
    if word == "-s":
        return _not(lambda flight: flight.packet.source in network, negated)
    return _not(lambda flight: flight.destination in network, negated)


def _interface(word: str, name: str, negated: bool) -> Match:
    if len(name) > 15:
        raise NoSuchRule(f"interface name too long: {name}")

    def do(flight: Flight) -> bool:
        if word == "-i" and flight.hook == "POSTROUTING":
            raise NoSuchRule("-i in POSTROUTING: what it sees there depends on the kernel's age")
        here = flight.interface if word == "-i" else flight.out_interface
        return here.startswith(name[:-1]) if name.endswith("+") else here == name

    return _not(do, negated)


def _is_protocol(protocol: str, negated: bool) -> Match:
    return _not(lambda flight: flight.packet.protocol == protocol, negated)


def _ports(name: str, text: str, negated: bool) -> Match:
    first, colon, last = text.partition(":")
    low, high = int(first), int(last if colon else first)
    if not 0 <= low <= high < 65536:
        raise NoSuchRule(f"{text} is no port")
    if name == "--sport":
        return _not(lambda flight: low <= flight.packet.source_port <= high, negated)
    return _not(lambda flight: low <= flight.port <= high, negated)


def _local(source: bool) -> Match:
    return lambda flight: (flight.packet.source if source else flight.destination) in flight.own


def _looked_up(flight: Flight, kind: str, side: str, of: str) -> Address | tuple[str, int]:
    if kind == "port":
        port = flight.port if side == "dst" else flight.packet.source_port
        return ("" if of == "bitmap:port" else flight.packet.protocol, port)
    return flight.destination if side == "dst" else flight.packet.source


def _masked(text: str) -> tuple[int, int]:
    value, slash, mask = text.partition("/")
    return int(value, 0), int(mask, 0) if slash else _WORLD


def _marking(connection: bool, how: str, text: str) -> Target:
    value, mask = _masked(text)
    match how:
        case "--set-xmark":  # clears the bits of the mask, then flips those of the value
            cleared, flipped = mask, value
        case "--set-mark":
            cleared, flipped = mask | value, value
        case "--or-mark":
            cleared, flipped = value, value
        case "--xor-mark":
            cleared, flipped = 0, value
        case _:
            cleared, flipped = ~value & _WORLD, 0

    def do(flight: Flight) -> None:
        if connection:
            assert flight.table != "raw", "no connection there yet"
            flight.connection_mark = flight.connection_mark & ~cleared & _WORLD ^ flipped
        else:
            flight.mark = flight.mark & ~cleared & _WORLD ^ flipped

    return do


def _masquerade(flight: Flight) -> str:
    if flight.hook != "POSTROUTING":
        raise NoSuchRule(f"MASQUERADE in {flight.hook}")
    flight.masqueraded = True
    return "accept"


def _reject(flight: Flight) -> str:
    if flight.hook not in ("INPUT", "FORWARD", "OUTPUT"):
        raise NoSuchRule(f"REJECT in {flight.hook}")
    return "reject"
