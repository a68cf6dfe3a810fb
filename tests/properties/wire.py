"""Packets as bytes, and a node in a network namespace that they are really sent to.

Lives here: what tests need that ask the real kernel what it does to a modelled packet. Must not:
know what is right.
"""

import os
import socket
import struct
import subprocess
from contextlib import suppress
from itertools import cycle
from pathlib import Path

from tests.properties import strategies as some
from tests.properties.statements import Packet

from vipd.bench import lab_netns
from vipd.proxy.names import Family

INTERFACES = ("eth0", "cni0", "cni")
_NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1, "ipv6-icmp": 58}
_SYN, _ACK = 0x02, 0x10
_NODE_MAC = "02:00:00:00:00:01"


class Node:
    """A node with the interfaces and addresses of strategies.py, and a world around it."""

    def __init__(self, name: str) -> None:
        self.name, self.world = name, f"{name}-w"
        self.source_ports = cycle(range(2000, 29000))
        """Each packet begins a flow of its own."""
        for one in (self.name, self.world):
            subprocess.run(["ip", "netns", "add", one], check=True)
        self.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1",
                 "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.default.rp_filter=0",
                 "net.ipv6.conf.default.accept_ra=0", "net.ipv6.conf.default.accept_dad=0",
                 "net.netfilter.nf_conntrack_checksum=0")  # fmt: skip
        self.run("ip", "link", "set", "lo", "up")
        for link in INTERFACES:
            self.run("ip", "link", "add", link, "address", _NODE_MAC, "type", "veth",
                     "peer", "name", link, "netns", self.world)  # fmt: skip
            for place in (self.name, self.world):
                subprocess.run(["ip", "-n", place, "link", "set", link, "arp", "off",
                                "addrgenmode", "none", "up"], check=True)  # fmt: skip
        for family in Family:
            for address in some.NODE_IPS[family]:
                self.run("ip", "address", "add", f"{address}/{address.max_prefixlen}",
                         "dev", "eth0", *(["nodad"] if family is Family.IPV6 else []))  # fmt: skip
            self.run("ip", f"-{int(family)}", "route", "add", "default", "dev", "eth0")
        self._links = lab_netns.inside(
            lab_netns.DIRECTORY / self.world, lambda: {link: _link(link) for link in INTERFACES}
        )
        self._raw = lab_netns.inside(
            lab_netns.DIRECTORY / self.name, lambda: {family: _raw(family) for family in Family}
        )

    def run(self, *command: str, text: str = "") -> str:
        """Run a command in the node's namespace and return what it printed."""
        done = subprocess.run(["ip", "netns", "exec", self.name, *command], input=text,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert not done.returncode, f"{command}: {done.stderr}\n{text}"
        return done.stdout

    def send(self, packet: Packet) -> None:
        """Send a packet; it has gone its whole way when this returns (veth and lo are at once)."""
        data = encoded(packet)
        if packet.interface:
            kind = 0x0800 if packet.family is Family.IPV4 else 0x86DD
            header = bytes.fromhex(_NODE_MAC.replace(":", "")) + bytes(6) + struct.pack("!H", kind)
            self._links[packet.interface].send(header + data)
        else:
            sock = self._raw[packet.family]
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, packet.mark)
            with suppress(PermissionError):  # what it says when OUTPUT drops it
                sock.sendto(data, (str(packet.destination), 0))

    def close(self) -> None:
        """Remove the namespaces."""
        for sock in (*self._links.values(), *self._raw.values()):
            sock.close()
        for one in (self.name, self.world):
            subprocess.run(["ip", "netns", "delete", one], check=True)


def _link(name: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    made.bind((name, 0))
    return made


def _raw(family: Family) -> socket.socket:
    kind = socket.AF_INET if family is Family.IPV4 else socket.AF_INET6
    return socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW)


def encoded(packet: Packet) -> bytes:
    """Return the packet with its IP header; the transport's checksums are left out."""
    ports = struct.pack("!HH", packet.source_port, packet.port)
    match packet.protocol:
        case "tcp":
            body = ports + struct.pack(
                "!IIBBHHH", 1, 0, 0x50, _SYN if packet.syn else _ACK, 1024, 0, 0
            )
        case "udp":
            body = ports + struct.pack("!HH", 8, 0)
        case "sctp":  # an INIT chunk
            body = ports + struct.pack("!IIBBHIIHHI", 0, 0, 1, 0, 20, 1, 1500, 1, 1, 1)
        case _:
            kind = 8 if packet.family is Family.IPV4 else 128
            body = struct.pack("!BBHHH", kind, 0, 0, packet.source_port, 1)
    number = _NUMBERS[packet.protocol]
    addresses = packet.source.packed + packet.destination.packed
    if packet.family is Family.IPV6:
        return struct.pack("!IHBB", 6 << 28, len(body), number, 64) + addresses + body
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0, 64, number, 0)
    total = sum(struct.unpack("!10H", head + addresses))
    total = (total & 0xFFFF) + (total >> 16)
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return head[:10] + struct.pack("!H", total) + addresses + body


def needed(*programs: str) -> str:
    """Return what of these is missing for such a node, or an empty text."""
    if os.geteuid() != 0:
        return "needs root"
    path = [Path(one) for one in os.environ.get("PATH", "").split(":")]
    missing = [one for one in programs if not any((each / one).exists() for each in path)]
    return f"needs {missing}" if missing else ""
