"""The traffic of a load worker: new connections at a rate, and flows that are kept.

Lives here: what is sent, what counts as an answer, and what as a failure. The other side is pod.py.
Must not: choose targets' addresses or numbers of flows (load.py), or talk to whoever measures.

A new TCP connection asks with `close`, so that the server closes first: TIME_WAIT is then at the
server, whose port is not what runs out, and no reset hides what becomes of the last segments.
"""

import itertools
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence

from vipd.bench.load_loop import Loop
from vipd.bench.load_work import KEPT_FAILURES, Count, Failure, Kind, Report, Target

DOWNLOAD_BYTES = 200_000
_CHUNK_BYTES = 1 << 18
_TICK_SECONDS = 0.05
_LATEST_SECONDS = 0.5
"""An open schedule that is later than this forgets what it missed: the machine sustains no more."""
_MOST_OPEN = 2000
_UDP_MEMORY_SECONDS = 25.0
"""Connection tracking keeps a UDP flow for 30 s of silence at least (nf_conntrack_udp_timeout)."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_TCP_INFO_BYTES = 104
"""linux/tcp.h, struct tcp_info, up to and with tcpi_total_retrans, its last u32."""


class Ledger:
    """What became of the traffic of one host."""

    def __init__(self, host: str, pods: Sequence[str]) -> None:
        self.host = host
        self.pods = frozenset(pods)
        self.report = Report({}, [])

    def count(self, kind: Kind) -> Count:
        """Return the count of a kind, to be changed."""
        return self.report.counts.setdefault(kind, Count())

    def answered(self, kind: Kind, seconds: float) -> None:
        """Count an answer."""
        count = self.count(kind)
        count.answers += 1
        count.slowest_seconds = max(count.slowest_seconds, seconds)

    def failed(self, kind: Kind, target: Target, opened: socket.socket, reason: str) -> None:
        """Count a failed attempt or a broken flow, and keep the words of the first ones."""
        self.count(kind).failed += 1
        self.told(kind, target, opened, reason)

    def moved(self, kind: Kind, target: Target, opened: socket.socket, reason: str) -> None:
        """Count a flow that went on with another endpoint."""
        self.count(kind).moved += 1
        self.told(kind, target, opened, reason)

    def told(self, kind: Kind, target: Target, opened: socket.socket, reason: str) -> None:
        """Keep what happened in words."""
        if len(self.report.failures) < KEPT_FAILURES:
            now, port = time.monotonic(), opened.getsockname()[1]
            failure = Failure(now, self.host, kind, str(target), port, reason)
            self.report.failures.append(failure)


def _open(target: Target) -> socket.socket:
    family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
    kind = socket.SOCK_DGRAM if target.protocol == "udp" else socket.SOCK_STREAM
    return socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)


def _resent(opened: socket.socket) -> int:
    info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    return int(struct.unpack_from("I", info, _TCP_INFO_BYTES - 4)[0])


def _words(failure: OSError) -> str:
    return (failure.strerror or str(failure)).lower()


class Attempts:
    """New connections, or new UDP flows: `rate` a second, or `at_once` open at any time."""

    def __init__(
        self,
        loop: Loop,
        ledger: Ledger,
        kind: Kind,
        targets: Sequence[Target],
        rate: float | None,
        at_once: int,
        patience_seconds: float,
    ) -> None:
        self.loop = loop
        self.ledger = ledger
        self.kind = kind
        self._targets = itertools.cycle(targets)
        self._rate = rate
        self._at_once = at_once
        self._patience = patience_seconds
        self._next = 0.0
        self._going = False
        self._by_age: deque[_Attempt] = deque()
        self.open = 0

    def start(self) -> None:
        """Begin."""
        self._going = True
        self._next = time.monotonic()
        self._tick()
        self._expire()

    def stop(self) -> None:
        """Open no more; those that are open go on."""
        self._going = False

    def ended(self) -> None:
        """An attempt is over, well or not."""
        self.open -= 1
        if self._rate is None and self._going:
            self._begin()

    def _tick(self) -> None:
        if not self._going:
            return
        if self._rate is None:
            for _ in range(self._at_once):
                self._begin()
            return
        now = time.monotonic()
        if now - self._next > _LATEST_SECONDS:
            self._next = now
        while self._next <= now and self.open < _MOST_OPEN:
            self._begin()
            self._next += 1 / self._rate
        self.loop.at(max(self._next, now), self._tick)

    def _begin(self) -> None:
        self.open += 1
        self.ledger.count(self.kind).begun += 1
        self._by_age.append(_Attempt(self, next(self._targets)))

    def _expire(self) -> None:
        """End the attempts that waited too long; the oldest are first."""
        latest = time.monotonic() - self._patience
        while self._by_age and (self._by_age[0].is_over or self._by_age[0].began < latest):
            self._by_age.popleft().expire(self._patience)
        if self._going or self.open:
            self.loop.after(_TICK_SECONDS, self._expire)


class _Attempt:
    """One new connection or UDP flow."""

    def __init__(self, attempts: Attempts, target: Target) -> None:
        self._attempts = attempts
        self._target = target
        self._asked = False
        self._answer = b""
        self.is_over = False
        self.began = time.monotonic()
        self._socket = _open(target)
        self._socket.connect_ex((target.address, target.port))
        attempts.loop.watch(self._socket.fileno(), self._ready)

    def _ready(self) -> None:
        udp = self._target.protocol == "udp"
        try:
            if not self._asked:
                self._socket.send(b"who" if udp else b"close\n")
                self._asked = True
            while part := self._socket.recv(4096):
                self._answer += part
                if udp:
                    break
        except BlockingIOError:
            return
        except OSError as failure:
            self._end(_words(failure))
            return
        self._end(self._judged())

    def _judged(self) -> str:
        """Return what is wrong with the answer, or an empty text."""
        if not self._answer.endswith(b"\n"):
            return f"closed after {self._answer!r}" if self._answer else "closed without an answer"
        pod = self._answer.partition(b" ")[0].decode()
        return "" if pod in self._attempts.ledger.pods else f"answered by {pod}"

    def expire(self, patience: float) -> None:
        """End it where it is not over: it waited too long."""
        if not self.is_over:
            self._end(f"no answer in {patience:g} s" if self._asked else "not connected")

    def _end(self, wrong: str) -> None:
        ledger, kind = self._attempts.ledger, self._attempts.kind
        if self._target.protocol == "tcp":
            ledger.count(kind).resent += _resent(self._socket)
        if wrong:
            ledger.failed(kind, self._target, self._socket, wrong)
        else:
            ledger.answered(kind, time.monotonic() - self.began)
        self.is_over = True
        self._attempts.loop.forget(self._socket.fileno())
        self._socket.close()
        self._attempts.ended()


class KeptFlow:
    """A TCP connection, or a UDP flow of one source port, that asks again and again.

    `pause_seconds` is from an answer to the next question; None asks only when told to.
    """

    def __init__(
        self,
        loop: Loop,
        ledger: Ledger,
        kind: Kind,
        target: Target,
        pause_seconds: float | None,
        source_port: int = 0,
    ) -> None:
        self._loop = loop
        self._ledger = ledger
        self._kind = kind
        self._target = target
        self._pause = pause_seconds
        self._pod = ""
        self._answer = bytearray()
        self._extra = DOWNLOAD_BYTES if kind is Kind.DOWNLOAD else 0
        self._asked_at: float | None = None
        self._sent = False
        self._heard_at = 0.0
        self._last = False
        self.answers = 0
        self.is_broken = False
        self._socket = _open(target)
        if source_port:
            self._socket.bind(("", source_port))
        ledger.count(kind).begun += 1

    @property
    def waits(self) -> bool:
        """Whether a question is open."""
        return self._asked_at is not None and not self.is_broken

    def start(self) -> None:
        """Connect, and ask for the first time."""
        self._socket.connect_ex((self._target.address, self._target.port))
        self._asked_at = time.monotonic()
        self._loop.watch(self._socket.fileno(), self._ready)

    def ask_last(self) -> None:
        """Ask once more, after the answer that is awaited, if any; and then no more."""
        self._last = True
        if not self.is_broken and self._asked_at is None:
            self._ask()

    def check(self, patience: float) -> None:
        """Give it up where an answer takes longer than `patience` seconds."""
        if self._asked_at is None or self.is_broken:
            return
        if time.monotonic() - self._asked_at > patience:
            self._break(f"no answer in {patience:g} s")

    def close(self) -> None:
        """End it in good order."""
        if not self.is_broken:
            self._count_resent()
            self._loop.forget(self._socket.fileno())
            self._socket.close()

    def _ask(self) -> None:
        if self.is_broken:
            return
        self._asked_at = time.monotonic()
        self._sent = False
        self._ready()

    def _ask_in_turn(self) -> None:
        if self._asked_at is None and not self._last:
            self._ask()

    def _question(self) -> bytes:
        if self._target.protocol == "udp":
            return b"who"
        return b"bytes %d\n" % self._extra if self._extra else b"who\n"

    def _ready(self) -> None:
        try:
            if self._asked_at is not None and not self._sent:
                self._socket.send(self._question())
                self._sent = True
            while not self.is_broken:
                part = self._socket.recv(_CHUNK_BYTES)
                if not part:
                    self._break("closed by the other side")
                    return
                self._answer += part
                self._judge()
        except BlockingIOError:
            return
        except OSError as failure:
            self._break(_words(failure))

    def _judge(self) -> None:
        """Count the answer where all of it is there."""
        first, end, rest = self._answer.partition(b"\n")
        if not end or len(rest) < self._extra:
            return
        now, pod = time.monotonic(), first.partition(b" ")[0].decode()
        self._answer.clear()
        if self._asked_at is None:
            self._break(f"an answer to nothing, by {pod}")
            return
        self._ledger.answered(self._kind, now - self._asked_at)
        self.answers += 1
        self._asked_at = None
        self._compare(pod, now)
        if self._last:
            return
        if self._pause is not None:
            self._loop.after(self._pause, self._ask_in_turn)

    def _compare(self, pod: str, now: float) -> None:
        """See that it is the endpoint of before."""
        silence = now - self._heard_at
        expired = self._target.protocol == "udp" and silence > _UDP_MEMORY_SECONDS
        if pod not in self._ledger.pods:
            self._break(f"answered by {pod}")
        elif self._pod and pod != self._pod and not expired:
            reason = f"{self._pod} answered, then {pod}"
            self._ledger.moved(self._kind, self._target, self._socket, reason)
        self._pod, self._heard_at = pod, now

    def _break(self, reason: str) -> None:
        self._count_resent()
        self._ledger.failed(self._kind, self._target, self._socket, reason)
        self.is_broken = True
        self._loop.forget(self._socket.fileno())
        if self._target.protocol == "tcp":
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._socket.close()

    def _count_resent(self) -> None:
        if self._target.protocol == "tcp":
            self._ledger.count(self._kind).resent += _resent(self._socket)
