"""A model of ipset: takes its commands, refuses what it would refuse, and matches packets.

Lives here: sets, their members and lookups. Written from ipset(8) and the kernel's
net/netfilter/ipset, not from the backends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from tests.properties.kernel import Refused

from vipd.proxy.names import Address, Family, Network

Part = Address | Network | tuple[str, int]
Member = tuple[Part, ...]

TYPES = {
    "hash:ip": ("ip",),
    "hash:net": ("net",),
    "bitmap:port": ("port",),
    "hash:ip,port": ("ip", "port"),
    "hash:net,port": ("net", "port"),
    "hash:ip,port,ip": ("ip", "port", "ip"),
    "hash:ip,port,net": ("ip", "port", "net"),
}
_NAME_LENGTH = 31
_NUMBERS = ("hashsize", "maxelem", "timeout", "bucketsize")
_WORDS = ("comment", "counters")


@dataclass
class IpSet:
    """A set and what is in it."""

    type: str
    family: Family
    limit: int = 65536
    members: set[Member] = field(default_factory=set)

    def parse(self, text: str) -> Member:
        """Return a member, refusing what would not be one, or would be printed otherwise."""
        parts = text.split(",")
        kinds = TYPES[self.type]
        if len(parts) != len(kinds):
            raise Refused(f"syntax error: {text} is no {self.type}")
        return tuple(self._part(kind, one) for kind, one in zip(kinds, parts, strict=True))

    def holds(self, looked_up: Sequence[Address | tuple[str, int]]) -> bool:
        """Return whether it holds what a packet has in its dimensions."""
        kinds = TYPES[self.type]
        assert len(looked_up) == len(kinds)
        if "net" not in kinds:
            return tuple(looked_up) in self.members
        return any(
            all(
                here in there if kind == "net" else here == there  # type: ignore[operator]
                for kind, here, there in zip(kinds, looked_up, member, strict=True)
            )
            for member in self.members
        )

    def _part(self, kind: str, text: str) -> Part:
        if kind == "port":
            if self.type == "bitmap:port":
                return ("", int(text))
            protocol, colon, number = text.partition(":")
            if not colon or protocol not in ("tcp", "udp", "sctp") or not 0 < int(number) < 65536:
                raise Refused(f"syntax error: {text} is no port")
            return (protocol, int(number))
        if kind == "ip":
            address = ip_address(text)
            if address.version != self.family or str(address) != text:
                raise Refused(f"syntax error: {text} is no address of the set's family")
            return address
        network = ip_network(text)
        if network.version != self.family:
            raise Refused(f"syntax error: {text} is of another family")
        if network.prefixlen == 0:  # ip_set_hash_*net*.c: IPSET_ERR_INVALID_CIDR
            raise Refused(f"The value of the CIDR parameter of the IP address is invalid: {text}")
        return network


class IpSets:
    """All sets of a network namespace."""

    def __init__(self) -> None:
        self.by_name: dict[str, IpSet] = {}

    def run(self, line: str, used: frozenset[str] = frozenset()) -> None:
        """Do one command (without the word ipset); sets that rules use cannot be destroyed."""
        words = line.split()
        exist = "-exist" in words
        words = [one for one in words if one not in ("-exist", "-!")]
        match words:
            case ["create", name, kind, *options]:
                self._create(name, kind, options, exist)
            case ["add", name, text, *options]:
                held = self._need(name)
                if options and (options[0] not in ("timeout", "comment") or len(options) != 2):
                    raise Refused(f"unknown option: {line}")
                member = held.parse(text)
                if member in held.members and not exist:
                    raise Refused(f"Element cannot be added to the set: it's already added: {line}")
                held.members.add(member)
                if len(held.members) > held.limit:
                    raise Refused(f"Set is full, maxelem {held.limit} reached")
            case ["del", name, text]:
                held = self._need(name)
                member = held.parse(text)
                if member not in held.members and not exist:
                    raise Refused(f"Element cannot be deleted from the set: it's not added: {line}")
                held.members.discard(member)
            case ["flush", name]:
                self._need(name).members.clear()
            case ["swap", one, other]:
                first, second = self._need(one), self._need(other)
                if (first.type, first.family) != (second.type, second.family):
                    raise Refused("The sets cannot be swapped: their type does not match")
                self.by_name[one], self.by_name[other] = second, first
            case ["destroy", name]:
                self._need(name)
                if name in used:
                    raise Refused("Set cannot be destroyed: it is in use by a kernel component")
                del self.by_name[name]
            case _:
                raise Refused(f"no command: {line}")

    def _need(self, name: str) -> IpSet:
        if name not in self.by_name:
            raise Refused(f"The set with the given name does not exist: {name}")
        return self.by_name[name]

    def _create(self, name: str, kind: str, options: list[str], exist: bool) -> None:
        if len(name) > _NAME_LENGTH:
            raise Refused(f"Setname '{name}' is longer than {_NAME_LENGTH} characters")
        if kind not in TYPES:
            raise Refused(f"unknown type: {kind}")
        made = IpSet(kind, Family.IPV4)
        rest = list(options)
        while rest:
            word = rest.pop(0)
            if word == "family":
                made.family = {"inet": Family.IPV4, "inet6": Family.IPV6}[rest.pop(0)]
            elif word in _NUMBERS:
                number = int(rest.pop(0))
                made.limit = number if word == "maxelem" else made.limit
            elif word == "range" and kind == "bitmap:port":
                rest.pop(0)
            elif word not in _WORDS:
                raise Refused(f"unknown option: {word}")
        held = self.by_name.setdefault(name, made)
        if held is not made:
            if not exist:
                raise Refused(
                    f"Set cannot be created: set with the same name already exists: {name}"
                )
            if (held.type, held.family, held.limit) != (made.type, made.family, made.limit):
                raise Refused(f"Set cannot be created: another type: {name}")
