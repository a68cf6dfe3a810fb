"""What the kernel knows of one packet's connections: the rest of `vipd explain --live`.

Lives here: which mode can tell what, and connection tracking. Must not: change anything, or list
more than what concerns the packet.
"""

import asyncio
import shutil
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address
from typing import Any

from vipd.backends.protocol import Packet
from vipd.proxy.names import Address, parse_address

MOST_FLOWS = 10
IPVS_ENTRIES = "/proc/net/ip_vs_conn"


async def known(mode: str, program: Any, packet: Packet) -> Sequence[str]:
    """Return what the kernel of this network namespace knows, a line each; needs root.

    nftables: counters, and the client that affinity remembers; IPVS: its entries. In every mode the
    flows of the same source to the same destination that connection tracking knows. What cannot be
    read is a line too.
    """
    lines: list[str] = []
    if mode == "nftables":
        from vipd.backends.nftables.live import counters

        lines += await counters(program, packet)
    if mode == "ipvs":
        lines += await asyncio.to_thread(_ipvs_entries, packet)
    return [*lines, *await _flows(packet)]


def _ipvs_entries(packet: Packet) -> Sequence[str]:
    try:
        with open(IPVS_ENTRIES, encoding="ascii") as entries:
            found = ipvs_entries(entries, packet)
    except OSError as error:
        return [f"IPVS entries are not known: {IPVS_ENTRIES}: {error.strerror}"]
    return found or [f"IPVS has no entry of {packet.source} to this destination"]


def ipvs_entries(lines: Iterable[str], packet: Packet) -> Sequence[str]:
    """Return the entries of the packet's source and destination, from the kernel's list of all.

    Format: ip_vs_conn_seq_show() in net/netfilter/ipvs/ip_vs_conn.c, 6.1: protocol, then address
    and port of client, virtual server and endpoint in hexadecimal, state, seconds left.
    """
    found = []
    for line in lines:
        fields = line.split()
        if len(fields) < 9 or fields[0] not in (packet.protocol.value, "IP"):
            continue
        try:
            client, virtual, endpoint = (_hexadecimal(fields[place]) for place in (1, 3, 5))
            ports = [int(fields[place], 16) for place in (2, 4, 6)]
        except ValueError:
            continue  # the heading
        if client != packet.source or virtual != packet.destination or ports[1] != packet.port:
            continue
        what = "IPVS entry of affinity" if ports[0] == 0 else f"IPVS entry, source port {ports[0]}"
        found.append(f"{what}: to {endpoint} port {ports[2]}, {fields[7]}, {fields[8]} s left")
    return found


def _hexadecimal(text: str) -> Address:
    """Return an address as IPVS prints it: eight digits, or IPv6, perhaps in brackets."""
    if ":" in text:
        return parse_address(text.strip("[]"))
    return IPv4Address(int(text, 16))


async def _flows(packet: Packet) -> Sequence[str]:
    """Return the connection tracking entries of the packet's source and original destination."""
    tool = shutil.which("conntrack", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if tool is None:
        return ["flows are not known: no conntrack (install Debian's package conntrack)"]
    process = await asyncio.create_subprocess_exec(
        tool, "-L", "-f", "ipv4" if packet.source.version == 4 else "ipv6",
        "-p", packet.protocol.lower(),
        "--orig-src", str(packet.source),
        "--orig-dst", str(packet.destination),
        "--orig-port-dst", str(packet.port),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    printed, complaint = await process.communicate()
    if process.returncode != 0:
        return [f"flows are not known: {complaint.decode(errors='replace').strip()}"]
    flows = [" ".join(line.split()) for line in printed.decode(errors="replace").splitlines()]
    shown = [f"flow {one}" for one in flows[:MOST_FLOWS]]
    if len(flows) > MOST_FLOWS:
        shown.append(f"and {len(flows) - MOST_FLOWS} flows more")
    return shown or [f"no flow of {packet.source} to this destination is tracked"]
