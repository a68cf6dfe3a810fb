"""vipd's own metrics, from what the parts of the daemon keep and from its status.

Lives here: which fact stands behind which name of ours. Must not: format (families.py).
"""

import platform
import time

from vipd.backends.counts import Outcome
from vipd.backends.registry import MODES
from vipd.proxy.metrics import host
from vipd.proxy.metrics.connections import OTHERS, Connections
from vipd.proxy.metrics.families import Families
from vipd.proxy.metrics.subjects import Hearing, Locking, Refusing, Subjects, WritingEvents
from vipd.proxy.names import ServicePortName
from vipd.proxy.status import Status
from vipd.proxy.version import VERSION

MOST_REJECTED = 100
"""Service ports that are named as rejected."""


def collect(families: Families, subjects: Subjects, status: Status) -> None:
    """Add everything under our own names."""
    _state(families, status)
    _rejected(families, subjects)
    _connections(families, subjects)
    _syncs(families, subjects)
    _sources(families, subjects)
    _repairs(families, subjects)
    _kernel(families, subjects)
    _flows(families, subjects, status)
    _workers(families, status)
    _dns(families, status)


def _state(families: Families, status: Status) -> None:
    families.add("vipd_build_info", 1, VERSION, platform.python_version())
    for mode in MODES:
        families.add("vipd_mode", mode == status.mode, mode)
    for name, value in (
        ("synced", status.synced),
        ("degraded", status.degraded),
        ("services", status.services),
        ("virtual_servers", status.virtual_servers),
        ("endpoints", status.endpoints),
        ("problems", len(status.problems)),
        ("conflicts", len(status.conflicts)),
        ("troubles", len(status.trouble)),
    ):
        families.add(f"vipd_{name}", value)


def _port(owner: ServicePortName) -> tuple[str, str, str, str]:
    if owner is OTHERS:
        return owner.service.namespace, owner.service.name, "", ""
    return owner.service.namespace, owner.service.name, owner.port, owner.protocol.value


def _rejected(families: Families, subjects: Subjects) -> None:
    claims = subjects.sync.table.claims
    keys = list(subjects.switching.serving.rejected)
    owners = {claims[key][0].owner for key in keys if claims.get(key)}
    families.add("vipd_virtual_servers_rejected", len(keys))
    families.add("vipd_services_rejected", len({one.service for one in owners}))
    for owner in sorted(owners)[:MOST_REJECTED]:
        families.add("vipd_service_rejected", 1, *_port(owner))


def _connections(families: Families, subjects: Subjects) -> None:
    counters = subjects.counted
    if counters is None:
        return
    families.add("vipd_connection_counts_failures_total", counters.failures)
    age = counters.age()
    if age is not None and counters.took is not None:
        families.add("vipd_connection_counts_age_seconds", age)
        families.add("vipd_connection_counts_read_seconds", counters.took)
    _sums(families, counters.connections)


def _sums(families: Families, connections: Connections) -> None:
    for owner, told in list(connections.services.items()):
        port = _port(owner)
        if told[Outcome.GIVEN]:
            families.add("vipd_service_connections_total", told[Outcome.GIVEN], *port)
        for why, number in (
            ("rejected", told[Outcome.REJECTED]),
            ("dropped", told[Outcome.DROPPED]),
            ("unserved", told[Outcome.UNSERVED]),
            ("denied", connections.denied(owner)),
        ):
            if number:
                families.add("vipd_service_refused_connections_total", number, *port, why)
    for (owner, endpoint), number in list(connections.endpoints.items()):
        families.add("vipd_endpoint_connections_total", number, *_port(owner), endpoint)


def _syncs(families: Families, subjects: Subjects) -> None:
    told, serving = subjects.programming, subjects.switching.serving
    counts = dict.fromkeys((True, False), 0)
    for full, number in list(told.counts.items()):
        counts[full] += number
    for full, number in counts.items():
        families.add("vipd_syncs_total", number, _word(full))
        failed = [
            number
            for kinds, number in list(told.failed_syncs.items())
            if kinds == (serving.mode, full)
        ]
        families.add("vipd_sync_failures_total", sum(failed), serving.mode, _word(full))
    families.add("vipd_sync_failing", bool(serving.failure))
    families.add("vipd_sync_objects_total", told.objects)
    if serving.last_sync is not None:
        families.add("vipd_sync_last_objects", serving.last_sync.objects)
        families.add("vipd_sync_last_virtual_servers", serving.last_sync.virtual_servers)
    name = "vipd_sync_stage_duration_seconds"
    families.distribution(name, subjects.sync.resolved, "resolve")
    for stage, took in told.stages.items():
        families.distribution(name, took, stage)


def _word(true: bool) -> str:
    return "true" if true else "false"


def _sources(families: Families, subjects: Subjects) -> None:
    now = time.time()
    for kind, at in sorted(subjects.programming.last_event.copy().items()):
        families.add("vipd_last_event_age_seconds", max(0.0, now - at), kind)
    if isinstance(subjects.source, Hearing):
        for kind, seconds in sorted(subjects.source.silence().items()):
            families.add("vipd_api_silence_seconds", seconds, kind)
    if isinstance(subjects.source, WritingEvents):
        told = subjects.source.notices
        for outcome, number in (
            ("written", told.written),
            ("held_back", told.held_back),
            ("failed", told.failed),
            ("lost", told.lost),
        ):
            families.add("vipd_events_total", number, outcome)


def _repairs(families: Families, subjects: Subjects) -> None:
    repairs = subjects.switching.repairs
    families.add("vipd_repairs_total", repairs.count)
    families.add("vipd_repair_pause_seconds", max(repairs.waiting().values(), default=0.0))


def _kernel(families: Families, subjects: Subjects) -> None:
    driver = subjects.switching.serving.driver
    if isinstance(driver, Locking):
        families.add("vipd_xtables_lock_waits_total", driver.lock_waits)
    told = host.tracking()
    if told is not None:
        families.add("vipd_conntrack_entries", told.entries)
        families.add("vipd_conntrack_limit", told.limit)
        for why, number in told.lost.items():
            families.add("vipd_conntrack_lost_total", number, why)
    for one in subjects.refusing:
        for setting in one.refused if isinstance(one, Refusing) else ():
            name, _, _ = setting.partition(" ")  # of the sentence on it, the first word
            families.add("vipd_settings_refused", 1, name)


def _flows(families: Families, subjects: Subjects, status: Status) -> None:
    for drain in status.drains:
        families.add("vipd_draining_flows", drain.flows or 0, drain.mode)
    families.add("vipd_departed_endpoints", status.departed)
    families.add("vipd_flows_cut_total", status.flows_cut)
    for (mode, succeeded), number in sorted(subjects.switching.switches.copy().items()):
        outcome = "success" if succeeded else "failure"
        families.add("vipd_switches_total", number, mode, outcome)


def _workers(families: Families, status: Status) -> None:
    serving = [one for one in status.workers if not one.retired]
    families.add("vipd_workers", len(serving))
    families.add("vipd_workers_wanted", status.workers_wanted)
    families.add("vipd_workers_full", sum(one.full for one in serving))
    families.add("vipd_worker_restarts_total", sum(one.restarts for one in serving))
    families.add("vipd_worker_connections", sum(one.open for one in status.workers))


def _dns(families: Families, status: Status) -> None:
    told = status.dns
    if told is not None:
        families.add("vipd_dns_server_up", told.workers >= told.wanted > 0)
        families.add("vipd_dns_server_synced", told.synced)
        families.add("vipd_dns_server_restarts_total", told.restarts)
