"""Streams that prove themselves: each byte follows from its connection, its way and its offset.

Lives here: those bytes, what the two ends say about them, and the endpoint, a process of its own.
Must not: know vipd or the lab. Only the standard library, so that it starts quickly.

    client    HEAD: number of the connection, bytes of the request, bytes of the reply
              the request, then the end of the data
    endpoint  GREETING: its name, the number again
              the reply, then WHOLE if it has seen the whole request, then the end of the data

The endpoint keeps step: of the reply it sends the part that it has of the request, so that a client
that pauses makes both directions pause. What it finds wrong it says on its standard output.

    python streams.py NAME PORT      serve on all addresses of this namespace until killed
"""

import asyncio
import contextlib
import socket
import struct
import sys
from hashlib import shake_128
from typing import Literal

HEAD = struct.Struct("!QII")
GREETING = struct.Struct("!16sQ")
WHOLE = b"whole"
WRONG, SHORT = "wrong", "short"
"""The first words of what an endpoint says: a byte was not right; a request ended too early. The
number of the connection follows."""
BACKLOG = 4096
_BLOCK = 4096

Way = Literal["request", "reply"]


def piece(number: int, way: Way, first: int, size: int) -> bytes:
    """Return `size` bytes of a stream, from offset `first` on."""
    blocks = range(first // _BLOCK, -(-(first + size) // _BLOCK))
    whole = b"".join(shake_128(f"{number} {way} {one}".encode()).digest(_BLOCK) for one in blocks)
    return whole[first % _BLOCK :][:size]


class WrongByteError(Exception):
    """A byte arrived that was never sent at this place."""


class Arrived:
    """What has arrived of a stream of `size` bytes."""

    def __init__(self, number: int, way: Way, size: int) -> None:
        self.number = number
        self.size = size
        self.count = 0
        self._way = way

    @property
    def is_whole(self) -> bool:
        return self.count == self.size

    def take(self, data: bytes) -> None:
        """Look at the next bytes; raise WrongByteError."""
        sent = piece(self.number, self._way, self.count, len(data))
        if data != sent or self.count + len(data) > self.size:
            raise WrongByteError(f"{self._way} {self.number}: {len(data)} bytes at {self.count}")
        self.count += len(data)


async def _answer(name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    number, asked, replied = HEAD.unpack(await reader.readexactly(HEAD.size))
    writer.write(GREETING.pack(name.encode(), number))
    request, sent = Arrived(number, "request", asked), 0
    while data := await reader.read(1 << 16):
        try:
            request.take(data)
        except WrongByteError as error:
            print(WRONG, number, error, flush=True)
            return
        due = replied * request.count // asked
        writer.write(piece(number, "reply", sent, due - sent))
        sent = due
        await writer.drain()
    if request.is_whole:
        writer.write(WHOLE)
        await writer.drain()
    else:
        print(SHORT, number, flush=True)


async def serve(name: str, port: int) -> None:
    """Answer until cancelled; print an empty line once that is so."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A connection that breaks is the client's to tell of.
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await _answer(name, reader, writer)
        writer.close()

    for family in (socket.AF_INET, socket.AF_INET6):
        listener = socket.create_server(("", port), family=family, backlog=BACKLOG)
        await asyncio.start_server(answer, sock=listener, backlog=BACKLOG)
    print(flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
