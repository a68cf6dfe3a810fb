"""The statements of nft rules that vipd writes, each with what it does to a packet.

Any other statement is refused, so a new shape of rule in the compiler needs a line here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import NamedTuple, Protocol

from vipd.proxy.names import Address, Family


class NoSuchStatement(Exception):
    """A rule holds something that this model does not know."""


class Packet(NamedTuple):
    """The first packet of a flow. `interface` is where it comes in, empty for the node's own."""

    family: Family
    interface: str
    source: Address
    destination: Address
    protocol: str
    port: int
    source_port: int = 40000
    syn: bool = True
    """Of TCP: SYN and none of ACK, RST, FIN; else some packet in mid-stream."""
    mark: int = 0


class Lookup(Protocol):
    """Sets and maps, as a running packet sees them."""

    def get(self, container: str, key: str) -> str | None:
        """Return the value (empty in a set), or None where the key is not in it."""

    def interval(self, container: str, key: str) -> bool:
        """Return whether a set of ranges holds the key."""

    def update(self, container: str, key: str, value: str | None) -> None:
        """Remember the value, or forget the key."""


@dataclass
class Flight:
    """A packet on its way: what it is now, what was decided, and which way choices go."""

    packet: Packet
    own: frozenset[Address]
    held: Lookup
    choices: list[int]
    """For each choice met so far which way it went; more are appended as they are met."""
    widths: list[int] = field(default_factory=list)
    destination: Address = field(init=False)
    port: int = field(init=False)
    mark: int = field(init=False)
    connection_mark: int = 0
    priority: str = "none"
    translated: bool = False
    masqueraded: bool = False

    def __post_init__(self) -> None:
        self.destination, self.port = self.packet.destination, self.packet.port
        self.mark = self.packet.mark

    def choose(self, width: int) -> int:
        """Return the next choice of `width` ways; the first way if it was not said which."""
        place = len(self.widths)
        self.widths.append(width)
        if place == len(self.choices):
            self.choices.append(0)
        return self.choices[place]

    def value(self, name: str) -> str:
        """Return a field of the packet as nft prints it."""
        packet = self.packet
        family, _, rest = name.partition(" ")
        if family in ("ip", "ip6"):
            assert (family == "ip6") == (packet.family is Family.IPV6), name
            return str(packet.source if rest == "saddr" else self.destination)
        match name:
            case "meta l4proto":
                return packet.protocol
            case "th dport":
                return str(self.port)
            case "th sport":
                return str(packet.source_port)
            case _:
                return self.priority

    def key(self, expression: str) -> str:
        """Return the value of a concatenation."""
        return " . ".join(map(self.value, expression.split(" . ")))


Result = bool | str
"""True: go on with the rule; False: the rule does not match; a text: the verdict."""
Statement = Callable[[Flight], Result]
FIELD = r"(?:ip6? [sd]addr|meta l4proto|th [sd]port|meta priority)"
KEY = rf"({FIELD}(?: \. {FIELD})*)"
NAME = r"([A-Za-z][A-Za-z0-9/_.-]*)"
Groups = tuple[str, ...]


def _protocols(groups: Groups) -> Statement:
    allowed = groups[0].split(", ")
    return lambda flight: flight.packet.protocol in allowed


def _not_a_syn(groups: Groups) -> Statement:
    return lambda flight: flight.packet.protocol == "tcp" and not flight.packet.syn


def _mark_flow(groups: Groups) -> Statement:
    kept, new = (int(one, 16) for one in groups)
    assert kept & new == 0, "keeps what others wrote"

    def do(flight: Flight) -> Result:
        flight.connection_mark = flight.connection_mark & kept | new
        return True

    return do


def _flow_marked(groups: Groups) -> Statement:
    mask, wanted = (int(one, 16) for one in groups)
    return lambda flight: flight.connection_mark & mask == wanted


def _mark(groups: Groups) -> Statement:
    bit = int(groups[1], 16)

    def do(flight: Flight) -> Result:
        flight.mark = flight.mark | bit if groups[0] == "or" else flight.mark ^ bit
        return True

    return do


def _marked(groups: Groups) -> Statement:
    mask, wanted = (int(one, 16) for one in groups)
    return lambda flight: flight.mark & mask == wanted


def _vmap(groups: Groups) -> Statement:
    return lambda flight: flight.held.get(groups[1], flight.key(groups[0])) or False


def _member(groups: Groups) -> Statement:
    key, negated, name = groups

    def do(flight: Flight) -> Result:
        text = flight.key(key)
        found = (
            flight.held.interval(name, text)
            if name == "allowed-sources"
            else flight.held.get(name, text) is not None
        )
        return found is not bool(negated)

    return do


def _networks(groups: Groups) -> Statement:
    name, negated, text = groups
    inside = [ip_network(one) for one in text.strip("{ }").split(", ")]
    return lambda flight: (
        any(ip_address(flight.value(name)) in one for one in inside) is not bool(negated)
    )


def _interface(groups: Groups) -> Statement:
    negated, name = groups

    def do(flight: Flight) -> Result:
        came = flight.packet.interface
        same = came.startswith(name[:-1]) if name.endswith("*") else came == name
        return same is not bool(negated)

    return do


def _local(groups: Groups) -> Statement:
    return lambda flight: (
        (flight.packet.source if groups[0] == "saddr" else flight.destination) in flight.own
    )


