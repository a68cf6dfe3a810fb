"""This node's own addresses as a source: once for a command, or watched for the daemon.

Lives here: reading the addresses of all interfaces and waiting until they change. Must not: know
what they are used for (resolve.py). Through pyroute2, the one place that asks rtnetlink for them.

Loopback's addresses are left out, and so is everything on the interface of that name: nobody else
reaches them. Addresses that wait for duplicate detection are not yet the node's.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable

import structlog

from vipd.proxy.events import OwnAddresses
from vipd.proxy.names import Address, parse_address

QUIET_SECONDS = 0.05
"""Changes that come closer together are told as one: an interface that goes up makes several."""
RETRY_SECONDS = 1.0
_LOOPBACK = 1
"""Index of the loopback interface, in every network namespace."""
_NOT_USABLE = 0x40 | 0x08  # IFA_F_TENTATIVE, IFA_F_DADFAILED

log = structlog.get_logger()


def read() -> OwnAddresses:
    """Return the addresses that the interfaces of this network namespace have now."""
    from pyroute2 import IPRoute  # imports for 0.2 s; commands that do not need it do not pay

    with IPRoute() as netlink:
        return OwnAddresses(_addresses(netlink.get_addr()))


async def events() -> AsyncIterator[list[OwnAddresses]]:
    """Yield the addresses, at once and again after each change of them."""
    told: OwnAddresses | None = None
    while True:
        changed = asyncio.Event()
        watching = _subscribe()
        loop = asyncio.get_running_loop()
        try:
            loop.add_reader(watching, _drain, watching, changed)
            while True:
                now = await asyncio.to_thread(read)
                if now != told:
                    told = now
                    yield [now]
                await changed.wait()
                await asyncio.sleep(QUIET_SECONDS)
                changed.clear()
        except OSError as error:
            log.warning("own addresses cannot be read", why=str(error))
            await asyncio.sleep(RETRY_SECONDS)
        finally:
            loop.remove_reader(watching)
            watching.close()


def _subscribe() -> socket.socket:
    """Return a socket that becomes readable when an address of an interface comes or goes."""
    groups = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
    watching = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    watching.setblocking(False)
    watching.bind((0, groups))
    return watching


def _drain(watching: socket.socket, changed: asyncio.Event) -> None:
    """Forget what was told: that something changed is enough, all is read anew."""
    while True:
        try:
            watching.recv(65536)
        except BlockingIOError:
            break
        except OSError:
            continue  # ENOBUFS: more changes than the socket holds, which is a change too
    changed.set()


def _addresses(messages: Iterable[object]) -> tuple[Address, ...]:
    found = set()
    for message in messages:
        index, flags, text = _fields(message)
        if index != _LOOPBACK and text and not flags & _NOT_USABLE:
            address = parse_address(text)
            if not address.is_loopback:
                found.add(address)
    return tuple(sorted(found, key=lambda one: (one.version, int(one))))


def _fields(message: object) -> tuple[int, int, str]:
    """Return interface index, flags and address of a message of pyroute2's, which has no types."""
    told: dict[str, object] = dict(message["attrs"])  # type: ignore[index]
    flags = told.get("IFA_FLAGS", message["flags"])  # type: ignore[index]
    text = told.get("IFA_LOCAL") or told.get("IFA_ADDRESS") or ""
    return int(message["index"]), int(str(flags)), str(text)  # type: ignore[index]
