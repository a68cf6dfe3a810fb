"""What is counted of forwarding, under CoreDNS's names where the meaning is the same.

Lives here: numbers and their names. Pure. Must not: export them.
Sources: CoreDNS's plugins cache, forward (and its proxy package), hosts, local.
"""

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

SECONDS = tuple(0.00025 * 2**k for k in range(16))
"""Upper bounds of CoreDNS's histograms of time."""
_RCODES = {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}
Labels = tuple[tuple[str, str], ...]


class Sample(NamedTuple):
    """A number to export. Histograms come as _bucket (cumulative), _sum and _count."""

    name: str
    labels: Labels
    value: float


class Histogram:
    """Durations in seconds."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    def samples(self, name: str, labels: Labels) -> Iterator[Sample]:
        """Yield what is exported of it."""
        total = 0
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            total += count
            yield Sample(f"{name}_bucket", (*labels, ("le", bound)), total)
        yield Sample(f"{name}_sum", labels, self.sum)
        yield Sample(f"{name}_count", labels, total)


class Counters:
    """What happened since the start."""

    def __init__(self) -> None:
        self.hits_success = 0
        self.hits_denial = 0
        self.misses = 0
        """Questions that no fresh entry answered."""
        self.served_stale = 0
        self.prefetched = 0
        self.malformed = 0
        """Replies that were dropped, as they do not follow the protocol."""
        self.coalesced = 0
        """Questions that joined an equal one under way."""
        self.rejected = 0
        """Questions beyond the bounds."""
        self.all_down = 0
        """Questions that were sent although every upstream was down."""
        self.hedged = 0
        """Attempts beyond the first of a question."""
        self.truncated = 0
        self.private = 0
        """Replies of which private addresses were dropped, or all of it."""
        self.localhost = 0
        self.special = 0
        """Questions that were answered here and mean nothing elsewhere."""
        self.static = 0
        self.guarded = 0
        """Questions for names of the cluster, which were not forwarded."""
        self.loops = 0
        """Upstreams through which a question came back."""
        self.unwanted: dict[str, int] = {}
        """By reason: what came from an upstream and was not the reply."""
        self.tcp_reused: dict[str, int] = {}
        """By upstream: questions over a connection that was there."""
        self.tcp_opened: dict[str, int] = {}
        self._durations: dict[tuple[str, str], Histogram] = {}

    def replied(self, upstream: str, rcode: int, seconds: float) -> None:
        """Count a reply of an upstream."""
        key = (upstream, _RCODES.get(rcode, "OTHER"))
        if key not in self._durations:
            self._durations[key] = Histogram()
        self._durations[key].add(seconds)

    def forget(self, upstreams: set[str]) -> None:
        """Drop what is counted for upstreams that are no more."""
        for one in upstreams:
            self.tcp_reused.pop(one, None)
            self.tcp_opened.pop(one, None)
        self._durations = {k: v for k, v in self._durations.items() if k[0] not in upstreams}

    def samples(self) -> Iterator[Sample]:
        """Yield all of it."""
        hits = self.hits_success + self.hits_denial
        success, denial = (("type", "success"),), (("type", "denial"),)
        yield Sample("coredns_cache_requests_total", (), hits + self.misses)
        yield Sample("coredns_cache_hits_total", success, self.hits_success)
        yield Sample("coredns_cache_hits_total", denial, self.hits_denial)
        yield Sample("coredns_cache_misses_total", (), self.misses)
        yield Sample("coredns_cache_served_stale_total", (), self.served_stale)
        yield Sample("coredns_cache_prefetch_total", (), self.prefetched)
        yield Sample("coredns_cache_drops_total", (), self.malformed)
        yield Sample("coredns_forward_max_concurrent_rejects_total", (), self.rejected)
        yield Sample("coredns_forward_healthcheck_broken_total", (), self.all_down)
        yield Sample("coredns_local_localhost_requests_total", (), self.localhost)
        for name in ("coalesced", "hedged", "truncated", "private", "special", "static"):
            yield Sample(f"vipd_dns_forward_{name}_total", (), getattr(self, name))
        yield Sample("vipd_dns_forward_guarded_total", (), self.guarded)
        yield Sample("vipd_dns_forward_loops_total", (), self.loops)
        for reason, count in sorted(self.unwanted.items()):
            yield Sample("vipd_dns_forward_unwanted_total", (("reason", reason),), count)
        yield from self._of_upstreams()

    def _of_upstreams(self) -> Iterator[Sample]:
        for upstream, count in sorted(self.tcp_reused.items()):
            labels = (*_to(upstream), ("proto", "tcp"))
            yield Sample("coredns_proxy_conn_cache_hits_total", labels, count)
        for upstream, count in sorted(self.tcp_opened.items()):
            labels = (*_to(upstream), ("proto", "tcp"))
            yield Sample("coredns_proxy_conn_cache_misses_total", labels, count)
        for (upstream, rcode), histogram in sorted(self._durations.items()):
            labels = (*_to(upstream), ("rcode", rcode))
            yield from histogram.samples("coredns_proxy_request_duration_seconds", labels)


def _to(upstream: str) -> Labels:
    return (("proxy_name", "forward"), ("to", upstream))
