"""Names of things: namespaced names, service port names, protocols, addresses.

Lives here: the small value types that every other module speaks in, and their spellings.
Must not: know objects, files, the kernel. Imports nothing of vipd but errors.
"""

from enum import IntEnum, StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from msgspec import Struct

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Family(IntEnum):
    """An IP family. The value is the version number in the IP header."""

    IPV4 = 4
    IPV6 = 6

    def __str__(self) -> str:
        return "IPv4" if self is Family.IPV4 else "IPv6"


class Protocol(StrEnum):
    """A transport protocol that a service port can have, spelled as in the Kubernetes API."""

    TCP = "TCP"
    UDP = "UDP"
    SCTP = "SCTP"

    def __str__(self) -> str:
        return self.value


class NamespacedName(Struct, frozen=True, order=True):
    """Namespace and name of an object; prints as ``namespace/name``."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class ServicePortName(Struct, frozen=True, order=True):
    """A port of a service. `port` is the port's name, empty for the one unnamed port.

    TCP and UDP ports of one name are different: the protocol is part of the name (kube-proxy's
    ServicePortName).
    """

    service: NamespacedName
    port: str
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.service}:{self.port}" if self.port else str(self.service)


@lru_cache(maxsize=1 << 17)
def parse_address(text: str) -> Address:
    """Return the address; raise ValueError where `text` is none.

    Cached, because the same endpoint stands in many slices and an address object takes a
    microsecond to make.
    """
    return ip_address(text)


def parse_network(text: str) -> Network:
    """Return the network of a CIDR; bits behind the prefix are dropped. Raise ValueError.

    White space around it is allowed, as the API server allows it in loadBalancerSourceRanges.
    """
    return ip_network(text.strip(), strict=False)


def family_of(address: Address | Network) -> Family:
    """Return the IP family of an address or network."""
    return Family.IPV4 if address.version == 4 else Family.IPV6
