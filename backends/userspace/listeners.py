"""The sockets that workers listen with: made by the daemon, which may bind what it likes.

Lives here: their options, and who has a place already. Must not: accept or forward.

One socket for each place and worker (SO_REUSEPORT): the kernel spreads connections over the workers
by a hash of the source. Bound to the very address: a wildcard socket for each port would take the
ports of the node's own programs, and one for everything needs packets to be steered by rules.
"""

import contextlib
import os
import socket
from collections.abc import Collection
from pathlib import Path

from vipd.backends.netlink import ADDRESS_FAMILY
from vipd.backends.userspace.objects import Place
from vipd.proxy.names import Family, Protocol

BACKLOG = 4096
"""Connections that wait for a worker; the kernel takes no more than net.core.somaxconn."""
_UDP_BUFFER_BYTES = 4 << 20


def listener(place: Place) -> socket.socket:
    """Return a socket that listens at a place, also before its address is the node's.

    Raise OSError; EADDRINUSE where another program has the place.
    """
    kind = socket.SOCK_DGRAM if place.protocol is Protocol.UDP else socket.SOCK_STREAM
    made = socket.socket(ADDRESS_FAMILY[place.family], kind | socket.SOCK_NONBLOCK)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # An address that the node does not have yet can be bound, for IPv6 as well (ip(7)).
        made.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        if place.family is Family.IPV6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            # What is accepted inherits more, which workers set (accepting.py).
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _UDP_BUFFER_BYTES)
        made.bind((str(place.address), place.port))
        if kind == socket.SOCK_STREAM:
            made.listen(BACKLOG)
    except OSError:
        made.close()
        raise
    return made


_IP_FREEBIND = 15


def holders(places: Collection[Place]) -> dict[Place, str]:
    """Return which process has each place, as ``name (pid N)``, where one is found.

    Source: proc(5), net/tcp and net/udp. A socket of IPv6 can have a place of IPv4, too (RFC 3493
    §3.7); whether it was asked not to is not told, so that it is believed where nobody else is
    found.
    """
    by_inode = _sockets(places, of_ipv6=False)
    known = {one for some in by_inode.values() for one in some}
    by_inode |= _sockets([one for one in places if one not in known], of_ipv6=True)
    found: dict[Place, str] = {}
    for process in Path("/proc").glob("[0-9]*") if by_inode else ():
        with contextlib.suppress(OSError):
            for one in (process / "fd").iterdir():
                for place in by_inode.get(os.readlink(one), ()):
                    name = (process / "comm").read_text().strip()
                    found.setdefault(place, f"{name} (pid {process.name})")
    return found


def _sockets(places: Collection[Place], *, of_ipv6: bool) -> dict[str, list[Place]]:
    """Return the sockets that have places, as links of /proc name them.

    They are of the family of the place, or `of_ipv6`.
    """
    by_listing: dict[str, list[Place]] = {}
    for place in places:
        six = "6" if of_ipv6 or place.family is Family.IPV6 else ""
        by_listing.setdefault(place.protocol.lower() + six, []).append(place)
    found: dict[str, list[Place]] = {}
    for name, asked in by_listing.items():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/thread-self/net/{name}").read_text().splitlines()[1:]:
                fields = line.split()
                address, _, port = fields[1].rpartition(":")
                if not fields[2].endswith(":0000"):
                    continue
                for place in asked:
                    if int(port, 16) == place.port and _is(address, place):
                        found.setdefault(f"socket:[{fields[9]}]", []).append(place)
    return found


def _is(text: str, place: Place) -> bool:
    """Return whether an address of the listing is the place's, or stands for all addresses.

    It is written in words of the host's byte order.
    """
    words = bytes.fromhex(text)
    packed = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
    wanted = place.address.packed
    return packed in (wanted, _MAPPED + wanted) or not any(packed)


_MAPPED = bytes(10) + b"\xff\xff"
"""Before an address of IPv4 that a socket of IPv6 has (RFC 4291 §2.5.5.2)."""
