"""UDP questions and answers, many at once: `python -m vipd.bench.datapath_datagrams`.

Lives here: both ends, on recvmmsg(2) and sendmmsg(2), so that a datagram costs no Python: a server
sends back what it got, a client sends as many new questions as answers came. Must not: sum up.

    python -m vipd.bench.datapath_datagrams serve PORT
    python -m vipd.bench.datapath_datagrams ask ADDRESS PORT SECONDS

The client prints one JSON object: {"answers": 123456, "lost": 0, "seconds": 2.0}. IPv4 only.
"""

import ctypes
import os
import select
import socket
import sys
import time

import msgspec
from msgspec import Struct

SIZE = 64
"""Bytes of each datagram: about a DNS question."""
SOURCE_PORTS = 16
AT_ONCE = 8
"""Questions under way from each source port. All together fit into a socket's default buffer of
212,992 bytes, in which a datagram of this size takes 768: what is lost is lost by the proxy."""
_SILENT_SECONDS = 0.2
"""After so long without an answer on a source port, what it waits for is lost."""
_ADDRESS_BYTES = 16
_WAITFORONE = 0x10000
_NOTHING_YET = (11, 111)
"""EAGAIN, and ECONNREFUSED, which an ICMP error leaves at a connected socket once."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Piece(ctypes.Structure):
    """struct iovec, uio.h."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """struct msghdr, recvmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("pieces", ctypes.POINTER(_Piece)),
        ("piece_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """struct mmsghdr, recvmmsg(2)."""

    _fields_ = (("header", _Header), ("length", ctypes.c_uint))


class Batch:
    """Room for some datagrams of SIZE bytes, with the addresses they came from if `named`.

    What was received is sent back to where it came from: the same memory serves both calls.
    """

    def __init__(self, count: int, named: bool) -> None:
        self._count = count
        self._data = ctypes.create_string_buffer(count * SIZE)
        self._names = ctypes.create_string_buffer(count * _ADDRESS_BYTES)
        self._pieces = (_Piece * count)()
        self._messages = (_Message * count)()
        for number in range(count):
            self._pieces[number].base = ctypes.addressof(self._data) + number * SIZE
            self._pieces[number].length = SIZE
            header = self._messages[number].header
            header.pieces = ctypes.pointer(self._pieces[number])
            header.piece_count = 1
            if named:
                header.name = ctypes.addressof(self._names) + number * _ADDRESS_BYTES
                header.name_length = _ADDRESS_BYTES

    def receive(self, descriptor: int, flags: int) -> int:
        """Return how many came, 0 where nothing was there; raise OSError."""
        return self._called("recvmmsg", descriptor, self._count, flags, None)

    def send(self, descriptor: int, count: int) -> int:
        """Return how many the kernel took; raise OSError."""
        return self._called("sendmmsg", descriptor, count, 0)

    def _called(self, name: str, descriptor: int, count: int, *rest: int | None) -> int:
        done = int(getattr(_libc, name)(descriptor, self._messages, count, *rest))
        if done >= 0:
            return done
        number = ctypes.get_errno()
        if number in _NOTHING_YET:
            return 0
        raise OSError(number, f"{name}: {os.strerror(number)}")


class Answers(Struct, frozen=True):
    """What one client got."""

    answers: int
    lost: int
    seconds: float


def serve(port: int) -> None:
    """Send back every datagram. Several processes may serve one port."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    opened.bind(("", port))
    batch = Batch(SOURCE_PORTS * AT_ONCE, named=True)
    while True:
        count = batch.receive(opened.fileno(), _WAITFORONE)
        if count:
            batch.send(opened.fileno(), count)


def ask(address: str, port: int, seconds: float) -> Answers:
    """Keep AT_ONCE questions under way from each source port; return what came back."""
    opened = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(SOURCE_PORTS)]
    poll = select.epoll()
    for one in opened:
        one.connect((address, port))
        one.setblocking(False)
        poll.register(one.fileno(), select.EPOLLIN)
    batch = Batch(AT_ONCE, named=False)
    start = time.perf_counter()
    end = start + seconds
    heard = {one.fileno(): start for one in opened}
    under_way = {one.fileno(): batch.send(one.fileno(), AT_ONCE) for one in opened}
    answers = lost = 0
    while (now := time.perf_counter()) < end:
        for descriptor, _ in poll.poll(_SILENT_SECONDS):
            count = batch.receive(descriptor, socket.MSG_DONTWAIT)
            if count:
                # An answer may come after it was given up.
                under_way[descriptor] = max(0, under_way[descriptor] - count)
                under_way[descriptor] += batch.send(descriptor, AT_ONCE - under_way[descriptor])
                heard[descriptor] = now
                answers += count
        if now - min(heard.values()) > _SILENT_SECONDS:
            for descriptor, last in heard.items():
                if now - last > _SILENT_SECONDS:
                    lost += under_way[descriptor]
                    under_way[descriptor] = batch.send(descriptor, AT_ONCE)
                    heard[descriptor] = now
    return Answers(answers, lost, time.perf_counter() - start)


def main() -> None:
    """Do what the arguments say."""
    match sys.argv[1:]:
        case ["serve", port]:
            serve(int(port))
        case ["ask", address, port, seconds]:
            told = ask(address, int(port), float(seconds))
            sys.stdout.buffer.write(msgspec.json.encode(told) + b"\n")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
