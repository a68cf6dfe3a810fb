"""What IPVS has counted and remembered for one packet.

Lives here: asking for the one virtual server that answers, and reading the list of connections.
Must not: change anything.
"""

import asyncio
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import NamedTuple

from vipd.backends.ipvs.compile import Program, things
from vipd.backends.ipvs.kernel import Kernel
from vipd.backends.ipvs.objects import Manner, Service, place
from vipd.backends.protocol import Known, Packet
from vipd.proxy.errors import DataplaneError
from vipd.proxy.names import Address, family_of, parse_address
from vipd.proxy.virtualserver import Endpoint, Key
from vipd.proxy.words import counted

CONNECTIONS = Path("/proc/thread-self/net/ip_vs_conn")
MOST_ENTRIES = 10


class Entry(NamedTuple):
    """A connection of IPVS, or (client port 0) the template that is its memory of a client."""

    client_port: int
    endpoint: Endpoint
    state: str
    seconds: str

    def __str__(self) -> str:
        which = f", source port {self.client_port}" if self.client_port else " of affinity"
        return f"IPVS entry{which}: to {self.endpoint}, {self.state}, {self.seconds} s left"


async def counters(program: Program, packet: Packet) -> Known:
    """Return what the virtual server and its real servers have counted, and the source's entries.

    The list of connections is read as a whole, since the kernel cannot give a part of it.
    """
    return await asyncio.to_thread(_known, program, packet)


def _known(program: Program, packet: Packet) -> Known:
    family = family_of(packet.destination)
    service = Service(family, packet.protocol, packet.destination, packet.port)
    lines = list(_usage(service))
    try:
        with CONNECTIONS.open(encoding="ascii") as listing:
            found = entries(listing, packet)
    except OSError as error:
        lines.append(f"IPVS's connections are not known: {CONNECTIONS}: {error.strerror}")
        return Known(tuple(lines))
    lines += [str(one) for one in found[:MOST_ENTRIES]]
    if len(found) > MOST_ENTRIES:
        lines.append(f"and {len(found) - MOST_ENTRIES} more")
    if not found:
        lines.append(f"IPVS has no entry of {packet.source} to this destination")
    memory = [one.endpoint for one in found if not one.client_port]
    persistent = bool(memory) and _is_persistent(program, service)
    return Known(tuple(lines), memory[0] if persistent else None)


def _usage(service: Service) -> Sequence[str]:
    where = f"IPVS {service.protocol} {place(service.address, service.port)}"
    try:
        told = Kernel().usage(service)
    except DataplaneError as error:
        return [f"counters are not known: {error}"]
    if told is None:
        return [f"{where} is no virtual server"]
    total, servers = told
    active, inactive = sum(one.active for one in servers), sum(one.inactive for one in servers)
    return [
        f"{where}: {counted(total, 'connection')} so far, {active} active, {inactive} inactive",
        *(
            f"{where}, real server {Endpoint(one.address, one.port)} of weight {one.weight}: "
            f"{counted(one.total, 'connection')} so far, {one.active} active, "
            f"{one.inactive} inactive"
            for one in servers
        ),
    ]


def _is_persistent(program: Program, service: Service) -> bool:
    """Return whether a template counts; without persistence the kernel does not look at it."""
    keys = [
        Key(service.family, address, service.protocol, service.port)
        for address in (service.address, None)
    ]
    manners = [things(program, key).get(service) for key in keys]
    return any(isinstance(one, Manner) and one.persistence for one in manners)


def entries(lines: Iterable[str], packet: Packet) -> list[Entry]:
    """Return the entries of the packet's source and destination, the template first.

    Format: ip_vs_conn_seq_show() in net/netfilter/ipvs/ip_vs_conn.c, 6.1: protocol, then address
    and port of client, virtual server and endpoint in hexadecimal, state, seconds left.
    """
    found = []
    for line in lines:
        fields = line.split()
        if len(fields) < 9 or fields[0] != packet.protocol.value:
            continue
        ports = [int(fields[at], 16) for at in (2, 4, 6)]
        if ports[1] != packet.port or _hexadecimal(fields[3]) != packet.destination:
            continue
        if _hexadecimal(fields[1]) == packet.source:
            endpoint = Endpoint(_hexadecimal(fields[5]), ports[2])
            found.append(Entry(ports[0], endpoint, fields[7], fields[8]))
    return sorted(found, key=lambda one: one.client_port)


def _hexadecimal(text: str) -> Address:
    """Return an address as IPVS prints it: eight digits, or IPv6 in full."""
    return parse_address(text) if ":" in text else IPv4Address(int(text, 16))
