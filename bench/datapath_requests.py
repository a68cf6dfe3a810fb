"""Requests at a fixed rate, whatever the answers do: `python -m vipd.bench.datapath_requests`.

Lives here: one process of an open loop. Moments are drawn beforehand (exponential gaps), and a
request's time counts from its moment, not from when it could be sent: a server that falls behind
cannot slow the questions down and so hide it. Must not: sum up; the lines of several processes are
put together by datapath_measures.py.

    python -m vipd.bench.datapath_requests ADDRESS PORT RATE SECONDS CONNECTIONS SEED

prints one JSON object: {"unanswered": 0, "microseconds": [180, 212, …]}
"""

import contextlib
import random
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path

import msgspec
from msgspec import Struct

REQUEST = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n"
_CONNECT_SECONDS = 5.0
_GRACE_SECONDS = 2.0
"""After the last moment, so long is waited for answers."""
_WARM_SHARE = 0.1
"""The first part of the time, which does not count."""


class Answers(Struct, frozen=True):
    """What became of the requests of one process."""

    unanswered: int
    microseconds: list[int]
    """From the moment of each answered request until the end of its answer."""


class _Connection:
    """A connection and the request that is under way on it."""

    def __init__(self, address: str, port: int) -> None:
        self.socket = socket.create_connection((address, port), _CONNECT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.length = self._ask_once()
        self.socket.setblocking(False)
        self.left = 0
        self.moment = 0.0

    def _ask_once(self) -> int:
        """Return the length of the answer, which is always the same."""
        self.socket.sendall(REQUEST)
        return len(read_answer(self.socket))

    def ask(self, moment: float) -> None:
        self.moment = moment
        self.left = self.length
        self.socket.send(REQUEST)


def read_answer(opened: socket.socket) -> bytes:
    """Read one HTTP answer with a Content-Length from a blocking socket; raise OSError."""
    answer = b""
    while True:
        head, end, body = answer.partition(b"\r\n\r\n")
        if end:
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            if len(body) >= length:
                return answer
        part = opened.recv(4096)
        if not part:
            raise ConnectionResetError("closed in the middle of an answer")
        answer += part


class Loop:
    """Sends at the moments, reads what comes."""

    def __init__(self, connections: list[_Connection], rate: float, seconds: float) -> None:
        self._rate = rate
        self._seconds = seconds
        self._poll = select.epoll()
        self._connections = {one.socket.fileno(): one for one in connections}
        self._idle = deque(connections)
        self._waiting: deque[float] = deque()
        self._microseconds: list[int] = []
        self._counts_from = 0.0
        self._broken = 0
        for descriptor in self._connections:
            self._poll.register(descriptor, select.EPOLLIN)

    def run(self, chance: random.Random) -> Answers:
        """Ask for the time given, then wait for the last answers."""
        start = time.perf_counter()
        end = start + self._seconds
        self._counts_from = start + self._seconds * _WARM_SHARE
        due = start + chance.expovariate(self._rate)
        while True:
            now = time.perf_counter()
            while due <= now and due < end:
                self._waiting.append(due)
                due += chance.expovariate(self._rate)
            while self._waiting and self._idle:
                self._idle.popleft().ask(self._waiting.popleft())
            under_way = len(self._connections) - len(self._idle)
            if due >= end and (not under_way or now > end + _GRACE_SECONDS):
                unanswered = under_way + len(self._waiting) + self._broken
                return Answers(unanswered, self._microseconds)
            # select, because epoll_wait counts in milliseconds.
            pause = due - now if due < end else 0.01
            if select.select([self._poll], [], [], max(0.0, pause))[0]:
                self._read()

    def _read(self) -> None:
        for descriptor, _ in self._poll.poll(0):
            one = self._connections[descriptor]
            try:
                part = one.socket.recv(4096)
            except OSError:
                part = b""
            if not part:
                self._lose(descriptor)
                continue
            one.left -= len(part)
            if one.left == 0:
                if one.moment >= self._counts_from:
                    taken = time.perf_counter() - one.moment
                    self._microseconds.append(round(taken * 1e6))
                self._idle.append(one)

    def _lose(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        one = self._connections.pop(descriptor)
        self._broken += one.left > 0
        with contextlib.suppress(ValueError):
            self._idle.remove(one)


def main() -> None:
    """Do what the arguments say; exit with a sentence where no connection is to be had."""
    address, port, rate, seconds, connections, seed = sys.argv[1:]
    # Timers are 50 µs late by default, which is half of what is measured here.
    Path("/proc/self/timerslack_ns").write_text("1")
    try:
        opened = [_Connection(address, int(port)) for _ in range(int(connections))]
    except OSError as failure:
        sys.exit(f"{address}:{port}: {failure}")
    answers = Loop(opened, float(rate), float(seconds)).run(random.Random(int(seed)))
    sys.stdout.buffer.write(msgspec.json.encode(answers) + b"\n")


if __name__ == "__main__":
    main()
