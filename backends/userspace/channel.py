"""A Unix stream socket that carries whole messages, with descriptors beside them.

Lives here: framing and SCM_RIGHTS over one connection, for the daemon and for its workers. Must
not: know what the messages say (messages.py).

A message is preceded by its length and its number of descriptors. The kernel delivers descriptors
with the first byte of what they were sent with (unix(7)), so they are kept in order until the
message they belong to is whole.
"""

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Sequence

_HEAD = struct.Struct("!IB")
LARGEST = 64 << 20
"""Bytes of one message: a place with 100,000 endpoints needs about 4 MB."""
_MOST_AT_ONCE = 253
"""Descriptors in one sendmsg: SCM_MAX_FD, include/net/scm.h."""
_CHUNK = 1 << 18


class Channel:
    """One connection. Messages are sent and received one after the other, each side by one task."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._received = bytearray()
        self._descriptors: deque[int | None] = deque()
        """As they came; None: what else came with that message is lost."""

    async def send(self, message: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a message; the descriptors stay the caller's. Raise OSError where nobody reads."""
        if len(descriptors) > _MOST_AT_ONCE:
            raise ValueError(f"{len(descriptors)} descriptors in one message")
        whole = memoryview(_HEAD.pack(len(message), len(descriptors)) + message)
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        while whole:
            try:
                sent = self._socket.sendmsg([whole[:_CHUNK]], beside if descriptors else [])
            except BlockingIOError:
                await _ready(self._socket, writing=True)
                continue
            whole, descriptors = whole[sent:], ()

    async def receive(self) -> tuple[bytes, list[int]]:
        """Return a message and its descriptors, the caller's from now on; EOFError at the end.

        There are fewer descriptors than were sent where this process may open no more files: the
        kernel installs them in order, and drops the others for good.
        """
        await self._fill(_HEAD.size)
        length, count = _HEAD.unpack_from(self._received)
        if length > LARGEST:
            raise EOFError(f"a message of {length} bytes")
        await self._fill(_HEAD.size + length)
        message = bytes(self._received[_HEAD.size : _HEAD.size + length])
        del self._received[: _HEAD.size + length]
        return message, self._take(count)

    def close(self) -> None:
        """Close it, with the descriptors that nobody has taken."""
        with contextlib.suppress(OSError):
            self._socket.close()
        while self._descriptors:
            if (one := self._descriptors.popleft()) is not None:
                os.close(one)

    def _take(self, count: int) -> list[int]:
        """Return the descriptors of a message that was sent with so many."""
        taken: list[int] = []
        while len(taken) < count:
            if not self._descriptors:
                raise EOFError("a message without its descriptors")
            one = self._descriptors.popleft()
            if one is None:
                break
            taken.append(one)
        return taken

    async def _fill(self, size: int) -> None:
        while len(self._received) < size:
            try:
                data, descriptors, flags, _ = socket.recv_fds(self._socket, _CHUNK, _MOST_AT_ONCE)
            except BlockingIOError:
                await _ready(self._socket, writing=False)
                continue
            self._descriptors.extend(descriptors)
            if flags & socket.MSG_CTRUNC:
                self._descriptors.append(None)
            if not data:
                raise EOFError("the other side has ended")
            self._received += data


async def _ready(connection: socket.socket, *, writing: bool) -> None:
    """Wait until something can be read, or written."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    number = connection.fileno()
    if writing:
        loop.add_writer(number, tell)
    else:
        loop.add_reader(number, tell)
    try:
        await ready
    finally:
        if writing:
            loop.remove_writer(number)
        else:
            loop.remove_reader(number)
