"""What is exported of all processes together, under CoreDNS's names where the meaning is the same.

Lives here: the names, which of them are counters, the sum over processes, and the text that
Prometheus reads. Pure. Must not: ask processes, or speak HTTP (metrics_server.py).
Source: reference dns.md 3.4; Prometheus's text format 0.0.4.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from vipd.dns.server.counters import SECONDS, SIZES
from vipd.dns.server.messages import Told

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Labels = tuple[tuple[str, str], ...]
Key = tuple[str, Labels]
Values = dict[Key, float]
How = Literal["counter", "gauge", "most", "least"]
"""How values of several processes become one: counters and gauges are added. What the daemon counts
is the most that one of them was told."""


class Metric(NamedTuple):
    """A family of samples."""

    how: How
    help: str


METRICS: Mapping[str, Metric] = {
    "coredns_dns_requests_total": Metric("counter", "Questions."),
    "coredns_dns_responses_total": Metric("counter", "Replies; plugin kubernetes: not forwarded."),
    "coredns_dns_request_size_bytes": Metric("counter", "Lengths of questions."),
    "coredns_dns_response_size_bytes": Metric("counter", "Lengths of replies."),
    "coredns_dns_request_duration_seconds": Metric(
        "counter", "Time to a reply; of questions that arrive together, the mean."
    ),
    "coredns_panics_total": Metric("counter", "Questions that this program did not cope with."),
    "coredns_acl_blocked_requests_total": Metric(
        "counter", "Questions of sources that may not ask, answered REFUSED."
    ),
    "coredns_acl_dropped_requests_total": Metric(
        "counter", "The same, not answered because there were too many."
    ),
    "coredns_reload_failed_total": Metric(
        "most", "Changed configurations that were wrong, since the daemon's start."
    ),
    "coredns_cache_requests_total": Metric("counter", "Forwarded questions."),
    "coredns_cache_hits_total": Metric("counter", "Answered from the cache."),
    "coredns_cache_misses_total": Metric("counter", "Not in the cache."),
    "coredns_cache_served_stale_total": Metric("counter", "Answered from behind the end."),
    "coredns_cache_prefetch_total": Metric("counter", "Asked again while they were in use."),
    "coredns_cache_drops_total": Metric("counter", "Malformed replies of upstreams."),
    "coredns_cache_entries": Metric("gauge", "Replies in the cache."),
    "coredns_cache_evictions_total": Metric("counter", "Replies that had to make room."),
    "coredns_forward_max_concurrent_rejects_total": Metric("counter", "Too many under way."),
    "coredns_forward_healthcheck_broken_total": Metric("counter", "Asked though all are down."),
    "coredns_local_localhost_requests_total": Metric("counter", "Questions for localhost."),
    "coredns_hosts_entries": Metric("most", "Names of the hosts file."),
    "coredns_hosts_reload_timestamp_seconds": Metric("most", "When it was read."),
    "coredns_proxy_request_duration_seconds": Metric("counter", "Time to an upstream's reply."),
    "coredns_proxy_healthcheck_failures_total": Metric("counter", "Failures of an upstream."),
    "coredns_proxy_conn_cache_hits_total": Metric("counter", "Questions over a kept connection."),
    "coredns_proxy_conn_cache_misses_total": Metric("counter", "Connections opened."),
    "coredns_build_info": Metric("most", "1; the version is vipd's."),
    "vipd_dns_build_info": Metric("most", "1; the version is a label."),
    "vipd_dns_workers": Metric("gauge", "Processes that answer."),
    "vipd_dns_synced": Metric("least", "1 when the cluster is known."),
    "vipd_dns_stale": Metric("most", "1 while nobody tells changes: the daemon is away."),
    "vipd_dns_stale_seconds": Metric("most", "For how long nobody has told changes."),
    "vipd_dns_last_event_age_seconds": Metric("most", "Since the last change was told."),
    "vipd_dns_zone_services": Metric("least", "Services that have names."),
    "vipd_dns_zone_serial": Metric("least", "Serial of the SOA records."),
    "vipd_dns_prebuilt_replies": Metric("gauge", "Replies that are kept ready."),
    "vipd_dns_prebuilt_bytes": Metric("gauge", "Their memory, about."),
    "vipd_dns_tcp_connections": Metric("gauge", "Open connections of clients."),
    "vipd_dns_waiting_questions": Metric("gauge", "Questions that wait for upstreams."),
    "vipd_dns_worker_restarts_total": Metric("most", "Processes that had to be started again."),
    "vipd_dns_receive_queue_drops_total": Metric(
        "counter", "Questions that the kernel had no room for."
    ),
    "vipd_dns_events_total": Metric("counter", "What else happened, by what."),
    "vipd_dns_cache_bytes": Metric("gauge", "Memory of the cache."),
    "vipd_dns_forward_questions": Metric("gauge", "Different questions under way."),
    "vipd_dns_forward_coalesced_total": Metric("counter", "Questions that joined an equal one."),
    "vipd_dns_forward_hedged_total": Metric("counter", "Attempts beyond the first."),
    "vipd_dns_forward_truncated_total": Metric("counter", "Truncated replies of upstreams."),
    "vipd_dns_forward_private_total": Metric("counter", "Replies with private addresses."),
    "vipd_dns_forward_special_total": Metric("counter", "Special names, answered here."),
    "vipd_dns_forward_static_total": Metric("counter", "Answered from records and hosts."),
    "vipd_dns_forward_guarded_total": Metric("counter", "Names of the cluster, not forwarded."),
    "vipd_dns_forward_loops_total": Metric("counter", "Upstreams that led back here."),
    "vipd_dns_forward_unwanted_total": Metric("counter", "What was no reply, by why."),
    "vipd_dns_forward_upstream_down": Metric("most", "1 where an upstream is asked last."),
    "vipd_dns_forward_upstream_looping": Metric("most", "1 where it leads back here."),
    "vipd_dns_forward_upstream_in_flight": Metric("gauge", "Attempts under way."),
    "vipd_dns_forward_upstream_round_trip_seconds": Metric("most", "Smoothed round trip."),
}
_HISTOGRAM = ("_bucket", "_sum", "_count")
_SERVER_ZONE_VIEW = ("coredns_cache_", "coredns_acl_")
_APART = ("udp_dropped_full", "inside_errors", "sources_refused", "refusals_unsaid")
"""Counts that have a name of their own."""


def values_of(told: Told, server: str) -> Values:
    """Return what one process tells, by name and labels. `server` is CoreDNS's label of that name.

    The label zone is a dot as in CoreDNS where one server block answers for all names.
    """
    here: Labels = (("server", server), ("zone", "."), ("view", ""))
    return {(name, labels): value for name, labels, value in _values(told, here)}


def _values(told: Told, here: Labels) -> Iterator[tuple[str, Labels, float]]:
    for spelled, count in told.types.items():
        proto, family, kind = spelled.split(" ")
        labels = (*here, ("proto", proto), ("family", family), ("type", kind))
        yield "coredns_dns_requests_total", labels, count
    for rcode, count in told.rcodes.items():
        forwarded = told.forwarded_rcodes.get(rcode, 0)
        for plugin, part in (("kubernetes", count - forwarded), ("forward", forwarded)):
            if part > 0:
                labels = (*here, ("rcode", rcode), ("plugin", plugin))
                yield "coredns_dns_responses_total", labels, part
    name = "coredns_dns_request_duration_seconds"
    yield from _histogram(name, here, SECONDS, told.durations, told.sums.get("duration", 0))
    for kind, sizes in (("request", told.request_sizes), ("response", told.response_sizes)):
        for proto, buckets in sizes.items():
            labels, total = (*here, ("proto", proto)), told.sums.get(f"{kind} {proto}", 0)
            yield from _histogram(f"coredns_dns_{kind}_size_bytes", labels, SIZES, buckets, total)
    counts = told.counters
    unsaid = counts.get("refusals_unsaid", 0)
    yield "coredns_panics_total", (), counts.get("inside_errors", 0)
    blocked = counts.get("sources_refused", 0) - unsaid
    yield "coredns_acl_blocked_requests_total", here, blocked
    yield "coredns_acl_dropped_requests_total", here, unsaid
    yield "vipd_dns_receive_queue_drops_total", (), counts.get("udp_dropped_full", 0)
    for event, count in counts.items():
        if event not in _APART:
            yield "vipd_dns_events_total", (("event", event),), count
    yield from _gauges(told)
    for name, more, value in told.samples:
        labels = tuple((one, text) for one, text in more)
        with_server = name.startswith(_SERVER_ZONE_VIEW)
        yield name, (*_cache_labels(here), *labels) if with_server else labels, value


def _cache_labels(here: Labels) -> Labels:
    """CoreDNS's cache plugin says zones where the server says zone."""
    return tuple([("zones" if name == "zone" else name, value) for name, value in here])


