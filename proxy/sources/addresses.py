"""This node's own addresses as a source: once for a command, or watched for the daemon.

Lives here: reading the addresses of all interfaces, waiting until they change, and the task that
does so for the daemon. Must not: know what they are used for (resolve.py). The messages are those
of `ip address show`: struct ifaddrmsg in include/uapi/linux/if_addr.h, Linux 6.1.

Loopback's addresses are left out, and so is everything on the interface of that name: nobody else
reaches them. Addresses that wait for duplicate detection are not yet the node's.
"""

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence

import structlog

from vipd.backends import netlink
from vipd.backends.netlink import DUMP, HEADER, REQUEST, attributes
from vipd.proxy.errors import DataplaneError, SourceError, UnknownResult
from vipd.proxy.events import Event, OwnAddresses
from vipd.proxy.names import Address

QUIET_SECONDS = 0.05
"""Changes that come closer together are told as one: an interface that goes up makes several."""
RETRY_SECONDS = 1.0
_LOOPBACK = 1
"""Index of the loopback interface, in every network namespace."""
_NOT_USABLE = 0x40 | 0x08  # IFA_F_TENTATIVE, IFA_F_DADFAILED
_GET_ADDRESS = 22
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_MESSAGE = struct.Struct("=BBBBI")
"""struct ifaddrmsg: family, prefix length, flags, scope, index of the interface."""
_INTERRUPTED = 0x10
"""NLM_F_DUMP_INTR: something changed while the list was made, so that it may be wrong."""
_ATTEMPTS = 5

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
    message = HEADER.pack(HEADER.size + _MESSAGE.size, _GET_ADDRESS, REQUEST | DUMP, 0, 0)
    try:
        with netlink.routes() as rtnetlink:
            for _ in range(_ATTEMPTS):
                answers = rtnetlink.ask(message + _MESSAGE.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
                if not any(HEADER.unpack_from(one)[2] & _INTERRUPTED for one in answers):
                    return OwnAddresses(_addresses(answers))
    except (OSError, DataplaneError) as error:
        raise SourceError(str(error)) from error
    raise SourceError("the node's addresses change faster than they can be read")


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
    """Return after something has changed. What it was does not matter: all is read anew.

    Loopback's addresses are left out, and vipd itself changes them (backends/local_routes.py).
    """
    loop = asyncio.get_running_loop()
    try:
        while _is_of_loopback(await loop.sock_recv(watching, 65536)):
            pass
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


def _is_of_loopback(events: bytes) -> bool:
    """Return whether all that has changed are addresses of the loopback interface."""
    changed = [one for _, _, _, one in netlink.split(events)]
    return bool(changed) and all(
        len(one) >= HEADER.size + _MESSAGE.size
        and _MESSAGE.unpack_from(one, HEADER.size)[4] == _LOOPBACK
        for one in changed
    )


def _expect_overflow(error: OSError) -> None:
    """Raise any error but that there were more changes than the socket holds: a change too."""
    if error.errno != errno.ENOBUFS:
        raise error


def _addresses(messages: Iterable[bytes]) -> tuple[Address, ...]:
    found = set()
    for message in messages:
        _, _, flags, _, index = _MESSAGE.unpack_from(message, HEADER.size)
        told = dict(attributes(message, HEADER.size + _MESSAGE.size))
        if _IFA_FLAGS in told:  # those that the field of one byte has no room for, too
            (flags,) = struct.unpack("=I", told[_IFA_FLAGS])
        # Of a link between two ends, ADDRESS is the other end.
        own = told.get(_IFA_LOCAL) or told.get(_IFA_ADDRESS)
        if index != _LOOPBACK and own and not flags & _NOT_USABLE:
            address = netlink.address(own)
            if not address.is_loopback:
                found.add(address)
    return tuple(sorted(found, key=lambda one: (one.version, int(one))))
