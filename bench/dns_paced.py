"""Questions at a given rate, whatever becomes of them: `python -m vipd.bench.dns_paced`.

Lives here: an open loop over one socket. Must not: sum up over rounds.

    python -m vipd.bench.dns_paced ADDRESS RATE SECONDS < NAMES

NAMES are lines of `NAME TYPE`, all of type A. It ends after SECONDS, or once its process gets
SIGTERM, and prints one JSON object (`Latencies`). A question's time runs from just before it is
handed to the kernel until the kernel has the answer (SO_TIMESTAMPNS): what this program itself is
late by, on a machine with too few cores, is not the server's.
"""

import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from vipd.bench.datapath_report import quantile
from vipd.bench.dns_questions import wire_questions

_SO_TIMESTAMPNS = 35
_TIME = struct.Struct("qq")
_PATIENCE_SECONDS = 1.0
"""How long answers are waited for at the end. What is later is lost."""


class Latencies(Struct, frozen=True):
    """Microseconds, and how many questions had an answer that says NOERROR."""

    sent: int
    answered: int
    p50: float
    p99: float
    worst: float


class _Loop:
    """Sends when it is time, and takes what comes."""

    def __init__(self, address: str, messages: Sequence[bytes]) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.connect((address, 53))
        self._messages = messages
        self._under_way: dict[int, int] = {}
        self._number = 0
        self.taken: list[int] = []
        """Nanoseconds of answers."""
        self.sent = 0

    def run(self, rate: float, seconds: float) -> None:
        stopped: list[int] = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        begin = time.monotonic()
        while not stopped and (now := time.monotonic() - begin) < seconds:
            if self.sent <= now * rate:
                self._send()
            wait = self.sent / rate - (time.monotonic() - begin)
            # Less than a millisecond is no time for poll: nothing is lost by looking once more.
            if poll.poll(max(0.0, wait * 1000)):
                self._take()
        end = time.monotonic() + _PATIENCE_SECONDS
        while self._under_way and (left := end - time.monotonic()) > 0:
            poll.poll(left * 1000)
            self._take()

    def _send(self) -> None:
        self._number = (self._number + 1) & 0xFFFF
        message = self._messages[self.sent % len(self._messages)]
        self._under_way[self._number] = time.time_ns()
        self.sent += 1
        try:
            self._socket.send(self._number.to_bytes(2) + message)
        except OSError:
            return  # lost

    def _take(self) -> None:
        while True:
            try:
                data, told, _, _ = self._socket.recvmsg(4096, 64)
            except OSError:
                return
            began = self._under_way.pop(int.from_bytes(data[:2]), None)
            if began is None or data[3] & 15:
                continue
            seconds, rest = _TIME.unpack_from(told[0][2])
            self.taken.append(seconds * 1_000_000_000 + rest - began)


def main() -> None:
    """Ask, and print what became of it."""
    address, rate, seconds = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    loop = _Loop(address, wire_questions(sys.stdin.read().splitlines()))
    print(flush=True)
    loop.run(rate, seconds)
    times = sorted(one / 1000 for one in loop.taken)
    cuts = [quantile(times, share) for share in (0.5, 0.99, 1.0)] if times else [0.0] * 3
    print(msgspec.json.encode(Latencies(loop.sent, len(times), *cuts)).decode())


if __name__ == "__main__":
    main()