def _gauges(told: Told) -> Iterator[tuple[str, Labels, float]]:
    yield "vipd_dns_build_info", (("version", told.version),), 1
    version = ("goversion", ""), ("revision", ""), ("version", f"vipd-{told.version}")
    yield "coredns_build_info", version, 1
    yield "vipd_dns_workers", (), 1
    yield "vipd_dns_synced", (), told.synced
    yield "vipd_dns_stale", (), told.stale_seconds is not None
    yield "vipd_dns_stale_seconds", (), told.stale_seconds or 0
    yield "vipd_dns_last_event_age_seconds", (), told.fed_seconds
    yield "vipd_dns_zone_services", (), told.services
    yield "vipd_dns_zone_serial", (), told.serial
    yield "vipd_dns_prebuilt_replies", (), told.zone.get("prebuilt", 0)
    yield "vipd_dns_prebuilt_bytes", (), told.zone.get("prebuilt_bytes", 0)
    yield "vipd_dns_tcp_connections", (), told.connections
    yield "vipd_dns_waiting_questions", (), told.waiting
    yield "vipd_dns_worker_restarts_total", (), told.supervised.restarts
    yield "coredns_reload_failed_total", (), told.supervised.refused


def _histogram(
    name: str, labels: Labels, bounds: Sequence[float], counts: Sequence[int], total: float
) -> Iterator[tuple[str, Labels, float]]:
    if not counts:
        return
    so_far = 0
    for bound, count in zip((*bounds, None), counts, strict=True):
        so_far += count
        le = "+Inf" if bound is None else _number(bound)
        yield f"{name}_bucket", (*labels, ("le", le)), so_far
    yield f"{name}_sum", labels, total
    yield f"{name}_count", labels, so_far


