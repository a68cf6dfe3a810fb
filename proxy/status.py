"""What the daemon says of itself: the record behind `vipd status` and the health that it implies.

Lives here: the record, its JSON shape and what counts as degraded. Must not: measure anything.
"""

from collections.abc import Container, Iterable, Iterator

from msgspec import Struct, structs

from vipd.backends.usage import Usage
from vipd.proxy.counted import WorkerView
from vipd.proxy.words import counted

LATE_SECONDS = 10.0
"""A commit that takes longer is told of; after a minute /healthz says no (http/health.py)."""


class LastSync(Struct, frozen=True):
    """One sync that was committed. Times are seconds since the epoch and milliseconds."""

    at: float
    milliseconds: float
    virtual_servers: int
    """Virtual servers that the sync changed."""
    objects: int
    """Kernel objects that it added or removed."""
    full: bool
    """Whether the kernel was observed first (start, repair), or only a change was planned."""


class SwitchReport(Struct):
    """One switch that was asked for; it changes until `ended` is set. Times are epoch seconds."""

    origin: str
    target: str
    started: float
    steps: list[str] = []
    """What was begun so far: probe, overlap, verify."""
    ended: float | None = None
    failure: str = ""
    """Why it did not succeed; nothing is changed then. Empty while it is under way, and when it
    has succeeded."""
    waits: str = ""
    """The mode that serves until the target can: the two answer on the same addresses, and the old
    one has to drain first. Empty where the target serves at once."""


class DrainView(Struct, frozen=True):
    """A dataplane that only carries old flows until `deadline` (epoch seconds)."""

    mode: str
    deadline: float
    flows: int | None
    """Flows left; None: not counted yet."""
    where: dict[str, int] = {}
    """The virtual servers with most of them."""


class RepairView(Struct, frozen=True, kw_only=True):
    """What others changed of the dataplane, and was put right again."""

    count: int
    """Since the start."""
    at: float
    """When the last was done, in seconds since the epoch."""
    what: tuple[str, ...]
    """The first of what was changed then."""
    by: str
    """Who it was, as far as it is known."""
    waiting: dict[str, float] = {}
    """Who goes on doing it, and how many seconds are waited before the next repair."""


class DnsView(Struct, frozen=True, kw_only=True):
    """How the DNS server is. Numbers are those of all workers together, since they were started."""

    workers: int
    """Processes that say how they are, of `wanted`."""
    wanted: int
    restarts: int
    synced: bool
    """Whether each of them was told of all services."""
    services: int
    """Services that have names."""
    questions: int
    failed: int
    """Questions that were answered with SERVFAIL."""
    upstreams: dict[str, bool | None]
    """Where names of others are asked for, and whether it answers; None: not heard yet."""


class Status(Struct, frozen=True, kw_only=True):
    """State of a daemon. Lists hold sentences that name their object; empty lists are good news."""

    version: str
    pid: int
    mode: str
    node: str
    manifests: tuple[str, ...]
    kubeconfig: str | None = None
    """File that leads to the API server; empty: what a pod is given; None: manifests."""
    started: float
    synced: bool
    """Whether everything that the source knew at the start has been programmed."""
    services: int
    virtual_servers: int
    endpoints: int
    """Endpoints of virtual servers, each counted once for each it serves."""
    syncs: int
    failed_syncs: int
    last_sync: LastSync | None
    failure: str
    """Why the last sync failed and is tried again; empty when it did not."""
    problems: tuple[str, ...]
    """Objects and files that could not be read."""
    conflicts: tuple[str, ...]
    """Addresses that two services claim."""
    rejected: tuple[str, ...]
    """Virtual servers that the kernel refused."""
    notes: tuple[str, ...]
    """What is legal but seldom meant, such as a node name that no Node object has."""
    passed_over: tuple[str, ...]
    """Kinds of objects that vipd has no use for, with their number."""
    why_mode: str = ""
    """Why this mode, where the configuration leaves it open."""
    switch: SwitchReport | None = None
    """The last switch of the mode, under way or ended."""
    drains: tuple[DrainView, ...] = ()
    trouble: tuple[str, ...] = ()
    """What keeps a dataplane from being brought up, or from being left."""
    departed: int = 0
    """Endpoints that left and may still have flows from before."""
    flows_cut: int = 0
    """Flows that were ended at a deadline, since the start."""

    dns_listen: tuple[str, ...] = ()
    """Where the DNS server answers: ``ADDRESS:PORT``, IPv6 in brackets. Empty: there is none."""
    dns_elsewhere: tuple[str, ...] = ()
    """Those of them whose address is not the node's: no question comes there."""

    http: tuple[str, ...] = ()
    """What answers over HTTP, and where: ``healthz 127.0.0.1:10256``."""

    repairs: RepairView | None = None
    """None where nothing had to be put right since the start."""

    workers: tuple[WorkerView, ...] = ()
    """Processes that forward, those that take nothing new last; told to whoever asks for them."""
    workers_wanted: int = 0
    """How many there should be, those not counted that take nothing new; 0: not asked for."""
    dns: DnsView | None = None
    """None where there is no DNS server; told to whoever asks for workers."""

    degraded: bool = False
    """Whether something that an operator should look at keeps some service from being served:
    filled in by `judged`."""


