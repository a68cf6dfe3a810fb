"""How people and programs are told what a dataplane has counted: views of backends/usage.py.

Lives here: their JSON shape. Pure. Must not: count, or format for a terminal (cli/). What a mode
does not count is left out.
"""

from msgspec import Struct

from vipd.backends.usage import EndpointUsage, ServerUsage, WorkerUsage


class SetAsideView(Struct, frozen=True):
    """A worker that gives an endpoint no new connection, and for how many seconds yet."""

    worker: int
    seconds: float


class EndpointCountersView(Struct, frozen=True, omit_defaults=True):
    """An endpoint of which something was counted."""

    address: str
    """``address:port``, IPv6 in brackets."""
    open: int | None = None
    so_far: int | None = None
    failures: int | None = None
    """How often it refused or timed out."""
    set_aside: list[SetAsideView] = []
    departed: bool = False
    """No endpoint any more; its connections go on."""


class CountersView(Struct, frozen=True, omit_defaults=True):
    """What was counted of a virtual server since whoever counts began to serve it."""

    open: int | None = None
    """Connections, and sessions of UDP."""
    so_far: int | None = None
    denied: int | None = None
    """Connections of sources that are not allowed."""
    unserved: int | None = None
    """Connections for which there was no endpoint."""
    remembered: int | None = None
    """Clients that are remembered for affinity."""
    forgotten: int | None = None
    """Clients that were forgotten before their time, for lack of room."""
    workers: list[int] = []
    """Numbers of the workers that listen for it."""
    endpoints: list[EndpointCountersView] = []


class WorkerView(Struct, frozen=True):
    """A process that forwards."""

    number: int
    pid: int
    up_seconds: float
    restarts: int
    """How often it ended and was started again, since the daemon began."""
    retired: bool
    """It takes nothing new, and only ends what is open."""
    listeners: int
    open: int
    counters: dict[str, int]
    """What it has counted in all since it began."""
    missing: int = 0
    """Listeners that it should have and cannot have yet."""
    files: int = 0
    """How many files it may have open; 0: not known."""
    full: bool = False
    """It accepts nothing now, for lack of descriptors or memory, or at the most connections."""


def counters(told: ServerUsage) -> CountersView:
    """Return the view of what was counted of a virtual server."""
    return CountersView(
        open=told.open,
        so_far=told.so_far,
        denied=told.denied,
        unserved=told.unserved,
        remembered=told.remembered,
        forgotten=told.forgotten,
        workers=list(told.workers),
        endpoints=[_endpoint(one) for one in told.endpoints],
    )


def _endpoint(told: EndpointUsage) -> EndpointCountersView:
    return EndpointCountersView(
        address=str(told.endpoint),
        open=told.open,
        so_far=told.so_far,
        failures=told.failures,
        set_aside=[SetAsideView(one.worker, round(one.seconds, 3)) for one in told.set_aside],
        departed=told.departed,
    )


def worker(told: WorkerUsage) -> WorkerView:
    """Return the view of a worker."""
    return WorkerView(
        number=told.number,
        pid=told.pid,
        up_seconds=round(told.seconds, 3),
        restarts=told.restarts,
        retired=told.retired,
        listeners=told.listeners,
        open=told.open,
        counters=dict(told.counters),
        missing=told.missing,
        files=told.files,
        full=told.full,
    )
