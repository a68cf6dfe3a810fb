"""What `vipd bench dns` measures, of whom, in which order, and what must come out. Pure.

Lives here: the names of variants, measures and figures, the targets. Must not: start anything.
"""

from collections.abc import Sequence
from enum import StrEnum

from msgspec import Struct

from vipd.bench.datapath_plan import Figure, Target

VIPD, UNBOUND, KNOT, DNSMASQ, COREDNS = "vipd", "unbound", "knot", "dnsmasq", "coredns"
VARIANTS = (VIPD, UNBOUND, KNOT, DNSMASQ, COREDNS)
"""In the order of the table."""
FORWARDERS = (VIPD, UNBOUND, DNSMASQ, COREDNS)
"""Variants that ask others; Knot DNS does not."""
NODE, CLIENT, UPSTREAM = "node", "client-1", "web-1"
"""Hosts of the lab: the server under test, a pod that asks it, and whom it asks."""
DOMAIN = "cluster.local"
FORWARDED_DOMAIN = "bench.example"
MOST_SERVICES = 59_000
LEAST_SERVICES = 100
"""As many are asked while others are synced."""
MOST_RATE = 20_000
"""More than that, the generator of given loads is late itself."""


class Measure(StrEnum):
    """What one turn of a variant consists of, in this order."""

    START = "start"
    KNOWN = "known"
    UNKNOWN = "unknown"
    SRV = "srv"
    MIXED = "mixed"
    TCP = "tcp"
    FORWARDED = "forwarded"
    LATENCY = "latency"
    MEMORY = "memory"
    HEADLESS = "headless"
    CHANGE = "change"
    SYNC = "sync"


THROUGHPUT = (
    Measure.KNOWN,
    Measure.UNKNOWN,
    Measure.SRV,
    Measure.MIXED,
    Measure.TCP,
    Measure.FORWARDED,
)
"""Measures of as many questions as a server answers."""
OF_DAEMON = (Measure.CHANGE, Measure.SYNC)
"""Measures of the daemon with a dataplane; the other servers have no such thing."""


def _throughput(measure: Measure, title: str) -> tuple[Figure, Figure]:
    cpu = f"{measure}_cpu"
    return (
        Figure(name=measure, measure=measure, title=title, unit="/s", digits=0),
        Figure(name=cpu, measure=measure, title=f"{title}, of CPU", unit="/s", digits=0),
    )


FIGURES = (
    Figure(name="start", measure=Measure.START, title="start", unit="s", digits=2),
    *_throughput(Measure.KNOWN, "known names"),
    *_throughput(Measure.UNKNOWN, "unknown names"),
    *_throughput(Measure.SRV, "SRV"),
    *_throughput(Measure.MIXED, "mixed"),
    *_throughput(Measure.TCP, "known, TCP"),
    *_throughput(Measure.FORWARDED, "forwarded, cached"),
    Figure(name="p50", measure=Measure.LATENCY, title="at given load p50", unit="µs", digits=0),
    Figure(name="p99", measure=Measure.LATENCY, title="at given load p99", unit="µs", digits=0),
    Figure(name="rss", measure=Measure.MEMORY, title="memory", unit="MB", digits=1),
    Figure(
        name="headless", measure=Measure.HEADLESS, title="memory, headless", unit="MB", digits=1
    ),
    Figure(name="change_p50", measure=Measure.CHANGE, title="change p50", unit="ms", digits=1),
    Figure(name="change_p99", measure=Measure.CHANGE, title="change p99", unit="ms", digits=1),
    Figure(name="sync_p50", measure=Measure.SYNC, title="in a sync p50", unit="ms", digits=2),
    Figure(name="sync_p99", measure=Measure.SYNC, title="in a sync p99", unit="ms", digits=2),
)

RATIO_TARGETS = {"known": Target(0.7, 1.0, True), "known_cpu": Target(0.7, 1.0, True)}
"""vipd to unbound. The second is what is left of the first where other programs are at work."""
TARGETS = {
    "known": Target(60_000, 90_000, True),
    "change_p99": Target(20, 5, False),
    "rss": Target(90, 60, False),
    "sync_p99": Target(5, 2, False),
}
"""Of vipd, in the unit of the figure."""


class Plan(Struct, frozen=True, kw_only=True):
    """What a user asked for."""

    variants: tuple[str, ...]
    measures: tuple[Measure, ...]
    rounds: int
    seconds: int
    """Length of each measure of throughput or latency."""
    services: int
    headless: int
    """Endpoints of the one Service whose memory is measured beside."""
    rate: int
    """Questions a second under which latency is measured."""
    changes: int


def expected(measure: str, variant: str) -> bool:
    """Return whether a variant has such a figure at all."""
    if measure == Measure.FORWARDED:
        return variant in FORWARDERS
    return variant == VIPD or measure not in OF_DAEMON


def figures_of(measures: Sequence[Measure]) -> tuple[Figure, ...]:
    """Return the figures that come of some measures, in the order of the table."""
    return tuple(one for one in FIGURES if one.measure in measures)
