"""The names of one Service, and what stands at each.

Lives here: DNS-based service discovery 1.1.0 (2.3 ClusterIP, 2.4 headless, 2.5 ExternalName).
Records are made when they are asked for: a service that nobody asks for costs its facts. Pure.
Must not: know the cluster domain (the caller's `origin` has it), other services, or messages.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import chain

from vipd.dns.facts import EndpointFacts, Kind, Port, ServiceFacts
from vipd.dns.names import LONGEST_NAME, address_in, dashed, wire
from vipd.dns.prebuilt import Source
from vipd.dns.records import EMPTY, Node, Owned, RRset, Type, address_sets, of_type, srv

MOST_WITH_ADDRESSES = 512
"""SRV records: with more than these, the addresses of their targets fit no message."""

_PROTOCOLS = {b"_tcp": "tcp", b"_udp": "udp", b"_sctp": "sctp"}
_NOBODY: frozenset[bytes] = frozenset()
_ADDRESS_TYPES = (Type.A, Type.AAAA)


class ServiceNames(Source):
    """A Service as names. `key` is its name and its namespace's, as labels."""

    __slots__ = (
        "_endpoints",
        "_external_name",
        "_hosts",
        "_plain",
        "_ports",
        "addresses",
        "key",
        "kind",
    )

    def __init__(self, key: bytes, facts: ServiceFacts) -> None:
        super().__init__()
        self.key = key
        self.take(facts)

    def take(self, facts: ServiceFacts) -> None:
        """Be another Service of the same name from now on."""
        self.kind = facts.kind
        self._external_name = facts.external_name
        self._ports = _shared(facts.ports)
        self._endpoints = facts.endpoints
        self.addresses: tuple[bytes, ...] = facts.cluster_ips
        """Each once: cluster IPs, or the ready endpoints."""
        if facts.endpoints:
            every = chain.from_iterable([group.addresses for group in facts.endpoints])
            self.addresses = tuple(dict.fromkeys(every))
        self._hosts: dict[bytes, tuple[bytes, ...]] | None = None
        self._plain: frozenset[bytes] = _NOBODY

    def has(self, facts: ServiceFacts) -> bool:
        """Return whether facts are those that it has."""
        return (
            self.kind is facts.kind
            and self._ports == facts.ports
            and self._endpoints == facts.endpoints
            and self._external_name == facts.external_name
            and (self.kind is Kind.HEADLESS or self.addresses == facts.cluster_ips)
        )

    @property
    def exists(self) -> bool:
        """Whether its name does: a headless Service without a ready endpoint has none (2.4.1)."""
        return bool(self.addresses) or self.kind is not Kind.HEADLESS

    def find(self, below: list[bytes], kind: int, origin: bytes, ttl: int) -> Node | None:
        """Return what stands at a name, None if there is no such name.

        `below` are the labels before the Service's own, the nearest first; `origin` is its name.
        """
        if not self.exists:
            return None
        if not below:
            return self._own(kind, origin, ttl)
        protocol = _PROTOCOLS.get(below[0])
        if protocol is not None:
            return self._port(protocol, below[1:], kind, origin, ttl)
        if len(below) == 1 and self.kind is Kind.HEADLESS:
            return self._endpoint(below[0], kind, ttl)
        return None

    def labels_of(self, packed: bytes) -> list[bytes]:
        """Return the labels under which an endpoint address stands."""
        hosts, plain = self._by_host()
        found = [dashed(packed)] if packed in plain else []
        return found + [label for label, addresses in hosts.items() if packed in addresses]

    def _own(self, kind: int, origin: bytes, ttl: int) -> Node:
        if self.kind is Kind.EXTERNAL:
            return self._alias(ttl)
        if kind in _ADDRESS_TYPES:
            data = of_type(self.addresses, kind)
            return Node(RRset(kind, ttl, data)) if data else EMPTY
        if kind == Type.SRV:
            # Beyond the specification: what finds its peers in a StatefulSet asks for SRV here.
            return self._srv(None, "", origin, ttl) or EMPTY
        return EMPTY

    def _alias(self, ttl: int) -> Node:
        with suppress(ValueError):
            return Node(RRset(Type.CNAME, ttl, (wire(self._external_name),)))
        return EMPTY

    def _endpoint(self, label: bytes, kind: int, ttl: int) -> Node | None:
        found = self._addresses_at(label)
        if not found:
            return None
        data = of_type(found, kind)
        return Node(RRset(kind, ttl, data)) if data else EMPTY

    def _addresses_at(self, label: bytes) -> tuple[bytes, ...]:
        hosts, plain = self._by_host()
        found = hosts.get(label, ())
        packed = address_in(label)
        # One spelling of an address is its name, the others are not.
        if packed in plain and packed is not None and dashed(packed) == label:
            return tuple(dict.fromkeys((*found, packed)))
        return found

    def _by_host(self) -> tuple[dict[bytes, tuple[bytes, ...]], frozenset[bytes]]:
        """Return the addresses of each hostname, and those that are named after themselves."""
        if self._hosts is None:
            hosts: dict[bytes, dict[bytes, None]] = {}
            plain: list[bytes] = []
            for group in self._endpoints:
                if not group.hostnames:
                    plain += group.addresses
                    continue
                for packed, hostname in zip(group.addresses, group.hostnames, strict=False):
                    if hostname:
                        hosts.setdefault(hostname.lower().encode(), {})[packed] = None
                    else:
                        plain.append(packed)
            self._hosts = {label: tuple(found) for label, found in hosts.items()}
            self._plain = frozenset(plain)
        return self._hosts, self._plain

    def _port(
        self, protocol: str, above: list[bytes], kind: int, origin: bytes, ttl: int
    ) -> Node | None:
        """Return what stands at _port._protocol, or at _protocol, the node above all of them."""
        if not above:
            every = self._all_ports()
            return EMPTY if any(name and its == protocol for name, its, _ in every) else None
        label = above[0]
        if len(above) > 1 or not label.startswith(b"_") or len(label) == 1:
            return None
        port = label[1:].decode("latin-1")
        if kind == Type.SRV:
            return self._srv(port, protocol, origin, ttl)
        return EMPTY if any(one[:2] == (port, protocol) for one in self._all_ports()) else None

    def _all_ports(self) -> Iterator[Port]:
        yield from self._ports
        for group in self._endpoints:
            yield from group.ports

    def _srv(self, port: str | None, protocol: str, origin: bytes, ttl: int) -> Node | None:
        """Return the SRV records of a port, or of all ports; None if there is none."""

        def numbers(ports: Iterable[Port]) -> list[int]:
            return [n for name, its, n in ports if port is None or (name, its) == (port, protocol)]

        targets: dict[tuple[int, bytes], None] = {}
        if self.kind is Kind.CLUSTER:
            targets = dict.fromkeys((number, origin) for number in numbers(self._ports))
        for group in self._endpoints:
            labels = _labels(group)
            for number in numbers(group.ports):
                targets.update(((number, b"%c%b%b" % (len(it), it, origin)), None) for it in labels)
        shown = [(number, target) for number, target in targets if len(target) <= LONGEST_NAME]
        if not shown:
            return None
        weight = max(1, 100 // len(shown))
        data = tuple([srv(weight, number, target) for number, target in shown])
        names = (
            dict.fromkeys(target for _, target in shown)
            if len(shown) <= MOST_WITH_ADDRESSES
            else ()
        )
        additional = [
            Owned(target, rrset)
            for target in names
            for rrset in address_sets(self._of_target(target, origin), ttl)
        ]
        return Node(RRset(Type.SRV, ttl, data), tuple(additional))

    def _of_target(self, target: bytes, origin: bytes) -> tuple[bytes, ...]:
        return self.addresses if target == origin else self._addresses_at(target[1 : 1 + target[0]])


def _labels(group: EndpointFacts) -> list[bytes]:
    if not group.hostnames:
        return [dashed(packed) for packed in group.addresses]
    pairs = zip(group.addresses, group.hostnames, strict=False)
    return [host.lower().encode() if host else dashed(packed) for packed, host in pairs]


@lru_cache(maxsize=1024)
def _shared(ports: tuple[Port, ...]) -> tuple[Port, ...]:
    """Return ports, the same object for equal ones: most Services have the ports of others."""
    return ports
