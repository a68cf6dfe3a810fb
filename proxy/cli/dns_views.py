"""What programs read of DNS: the shape of `vipd dns status --json`.

Lives here: the documents, by name (docs/dns.md), and how they follow from what workers say. Must
not: ask anybody. What workers say to the daemon is another matter, and may change with versions.
"""

from collections.abc import Iterable

from msgspec import Struct

from vipd.dns.server.messages import Told
from vipd.dns.server.service import DnsStatus

_OF_UPSTREAM = "vipd_dns_forward_upstream_"


class WorkerView(Struct, frozen=True, kw_only=True):
    """One process. Counts are since it was started."""

    number: int
    pid: int
    version: str
    answers: bool
    """Whether it says how it is; nothing below means anything otherwise."""
    synced: bool = False
    """Whether it was told of all services."""
    services: int = 0
    serial: int = 0
    told_seconds_ago: float = 0.0
    stale_seconds: float | None = None
    """For how long nobody tells it changes; null while the daemon does."""
    questions: int = 0
    by_type: dict[str, int] = {}
    """Questions by ``PROTOCOL FAMILY TYPE``."""
    by_rcode: dict[str, int] = {}
    """Replies by rcode."""
    events: dict[str, int] = {}
    """What else was counted: as the label `event` of vipd_dns_events_total."""
    connections: int = 0
    waiting: int = 0


class UpstreamView(Struct, frozen=True, kw_only=True):
    """Who is asked for names of others; where workers differ, as the one that thinks worst."""

    address: str
    state: str
    """`up`, `down`, `looping`, or `not heard yet`."""
    round_trip_seconds: float | None
    in_flight: int
    """Questions under way, of all workers."""


class StatusView(Struct, frozen=True, kw_only=True):
    """The whole document."""

    degraded: bool
    listens: tuple[str, ...]
    not_the_nodes: tuple[str, ...]
    """Those of `listens` where no question can come."""
    http: tuple[str, ...]
    workers_wanted: int
    workers: tuple[WorkerView, ...]
    upstreams: tuple[UpstreamView, ...]
    restarts: int
    refused: str
    """What is wrong with the configuration file as it is now."""
    restart_needed: tuple[str, ...]
    """Its fields that count at the next start only."""


def status_view(told: DnsStatus) -> StatusView:
    """Return what programs read."""
    silent = [WorkerView(number=one, pid=0, version="", answers=False) for one in silent_of(told)]
    workers = sorted([*map(_worker, told.workers), *silent], key=lambda one: one.number)
    return StatusView(
        degraded=is_degraded(told),
        listens=told.listens,
        not_the_nodes=told.elsewhere,
        http=told.http,
        workers_wanted=told.wanted,
        workers=tuple(workers),
        upstreams=tuple(upstreams(told.workers)),
        restarts=told.restarts,
        refused=told.refused,
        restart_needed=told.restart_needed,
    )


def is_degraded(told: DnsStatus) -> bool:
    """Return whether some question is not answered, or not from what should be known."""
    stale = any(one.stale_seconds is not None for one in told.workers)
    unsynced = not all(one.synced for one in told.workers)
    there = upstreams(told.workers)
    lost = bool(there) and all(one.state in ("down", "looping") for one in there)
    return bool(told.listens and (stale or unsynced or lost or told.elsewhere or silent_of(told)))


def silent_of(told: DnsStatus) -> list[int]:
    """Return the numbers of the workers that do not say how they are."""
    return sorted({*range(told.wanted)} - {one.number for one in told.workers})


def upstreams(workers: Iterable[Told]) -> list[UpstreamView]:
    """Return how each upstream is, sorted."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in (one for worker in workers for one in worker.samples):
        upstream = dict(labels).get("to")
        if upstream is not None and name.startswith(_OF_UPSTREAM):
            there = found.setdefault(upstream, {})
            what = name.removeprefix(_OF_UPSTREAM)
            is_sum = what == "in_flight"
            before = there.get(what, 0)
            there[what] = before + value if is_sum else max(before, value)
    return [_upstream(address, values) for address, values in sorted(found.items())]


def _upstream(address: str, values: dict[str, float]) -> UpstreamView:
    seconds = values.get("round_trip_seconds")
    if values.get("looping"):
        state = "looping"
    elif values.get("down"):
        state = "down"
    else:
        state = "not heard yet" if seconds is None else "up"
    return UpstreamView(
        address=address,
        state=state,
        round_trip_seconds=seconds,
        in_flight=int(values.get("in_flight", 0)),
    )


def _worker(one: Told) -> WorkerView:
    return WorkerView(
        number=one.number,
        pid=one.pid,
        version=one.version,
        answers=True,
        synced=one.synced,
        services=one.services,
        serial=one.serial,
        told_seconds_ago=one.fed_seconds,
        stale_seconds=one.stale_seconds,
        questions=sum(one.types.values()),
        by_type=one.types,
        by_rcode=one.rcodes,
        events=one.counters,
        connections=one.connections,
        waiting=one.waiting,
    )
