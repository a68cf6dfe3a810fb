"""What userspace mode keeps, as values: the places that workers listen at, and how each forwards.

Lives here: the values that the daemon and its workers share. Pure. Must not: know services
(compile.py), sockets (driver.py) or connections (forwarder/).
"""

from collections.abc import Iterator
from typing import NamedTuple

from msgspec import Struct

from vipd.proxy.model import Algorithm
from vipd.proxy.names import Address, Family, Network, Protocol
from vipd.proxy.virtualserver import Endpoint

ROUTE_PROTOCOL = 119
"""Protocol number of our routes, next to that of IPVS mode; iproute2's names leave it free."""
TABLE = "vipd-userspace"
SERVED, REFUSED, DROPPED, INSIDE = "served", "refused", "dropped", "inside-only"
RESTRICTED, ALLOWED, ADDRESSES = "restricted", "allowed-sources", "addresses"
"""The sets of the table; rules.py says what each is for."""


class Route(NamedTuple):
    """A local route to one address; its value is the preferred source, or empty."""

    family: Family
    address: Address


class Element(NamedTuple):
    """An element of one of the sets, as nft spells it; its value is empty."""

    family: Family
    set: str
    text: str


class Place(NamedTuple):
    """Where workers listen: an address of this node, by a local route or its own, and a port."""

    family: Family
    protocol: Protocol
    address: Address
    port: int

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.family is Family.IPV6 else str(self.address)
        return f"{host}:{self.port}/{self.protocol}"

    @property
    def key(self) -> str:
        """Return it as an element of a set: address, protocol, port."""
        return f"{self.address} . {self.protocol.lower()} . {self.port}"


class ReturnPath(NamedTuple):
    """What lets answers to transparent connections arrive; its value is the packet mark, in hex."""

    family: Family


class Forwarding(Struct, frozen=True, kw_only=True):
    """How workers serve a place.

    Endpoints have address, port and weight; what else is known of them is left out, so that it
    changes nothing here.
    """

    owner: str
    """``namespace/name:port`` of the service, for logs and counters."""
    inside: tuple[Endpoint, ...]
    """For sources inside: pods of this node, and the node itself. Sorted by address and port."""
    outside: tuple[Endpoint, ...]
    """For every other source; the same as `inside` but for external policy Local."""
    algorithm: Algorithm = Algorithm.RANDOM
    affinity_seconds: int | None = None
    """How long a client stays with its endpoint after its last new connection; None: not at all."""
    allowed_sources: tuple[Network, ...] | None = None
    """Who may connect at all; None is everyone."""
    sets_aside: bool = True
    """Whether endpoints that refuse or time out are set aside for a while."""
    proxy_protocol: bool = False
    """Whether endpoints are told the client's address first, by PROXY protocol version 2."""
    transparent: tuple[Address, ...] = ()
    """Addresses of endpoints that are connected to from the client's own address."""
    transparent_for_pods: bool = False
    """Whether they are so only where the client is a pod."""

    def __str__(self) -> str:
        told = [f"{self.algorithm} to {_listed(self.inside)}"]
        if self.outside != self.inside:
            told.append(f"from outside to {_listed(self.outside)}")
        return ", ".join((*told, *self.options))

    @property
    def options(self) -> Iterator[str]:
        """What is otherwise than usual, in words."""
        if self.affinity_seconds is not None:
            yield f"affinity {self.affinity_seconds} s"
        if self.allowed_sources is not None:
            yield f"from {' '.join(map(str, self.allowed_sources)) or 'nowhere'} only"
        if not self.sets_aside:
            yield "failing endpoints stay"
        if self.proxy_protocol:
            yield "PROXY protocol"
        if self.transparent:
            whom = "pods" if self.transparent_for_pods else "clients"
            yield f"addresses of {whom} shown to {' '.join(map(str, self.transparent))}"

    @property
    def is_alone(self) -> bool:
        """Whether one worker has to serve all of it: it remembers what the others would not know.

        Affinity, turns and numbers of connections are exact only where one process sees them all.
        """
        return self.affinity_seconds is not None or self.algorithm in _COUNTING


_COUNTING = (Algorithm.ROUND_ROBIN, Algorithm.LEAST_CONNECTIONS)


class Surroundings(Struct, frozen=True):
    """What of the node decides about sources: who is inside, and who is the node itself."""

    pods: tuple[Network, ...] = ()
    """Ranges of this cluster's pods, as far as the node knows them."""
    own: tuple[Address, ...] = ()
    """Addresses of this node."""
    interface: str = ""
    """Where pods come in, if they are told by that: a name, or a prefix that ends in ``*``."""

    def __str__(self) -> str:
        pods, own = (" ".join(map(str, some)) or "unknown" for some in (self.pods, self.own))
        by = f"by {self.interface}" if self.interface else pods
        return f"pods {by}, own addresses {own}"


Thing = Route | Element | Place | ReturnPath
Value = str | Forwarding
"""Of a route its source, of an element nothing (an empty text), of a place its forwarding, of a
return path its mark."""


def _listed(endpoints: tuple[Endpoint, ...]) -> str:
    if not endpoints:
        return "nobody"
    return " ".join(f"{one}×{one.weight}" if one.weight != 1 else str(one) for one in endpoints)
