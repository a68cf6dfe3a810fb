"""What IPVS mode keeps in the kernel, as values: each is a thing and what is said of it.

Lives here: the things, how they read as text (ipvsadm-restore, ip-route, ipset), and operations on
them. Must not: know services (compile.py) or talk to the kernel (driver.py, messages.py).
"""

from typing import Literal, NamedTuple

from vipd.backends.ipvs.schedulers import Scheduler
from vipd.proxy.names import Address, Family, Protocol

ROUTE_PROTOCOL = 118
"""Protocol number of our routes ("v"); iproute2's list of names leaves 118 free."""
HAIRPIN, SERVED, GUARDED = "HAIRPIN", "SERVED", "ADDRESSES"
MASQUERADED, CLUSTER, FROM_NODE = "MASQUERADE", "CLUSTER", "FROM-NODE"
REJECTED, DROPPED, INSIDE = "REJECT", "DROP", "INSIDE"
RESTRICTED, SOURCES = "RESTRICTED", "SOURCES"

SETS = {
    SERVED: "hash:ip,port",
    GUARDED: "hash:ip",
    HAIRPIN: "hash:ip,port,ip",
    MASQUERADED: "hash:ip,port",
    CLUSTER: "hash:ip,port",
    FROM_NODE: "hash:ip,port",
    REJECTED: "hash:ip,port",
    DROPPED: "hash:ip,port",
    INSIDE: "hash:ip,port",
    RESTRICTED: "hash:ip,port",
    SOURCES: "hash:ip,port,net",
}
"""Every set with its ipset type; docs/ipvs.md says what each is for. `SERVED` is also the record of
what is ours: a virtual server that is not in it belongs to another program."""
_PREFIX = {Family.IPV4: "VIPD-IPVS-", Family.IPV6: "VIPD6-IPVS-"}


def set_name(family: Family, name: str) -> str:
    """Return the name that a set has in the kernel."""
    return _PREFIX[family] + name


class Route(NamedTuple):
    """A local route to one address; its value is the preferred source, or empty."""

    family: Family
    address: Address

    def __str__(self) -> str:
        six = "-6 " if self.family is Family.IPV6 else ""
        return f"ip {six}route {{}} local {self.address} dev lo table local proto {ROUTE_PROTOCOL}"


class Member(NamedTuple):
    """An element of one of the sets, as ipset spells it; its value is empty."""

    family: Family
    set: str
    text: str

    def __str__(self) -> str:
        return f"ipset {{}} {set_name(self.family, self.set)} {self.text}"


class Service(NamedTuple):
    """What the kernel calls a service: a virtual server's address; its value is a `Manner`."""

    family: Family
    protocol: Protocol
    address: Address
    port: int

    def __str__(self) -> str:
        flag = {Protocol.TCP: "-t", Protocol.UDP: "-u", Protocol.SCTP: "--sctp-service"}
        return f"{flag[self.protocol]} {place(self.address, self.port)}"


class Destination(NamedTuple):
    """A real server of a service; its value is the weight."""

    service: Service
    address: Address
    port: int

    def __str__(self) -> str:
        return f"{self.service} -r {place(self.address, self.port)} -m"


class Manner(NamedTuple):
    """How a service balances: scheduler, and seconds of persistence (0: none)."""

    scheduler: Scheduler
    persistence: int = 0

    def __str__(self) -> str:
        return f"-s {self.scheduler}" + (f" -p {self.persistence}" if self.persistence else "")


Thing = Route | Member | Service | Destination
Value = str | Manner | int
"""Of a route its source, of a member nothing (an empty text), of a service its manner, of a
destination its weight."""


class Verb(NamedTuple):
    """What is done to a thing: the letter of ipvsadm and the word of ip and ipset."""

    letter: str
    word: Literal["add", "replace", "del"]


ADD, SET, DELETE = Verb("a", "add"), Verb("e", "replace"), Verb("d", "del")


class Operation(NamedTuple):
    """One message to the kernel. `value` is what the thing is afterwards (of DELETE: was)."""

    verb: Verb
    thing: Thing
    value: Value

    def __str__(self) -> str:
        thing, value, verb = self.thing, self.value, self.verb
        gone = verb is DELETE
        if isinstance(thing, Service):
            return f"-{verb.letter.upper()} {thing}" + ("" if gone else f" {value}")
        if isinstance(thing, Destination):
            if gone:
                return f"-d {thing}".removesuffix(" -m")
            return f"-{verb.letter} {thing} -w {value}"
        if isinstance(thing, Route):
            return str(thing).format(verb.word) + (f" src {value}" if value and not gone else "")
        return str(thing).format(verb.word)


def place(address: Address, port: int) -> str:
    """Return ``address:port``, IPv6 in brackets."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def member_text(address: Address, protocol: Protocol, port: int, other: object = "") -> str:
    """Return an element of a set that starts with address and port, as ipset prints it."""
    text = f"{address},{protocol.lower()}:{port}"
    return f"{text},{other}" if other else text
