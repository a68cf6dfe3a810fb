"""Watching nftables: the kernel tells of every change, and by whom.

Lives here: the socket. Must not: know what is done about it (proxy/repair.py).
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator

from vipd.backends import netlink
from vipd.backends.nftables.notified import Notified, Ours, Transaction
from vipd.backends.runs import RUNS
from vipd.backends.watching import Drift

_NETFILTER = 12  # NETLINK_NETFILTER
_GROUP = 7  # NFNLGRP_NFTABLES
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_SO_RCVBUFFORCE = 33
_BUFFER = 4 << 20
_LARGEST = 1 << 17
_NEW_ELEMENT = 10 << 8 | 12
LOST = "notifications were lost"


async def drifts(ours: Ours) -> AsyncIterator[Drift]:
    """Yield changes of ours that another process made, as they happen."""
    async for one in transactions(ours):
        if one.touched:
            yield Drift(one.touched, one.name, one.process)


async def transactions(ours: Ours) -> AsyncIterator[Transaction]:
    """Yield what another process committed that touches ours, or host chains that lead to ours."""
    notified = Notified(ours)
    with _subscribed() as watching:
        loop = asyncio.get_running_loop()
        while True:
            try:
                datagram = await loop.sock_recv(watching, _LARGEST)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                notified.lost()
                yield Transaction(0, 0, "", (LOST,))
                continue
            for one in notified.feed(datagram):
                is_about_ours = one.touched or one.beside
                if is_about_ours and not await RUNS.include(one.port, one.process):
                    yield one


def _subscribed() -> socket.socket:
    watching = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER)
    try:
        watching.setblocking(False)
        with contextlib.suppress(PermissionError):  # without privileges in the first namespace
            watching.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        # Datagrams that begin with an element that was added: our own cold start makes megabytes
        # of them while this process is busy with more. What others add is found by comparing.
        netlink.let_through(
            watching,
            (netlink.LOAD_HALF, 0, 0, netlink.TYPE_AT),
            (netlink.IS_EQUAL, 0, 1, netlink.as_loaded(_NEW_ELEMENT)),
            netlink.DROP,
            netlink.KEEP,
        )
        watching.bind((0, 0))
        watching.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP)
    except OSError:
        watching.close()
        raise
    return watching
