"""The socket of a UDP place: read, no longer read, closed and given away.

Lives here: what is done with the socket itself. Must not: know sessions beyond that there are some
(udp_sessions.py), or what becomes of a datagram (udp.py).
"""

import asyncio
import contextlib
import socket
from typing import Final

from vipd.backends.userspace.forwarder import interface
from vipd.backends.userspace.forwarder.udp_sessions import ClientAddress, Listening

NOW: Final = socket.MSG_DONTWAIT
"""Whoever shares a socket, such as the worker before, can make it blocking (fcntl(2))."""


def receive(
    listening: Listening, bound: socket.socket, buffer: bytearray
) -> tuple[int, ClientAddress, str]:
    """Read a datagram: its size, its source, and where that came in, if it is not known."""
    if not listening.tells_interface:
        interface.ask(bound)
        listening.tells_interface = True
    size, beside, _, client = bound.recvmsg_into([buffer], interface.SPACE, NOW)
    session = listening.sessions.get(client)
    if session is not None and session.came_by:
        return size, client, session.came_by
    return size, client, interface.of_datagram(beside)


def unread(listening: Listening) -> None:
    """Read it no more."""
    if listening.is_read and listening.bound is not None:
        asyncio.get_running_loop().remove_reader(listening.bound)
    listening.is_read = False


def close(listening: Listening) -> None:
    """Let go of it, read or not."""
    unread(listening)
    if listening.bound is not None:
        listening.bound.close()
        listening.bound = None


def give_away(listening: Listening) -> socket.socket | None:
    """Return the socket; what is left here is a copy for replies, where there are sessions.

    None is left where there is no descriptor for one.
    """
    unread(listening)
    given, listening.bound = listening.bound, None
    if given is not None and listening.sessions:
        with contextlib.suppress(OSError):
            listening.bound = given.dup()
            # dup() carries the time-out of `given` over, which may be none, and so makes both
            # blocking: what a descriptor is open on is shared (fcntl(2), O_NONBLOCK).
            listening.bound.setblocking(False)
            given.setblocking(False)
    return given