class Sum:
    """Values of all processes together; counters never go back when a process ends or comes.

    The process that adds them up begins with 0: what its siblings counted before is left out, as if
    all had begun with it, so that what Prometheus sees is a counter that was reset. What one had
    counted that has ended since stays.
    """

    def __init__(self) -> None:
        self._base: Values = {}
        self._latest: dict[int, Values] = {}

    def meet(self, number: int, values: Values) -> None:
        """Take a process in, in the place of one of that number."""
        self.lose(number)
        for key, value in values.items():
            if _how(key[0]) == "counter":
                self._base[key] = self._base.get(key, 0) - value
        self._latest[number] = values

    def take(self, number: int, values: Values) -> None:
        """Take what a process says now."""
        self._latest[number] = values

    def silence(self, number: int) -> None:
        """Keep what a process has counted that does not answer; how it is, nobody knows."""
        latest = self._latest.get(number, {})
        self._latest[number] = {
            key: value for key, value in latest.items() if _how(key[0]) == "counter"
        }

    def lose(self, number: int) -> None:
        """Keep what a process has counted that has ended."""
        for key, value in self._latest.pop(number, {}).items():
            if _how(key[0]) == "counter":
                self._base[key] = self._base.get(key, 0) + value

    def values(self) -> Values:
        """Return the values of all together."""
        found: Values = dict(self._base)
        for values in self._latest.values():
            for key, value in values.items():
                before, how = found.get(key), _how(key[0])
                if before is None:
                    found[key] = value
                elif how == "most":
                    found[key] = max(before, value)
                elif how == "least":
                    found[key] = min(before, value)
                else:
                    found[key] = before + value
        return {key: max(value, 0) for key, value in found.items()}


def exposition(values: Values) -> bytes:
    """Return what Prometheus reads; a family's samples stand together, in the order of METRICS."""
    families: dict[str, list[str]] = {name: [] for name in METRICS}
    for (name, labels), value in values.items():
        told = ",".join([f'{one}="{_escaped(text)}"' for one, text in labels])
        line = f"{name}{{{told}}} {_number(value)}" if told else f"{name} {_number(value)}"
        families.setdefault(_family(name), []).append(line)
    return "".join(_text(name, lines) for name, lines in families.items() if lines).encode()


def _text(name: str, lines: Iterable[str]) -> str:
    metric = METRICS.get(name)
    head = f"# HELP {name} {metric.help if metric else name}\n"
    lines = list(lines)
    if any(line.startswith(f"{name}_bucket") for line in lines):
        kind = "histogram"
    else:
        kind = "counter" if name.endswith("_total") else "gauge"
    return f"{head}# TYPE {name} {kind}\n" + "".join([f"{line}\n" for line in lines])


def _family(name: str) -> str:
    for end in _HISTOGRAM:
        if name.endswith(end) and name.removesuffix(end) in METRICS:
            return name.removesuffix(end)
    return name


def _how(name: str) -> How:
    metric = METRICS.get(_family(name))
    if metric is not None:
        return metric.how
    return "counter" if name.endswith(("_total", *_HISTOGRAM)) else "gauge"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
