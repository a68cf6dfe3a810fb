"""What a process that answers has counted: plain numbers, in the shapes of CoreDNS's metrics.

Lives here: counting, cheap enough for each datagram, and the names under which it is told. Must
not: export (metrics.py).
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from operator import mul

SIZES = (0, 100, 200, 300, 400, 511, 1023, 2047, 4095, 8291, 16_000, 32_000, 48_000, 64_000)
"""Bytes: upper bounds of CoreDNS's histograms of sizes."""
SECONDS = tuple(0.00025 * 2**power for power in range(16))
"""Upper bounds of CoreDNS's histogram of durations."""
TYPES: Mapping[int, str] = {
    1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 12: "PTR", 15: "MX", 16: "TXT", 28: "AAAA", 33: "SRV",
    43: "DS", 46: "RRSIG", 47: "NSEC", 48: "DNSKEY", 50: "NSEC3", 64: "SVCB", 65: "HTTPS",
    251: "IXFR", 252: "AXFR", 255: "ANY",
}  # fmt: skip
"""Types that CoreDNS tells apart; all others are one."""
OTHER = "other"
RCODES = ("NOERROR", "FORMERR", "SERVFAIL", "NXDOMAIN", "NOTIMP", "REFUSED", "YXDOMAIN", "YXRRSET")
_LONGEST = 4096
"""Sizes up to here are counted one by one, and put into their buckets when they are told."""


class Sizes:
    """A histogram of lengths; `exact[n]` counts those of n bytes."""

    __slots__ = ("exact", "longer")

    def __init__(self) -> None:
        self.exact = [0] * (_LONGEST + 1)
        self.longer: dict[int, int] = {}

    def add(self, size: int) -> None:
        """Count one."""
        if size <= _LONGEST:
            self.exact[size] += 1
        else:
            # The rough length is enough above, and there must not be 60,000 of them.
            self.longer[size & ~0xFF] = self.longer.get(size & ~0xFF, 0) + 1

    def buckets(self) -> tuple[list[int], int]:
        """Return the buckets of SIZES and one for what is longer, and the sum of all lengths."""
        found = [0] * (len(SIZES) + 1)
        total = low = 0
        for at, bound in enumerate(SIZES):
            # Slices: looking at each length would keep questions waiting for 3 ms.
            part = self.exact[low : bound + 1]
            count = sum(part)
            if count:
                found[at] = count
                total += sum(map(mul, part, range(low, bound + 1)))
            low = bound + 1
        for size, count in self.longer.items():
            found[bisect_left(SIZES, size)] += count
            total += size * count
        return found, total


class Traffic:
    """Questions of one protocol and family."""

    __slots__ = ("family", "protocol", "requests", "responses", "types")

    def __init__(self, protocol: str, family: int) -> None:
        self.protocol, self.family = protocol, family
        self.requests, self.responses = Sizes(), Sizes()
        self.types: dict[bytes, int] = {one.to_bytes(2): 0 for one in TYPES} | {b"": 0}
        """Questions by their type as on the wire; empty: every other type, or none."""

    def question(self, data: bytes) -> None:
        """Count a question; what is none counts as one of another type."""
        self.requests.add(len(data))
        end = data.find(b"\0", 12) + 1
        kind = data[end : end + 2]
        self.types[kind if kind in self.types else b""] += 1


class Counters:
    """All of one process."""

    def __init__(self) -> None:
        self.by_name: dict[str, int] = dict.fromkeys(
            (
                "udp_dropped_unsent",
                "udp_failed",
                "tcp_accepted",
                "tcp_refused",
                "tcp_evicted",
                "tcp_idle",
                "tcp_slow",
                "tcp_broken",
                "tcp_accept_failed",
                "sources_refused",
                "refusals_unsaid",
                "forwarded",
                "too_many_waiting",
                "inside_errors",
                "silent",
            ),
            0,
        )
        self.rcodes = [0] * 16
        self.bad_versions = 0
        """Replies BADVERS, by answers that were replaced; `rcodes` has them as NOERROR."""
        self.forwarded_rcodes = [0] * 16
        """Those of forwarded questions; they are in `rcodes` too."""
        self.durations = [0] * (len(SECONDS) + 1)
        self.seconds = 0.0
        self._traffic: dict[tuple[str, int], Traffic] = {}

    def traffic(self, protocol: str, family: int) -> Traffic:
        """Return the counts of a protocol (``udp``, ``tcp``) and family (1: IPv4, 2: IPv6)."""
        found = self._traffic.get((protocol, family))
        if found is None:
            found = self._traffic[protocol, family] = Traffic(protocol, family)
        return found

    def took(self, seconds: float, replies: int = 1) -> None:
        """Count replies that took so long each."""
        self.durations[bisect_left(SECONDS, seconds)] += replies
        self.seconds += seconds * replies

    def types(self) -> dict[str, int]:
        """Return how many questions there were by protocol, family and type."""
        return {
            f"{one.protocol} {one.family} {_type(kind)}": count
            for one in self._traffic.values()
            for kind, count in one.types.items()
            if count
        }

    def named_rcodes(self, *, forwarded: bool = False, bad_versions: int = 0) -> dict[str, int]:
        """Return how many replies there were by rcode: all, or those of forwarded questions.

        `bad_versions`: how many of all were BADVERS, beside those that are known here.
        """
        counts = list(self.forwarded_rcodes if forwarded else self.rcodes)
        bad_versions = 0 if forwarded else min(self.bad_versions + bad_versions, counts[0])
        counts[0] -= bad_versions
        named = ((*RCODES, *map(str, range(len(RCODES), 16)))[at] for at in range(16))
        found = {name: count for name, count in zip(named, counts, strict=True) if count}
        return found | ({"BADVERS": bad_versions} if bad_versions else {})

    def sizes(self) -> tuple[dict[str, list[int]], dict[str, list[int]], dict[str, float]]:
        """Return histograms of questions and of replies by protocol, and the sums of all three."""
        asked: dict[str, list[int]] = {}
        given: dict[str, list[int]] = {}
        sums: dict[str, float] = {"duration": self.seconds}
        for one in self._traffic.values():
            for name, sizes, into in (
                ("request", one.requests, asked),
                ("response", one.responses, given),
            ):
                buckets, total = sizes.buckets()
                there = into.get(one.protocol)
                into[one.protocol] = buckets if there is None else _added(there, buckets)
                key = f"{name} {one.protocol}"
                sums[key] = sums.get(key, 0) + total
        return asked, given, sums


def _added(some: Iterable[int], others: Iterable[int]) -> list[int]:
    return [one + other for one, other in zip(some, others, strict=True)]


def _type(kind: bytes) -> str:
    return TYPES.get(int.from_bytes(kind), OTHER) if kind else OTHER
