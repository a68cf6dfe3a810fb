"""hosts(5): addresses with their names.

Lives here: reading its text. Pure. Must not: open a file (sources.py), or answer (static.py).
"""

from ipaddress import ip_address
from typing import NamedTuple

from vipd.dns import names
from vipd.proxy.names import Address


class Host(NamedTuple):
    """One address and one of its names."""

    address: Address
    name: bytes
    """Wire form, lower case."""


class Hosts(NamedTuple):
    """What a text says. An address stands with its names in the order of the text."""

    hosts: tuple[Host, ...]
    left_out: tuple[tuple[int, str], ...]
    """Number of a line, and why it, or a part of it, was not taken."""


def parse_hosts(text: str) -> Hosts:
    """Read lines of ADDRESS NAME…; # begins a comment. What is wrong is left out, and said."""
    hosts: list[Host] = []
    left_out: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            address = ip_address(words[0].partition("%")[0])
        except ValueError:
            left_out.append((number, f"{words[0]!r} is no IP address"))
            continue
        if len(words) == 1:
            left_out.append((number, f"{words[0]} has no name"))
        for word in words[1:]:
            try:
                hosts.append(Host(address, names.wire(word)))
            except ValueError as error:
                left_out.append((number, str(error)))
    return Hosts(tuple(hosts), tuple(left_out))