def _dnat(groups: Groups) -> Statement:
    word, key, name = groups

    def do(flight: Flight) -> Result:
        assert (word == "ip6") == (flight.packet.family is Family.IPV6)
        target = flight.held.get(name, flight.key(key))
        if target is None:
            return False
        address, port = target.split(" . ")
        flight.destination, flight.port = ip_address(address), int(port)
        flight.translated = True
        return "accept"

    return do


def _priority(groups: Groups) -> Statement:
    def do(flight: Flight) -> Result:
        flight.priority = groups[0]
        return True

    return do


def _priority_from_map(groups: Groups) -> Statement:
    def do(flight: Flight) -> Result:
        found = flight.held.get(groups[1], flight.key(groups[0]))
        if found is None:
            return False
        flight.priority = found
        return True

    return do


def _choice(groups: Groups) -> Statement:
    width, offset = int(groups[-2]), int(groups[-1])

    def do(flight: Flight) -> Result:
        number = offset + flight.choose(width)
        flight.priority = f"{number >> 16:x}:{number & 0xFFFF:x}"
        return True

    return do


def _known(groups: Groups) -> Statement:
    return lambda flight: flight.priority != "none"


def _remember(groups: Groups) -> Statement:
    verb, name, key = groups[0], groups[1], groups[2]

    def do(flight: Flight) -> Result:
        flight.held.update(name, flight.key(key), flight.priority if verb == "update" else None)
        return True

    return do


def _masquerade(groups: Groups) -> Statement:
    def do(flight: Flight) -> Result:
        flight.masqueraded = True
        return "accept"

    return do


def _true(groups: Groups) -> Statement:
    return lambda flight: True


def _false(groups: Groups) -> Statement:
    return lambda flight: False


def _translated(groups: Groups) -> Statement:
    return lambda flight: flight.translated


def _reset(groups: Groups) -> Statement:
    return lambda flight: groups[1] if flight.packet.protocol == groups[0] else False


def _verdict(groups: Groups) -> Statement:
    return lambda flight: groups[0]


_KNOWN: tuple[tuple[re.Pattern[str], Callable[[Groups], Statement]], ...] = tuple(
    (re.compile(rf"(?:{pattern})(?: |$)"), make)
    for pattern, make in (
        (r"meta l4proto \{ ([a-z, ]+) \}", _protocols),
        (r"meta l4proto (tcp) (reject) with tcp reset", _reset),
        (r"meta l4proto tcp tcp flags & \(fin \| syn \| rst \| ack\) != syn", _not_a_syn),
        (r"ct mark set ct mark and (0x[0-9a-f]{8}) or (0x[0-9a-f]{8})", _mark_flow),
        (r"ct mark and (0x[0-9a-f]{8}) == (0x[0-9a-f]{8})", _flow_marked),
        (r"ct mark 0x7fffffff counter", _false),
        (r"ct state new", _true),
        (r"ct state invalid [^@]* drop", _false),
        (r"ct status dnat", _translated),
        (r"meta mark set meta mark (or|xor) (0x[0-9a-f]+)", _mark),
        (r"meta mark and (0x[0-9a-f]+) == (0x[0-9a-f]+)", _marked),
        (rf"{KEY} vmap @{NAME}", _vmap),
        (r"meta priority set (none|[0-9a-f]+:[0-9a-f]+)", _priority),
        (rf"meta priority set {KEY} map @{NAME}", _priority_from_map),
        (r"meta priority set numgen (random|inc) mod ([0-9]+) offset ([0-9]+)", _choice),
        (
            rf"meta priority set jhash {KEY} mod ([0-9]+) seed 0x[0-9a-f]+ offset ([0-9]+)",
            _choice,
        ),
        (r"meta priority != none", _known),
        (
            rf"(update) @{NAME} \{{ (ip6? saddr) timeout ([1-9][0-9]*)s : meta priority \}}",
            _remember,
        ),
        (rf"(delete) @{NAME} \{{ (ip6? saddr) : meta priority \}}", _remember),
        (rf"dnat (ip6?) to {KEY} map @{NAME}", _dnat),
        (r"fib (saddr|daddr) type local", _local),
        (r'iifname ()"([^"]+)"', _interface),
        (r'iifname (!=) "([^"]+)"', _interface),
        (rf"{KEY} (!= )?@{NAME}", _member),
        (r"(ip6? [sd]addr) (!= )?(\{ [0-9a-f:./, ]+ \}|[0-9a-f:.]+(?:/[0-9]+)?)", _networks),
        (r"masquerade fully-random", _masquerade),
        (rf"((?:goto|jump) {NAME[1:-1]}|accept|drop|return|reject)", _verdict),
    )
)


@lru_cache(maxsize=4096)
def parse(text: str) -> tuple[Statement, ...]:
    """Return what a rule does, statement after statement; refuse what is not known."""
    made = []
    rest = text
    while rest:
        for pattern, make in _KNOWN:
            match = pattern.match(rest)
            if match:
                made.append(make(tuple(one or "" for one in match.groups())))
                rest = rest[match.end() :]
                break
        else:
            raise NoSuchStatement(f"{rest!r} in {text!r}")
    return tuple(made)


@lru_cache(maxsize=4096)
def references(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the chains and the containers that a rule names; refuse what is not known."""
    parse(text)
    chains = re.findall(rf"\b(?:goto|jump) {NAME}", text)
    return tuple(chains), tuple(re.findall(rf"@{NAME}", text))