def judged(status: Status) -> Status:
    """Return the status with `degraded` filled in."""
    bad = (
        status.failure,
        status.problems,
        status.conflicts,
        status.rejected,
        status.trouble,
    )
    dns = status.dns
    unnamed = dns is not None and (
        not dns.synced
        or dns.workers < dns.wanted
        or (bool(dns.upstreams) and all(one is False for one in dns.upstreams.values()))
    )
    serving = sum(not one.retired for one in status.workers)
    few = unnamed or serving < status.workers_wanted
    return structs.replace(status, degraded=not status.synced or few or any(bad))


def late(seconds: float) -> Iterator[str]:
    """Yield what there is to say of a change that has waited for so long for its commit."""
    if seconds >= LATE_SECONDS:
        yield f"a change has been waiting for its commit for {seconds:.0f} s"


def worker_trouble(told: Usage) -> Iterator[str]:
    """Yield what keeps workers from serving, or from saying so: those silent, and those missing."""
    for one in told.silent:
        yield f"worker {one.number} (pid {one.pid}) does not answer"
    numbers = {one.number for one in told.workers if not one.retired}
    missing = told.wanted - len(numbers | {one.number for one in told.silent})
    if missing > 0:
        yield f"{missing} of {counted(told.wanted, 'worker')} not there"


def worker_notes(told: Usage) -> Iterator[str]:
    """Yield what keeps workers from taking more, and passes."""
    for one in told.workers:
        if one.full and not one.retired:
            yield (
                f"worker {one.number} (pid {one.pid}) is full: {one.open} open, at most "
                f"{one.files} files; new connections wait (LimitNOFILE= of systemd)"
            )


def places(listens: Iterable[str], elsewhere: Container[str]) -> str:
    """Return where is answered as people read it; where no question can come is marked."""
    return ", ".join(f"{one} (not the node's)" if one in elsewhere else one for one in listens)


def dns_line(listens: Iterable[str], told: DnsView | None, elsewhere: Container[str] = ()) -> str:
    """Return what people read of the DNS server: where, whether all is known, what was asked."""
    words = [places(listens, elsewhere)]
    if told is None:
        return words[0]
    if told.workers < told.wanted:
        words.append(f"{told.wanted - told.workers} of {told.wanted} workers do not answer")
    if told.workers:
        words.append(f"{told.services} services" if told.synced else "services not known yet")
    words.append(f"{told.questions} questions, {told.failed} failed")
    if told.upstreams:
        states = list(told.upstreams.values())
        unheard = f", {states.count(None)} not heard yet" if None in states else ""
        words.append(f"{states.count(True)} of {len(states)} upstreams up{unheard}")
    if told.restarts:
        words.append(f"{told.restarts} restarts")
    return "; ".join(words)


def repair_lines(repairs: RepairView, now: float) -> Iterator[str]:
    """Yield what people read of repairs."""
    ago = f"{max(0.0, now - repairs.at):.0f} s ago"
    yield f"{repairs.count}, the last {ago}: {repairs.what[0]}, by {repairs.by}"
    for party, seconds in repairs.waiting.items():
        yield f"{party or 'somebody'} goes on: the next repair waits for {seconds:.0f} s"


def drain_lines(drains: Iterable[DrainView], now: float) -> Iterator[str]:
    """Yield what people read of dataplanes that drain: flows, until when, and where they are."""
    for one in drains:
        flows = (
            "flows not counted yet" if one.flows is None else f"{counted(one.flows, 'flow')} left"
        )
        yield f"{one.mode}: {flows}, until they end or for {max(0.0, one.deadline - now):.0f} s"
        yield from (f"  {count} on {server}" for server, count in one.where.items())
