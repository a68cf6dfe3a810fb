"""What a host of the load does and what became of it, as data.

Lives here: the words that `load.py` and its workers exchange as JSON. Pure. Must not: send.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

from msgspec import Struct

KEPT_FAILURES = 100
"""So many failures are told in words; the others are only counted."""


class Target(Struct, frozen=True):
    """A service address that is asked. Its endpoints are the lab's echo servers (pod.py)."""

    address: str
    port: int
    protocol: Literal["tcp", "udp"]

    def __str__(self) -> str:
        shown = f"[{self.address}]" if ":" in self.address else self.address
        return f"{shown}:{self.port}/{self.protocol}"


class Kind(StrEnum):
    """The kinds of traffic."""

    NEW_TCP = "new TCP"
    """Connects, asks once, reads until the server closes: the client's port is free at once."""
    NEW_UDP = "new UDP"
    """One question from a port that the kernel chooses, one answer."""
    KEPT_TCP = "kept TCP"
    """Asks a line every so often over one connection."""
    DOWNLOAD = "download"
    """The same with a long answer, one after the other."""
    IDLE_TCP = "idle TCP"
    """Speaks at the start and at the end, and is silent in between."""
    KEPT_UDP = "kept UDP"
    """Asks every so often from one source port."""
    IDLE_UDP = "idle UDP"


NEW = (Kind.NEW_TCP, Kind.NEW_UDP)
LONG_TCP = (Kind.KEPT_TCP, Kind.DOWNLOAD, Kind.IDLE_TCP)
LONG_UDP = (Kind.KEPT_UDP, Kind.IDLE_UDP)


class Work(Struct, frozen=True, kw_only=True):
    """What one host does: rates are per second, the others are numbers of flows.

    New connections and flows take the targets of their protocol in turn.
    """

    host: str
    targets: tuple[Target, ...]
    pods: tuple[str, ...]
    """Names that may answer."""
    tcp_rate: float | None
    """New TCP connections; None: as many as this machine can, `at_once` at a time."""
    at_once: int = 16
    patience_seconds: float = 3.0
    """Without an answer for so long, an attempt has failed and a flow is broken. A lost SYN is sent
    again after a second: it fails nothing, and is seen in `Count.resent` and `slowest_seconds`."""
    udp_rate: float = 0.0
    kept_tcp: int = 0
    downloads: int = 0
    idle_tcp: int = 0
    kept_udp: int = 0
    idle_udp: int = 0


class Count(Struct):
    """What became of one kind of traffic on one host."""

    begun: int = 0
    """Attempts, or kept flows."""
    answers: int = 0
    failed: int = 0
    """Attempts that failed, or kept flows that broke."""
    moved: int = 0
    """UDP flows that another endpoint answered than before, though nothing had expired."""
    resent: int = 0
    """TCP segments that the client had to send again, SYN included."""
    slowest_seconds: float = 0.0
    """From the question, or the connect, to the end of the answer."""


class Failure(Struct, frozen=True):
    """One failed attempt or broken flow. `at` is in seconds of the monotonic clock."""

    at: float
    host: str
    kind: Kind
    target: str
    source_port: int
    reason: str

    def __str__(self) -> str:
        return f"{self.kind} {self.host}:{self.source_port} → {self.target}: {self.reason}"


class Report(Struct):
    """What became of a load, or of one host's share of it. `seconds`: how long it opened anew."""

    counts: dict[Kind, Count]
    failures: list[Failure]
    seconds: float = 0.0

    def sum(self, kinds: Iterable[Kind], field: str) -> int:
        """Return the sum of a field over kinds of traffic."""
        return sum(getattr(self.counts[kind], field) for kind in kinds if kind in self.counts)

    @property
    def attempts(self) -> int:
        """Return how many connections and UDP flows were begun."""
        return self.sum(NEW, "begun")

    @property
    def failed(self) -> int:
        """Return how many of them failed."""
        return self.sum(NEW, "failed")

    @property
    def rate(self) -> float:
        """Return the new TCP connections that were answered each second."""
        return self.sum((Kind.NEW_TCP,), "answers") / self.seconds if self.seconds else 0.0

    @property
    def long_tcp(self) -> int:
        """Return how many TCP connections were kept."""
        return self.sum(LONG_TCP, "begun")

    @property
    def long_udp(self) -> int:
        """Return how many UDP flows were kept."""
        return self.sum(LONG_UDP, "begun")

    @property
    def broken_tcp(self) -> int:
        """Return how many kept TCP connections broke."""
        return self.sum(LONG_TCP, "failed")

    @property
    def broken_udp(self) -> int:
        """Return how many kept UDP flows broke, or were moved to another endpoint."""
        return self.sum(LONG_UDP, "failed") + self.sum(LONG_UDP, "moved")

    @property
    def resent(self) -> int:
        """Return how many TCP segments clients had to send again."""
        return self.sum(Kind, "resent")

    @property
    def harmed(self) -> bool:
        """Whether anything failed, broke or moved."""
        return bool(self.failed or self.broken_tcp or self.broken_udp)


def total(reports: Iterable[Report]) -> Report:
    """Return what became of all hosts together."""
    together = Report({}, [])
    for one in reports:
        together.seconds = max(together.seconds, one.seconds)
        together.failures = sorted([*together.failures, *one.failures], key=lambda f: f.at)
        for kind, count in one.counts.items():
            known = together.counts.get(kind, Count())
            together.counts[kind] = Count(
                begun=known.begun + count.begun,
                answers=known.answers + count.answers,
                failed=known.failed + count.failed,
                moved=known.moved + count.moved,
                resent=known.resent + count.resent,
                slowest_seconds=max(known.slowest_seconds, count.slowest_seconds),
            )
    return together
