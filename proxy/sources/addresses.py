"""This node's own addresses as a source: once for a command, or watched for the daemon.

Lives here: reading the addresses of all interfaces, waiting until they change, and the task that
does so for the daemon. Must not: know what they are used for (resolve.py). Through pyroute2, the
one place that asks rtnetlink for them.

Loopback's addresses are left out, and so is everything on the interface of that name: nobody else
reaches them. Addresses that wait for duplicate detection are not yet the node's.
"""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence

import structlog

from vipd.proxy.errors import SourceError, UnknownResult
from vipd.proxy.events import Event, OwnAddresses
from vipd.proxy.names import Address, parse_address

QUIET_SECONDS = 0.05
"""Changes that come closer together are told as one: an interface that goes up makes several."""
RETRY_SECONDS = 1.0
_LOOPBACK = 1
"""Index of the loopback interface, in every network namespace."""
_NOT_USABLE = 0x40 | 0x08  # IFA_F_TENTATIVE, IFA_F_DADFAILED

log = structlog.get_logger()


class FollowedAddresses:
    """This node's own addresses, told as soon as a mode is used that has to know them.

    `take` is given what changed; `modes` are those that have to know.
    """

    def __init__(self, take: Callable[[Sequence[Event]], None], modes: Collection[str]) -> None:
        self._take = take
        self._modes = modes
        self._told = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def known(self, mode: str) -> None:
        """Return when what the mode needs has been taken; watch for changes from then on.

        Raise UnknownResult where the watch ended before; asked again, it begins anew.
        """
        if mode not in self._modes:
            return
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(self._go())
        told = asyncio.ensure_future(self._told.wait())
        try:
            await asyncio.wait({self._task, told}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            told.cancel()
        if not self._told.is_set():
            why = None if self._task.cancelled() else self._task.exception()
            raise UnknownResult(f"own addresses are not known: {why or 'stopped'}") from why

    async def _go(self) -> None:
        async for batch in events():
            self._take(batch)
            self._told.set()

    async def stop(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def read() -> OwnAddresses:
    """Return the addresses that the interfaces of this network namespace have now.

    Raise SourceError.
    """
    # It imports for 0.2 s; commands that do not need it do not pay.
    from pyroute2 import IPRoute, NetlinkError

    try:
        with IPRoute() as netlink:
            return OwnAddresses(_addresses(netlink.get_addr()))
    except (OSError, NetlinkError) as error:  # one is not the other in pyroute2 0.9.7
        raise SourceError(str(error)) from error


async def events() -> AsyncIterator[list[OwnAddresses]]:
    """Yield the addresses, at once and again after each change of them."""
    told: OwnAddresses | None = None
    while True:
        try:
            with _subscribe() as watching:
                while True:
                    now = await asyncio.to_thread(read)
                    if now != told:
                        told = now
                        yield [now]
                    await _change(watching)
        except (OSError, SourceError) as error:
            log.warning("own addresses cannot be read", why=str(error))
            await asyncio.sleep(RETRY_SECONDS)


def _subscribe() -> socket.socket:
    """Return a socket that becomes readable when an address of an interface comes or goes."""
    groups = 0x10 | 0x100  # RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
    watching = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    try:
        watching.setblocking(False)
        watching.bind((0, groups))
    except OSError:
        watching.close()
        raise
    return watching


async def _change(watching: socket.socket) -> None:
    """Return after something has changed. What it was does not matter: all is read anew."""
    try:
        await asyncio.get_running_loop().sock_recv(watching, 65536)
    except OSError as error:
        _expect_overflow(error)
    await asyncio.sleep(QUIET_SECONDS)
    while True:
        try:
            watching.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            _expect_overflow(error)


def _expect_overflow(error: OSError) -> None:
    """Raise any error but that there were more changes than the socket holds: a change too."""
    if error.errno != errno.ENOBUFS:
        raise error


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
