"""An upstream: its address, and how one is written.

Lives here: that value type and its spelling. Pure. Must not: know how an upstream
does (standing.py).
"""

from ipaddress import IPv6Address, ip_address
from typing import NamedTuple

DNS_PORT = 53


class Upstream(NamedTuple):
    """A name server that is asked. Prints as it is written."""

    address: str
    """Without brackets; a link-local IPv6 address with its interface: ``fe80::1%eth0``."""
    port: int = DNS_PORT
    tcp: bool = False
    """Whether it is asked over TCP only."""

    @property
    def is_ipv6(self) -> bool:
        """Its family."""
        return ":" in self.address

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.is_ipv6 else self.address
        return f"{'tcp://' if self.tcp else ''}{host}:{self.port}"


def parse_upstream(text: str) -> Upstream:
    """Read ``ADDRESS``, ``ADDRESS:PORT`` or ``[ADDRESS]:PORT``, after ``tcp://`` for TCP only.

    Raise ValueError. A name is none: it would have to be resolved by whom it names.
    """
    rest = text.strip()
    tcp = rest.startswith("tcp://")
    rest = rest.removeprefix("tcp://").removeprefix("udp://")
    host, port = rest, ""
    if rest.startswith("["):
        host, closed, port = rest[1:].partition("]")
        if not closed or (port and not port.startswith(":")):
            raise ValueError(f"{text!r} is no [ADDRESS]:PORT")
        port = port[1:] if port else ""
        if rest.endswith(":"):
            raise ValueError(f"{text!r} has no port behind the colon")
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
        if not port:
            raise ValueError(f"{text!r} has no port behind the colon")
    return Upstream(_address(host, text), _port(port, text), tcp)


def _address(host: str, text: str) -> str:
    try:
        address = ip_address(host)
    except ValueError:
        raise ValueError(f"{text!r} is no IP address, alone or with a port") from None
    if address.is_unspecified or address.is_multicast:
        raise ValueError(f"{text!r} is no address of a server")
    if isinstance(address, IPv6Address) and address.is_link_local and address.scope_id is None:
        raise ValueError(f"{text!r} needs its interface, as in fe80::1%eth0")
    return str(address)


def _port(port: str, text: str) -> int:
    if not port:
        return DNS_PORT
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise ValueError(f"{text!r} has no port from 1 to 65535")
    return int(port)
