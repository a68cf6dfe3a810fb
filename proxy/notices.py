"""What is told of: which notices follow from how the daemon is.

Lives here: the sentences, and when one that holds is told again. Pure: no clock, no I/O. Must not:
know how a notice is written, or how often the API server may be asked (a source does).

Whoever may read a Service's notices may not be one who may read other namespaces: a conflict names
the other service only where it is in the same namespace.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

from msgspec import Struct

from vipd.proxy.errors import ManifestError
from vipd.proxy.names import NamespacedName
from vipd.proxy.notice import (
    Notice,
    Subject,
    health_check_port_failed,
    on_node,
    on_service,
    shortened,
)
from vipd.proxy.status import SwitchReport
from vipd.proxy.virtualserver import Conflict, Key, Table

AGAIN_SECONDS = 1800.0
"""What holds is told again: the API server forgets events after an hour (--event-ttl)."""
FAILING_SECONDS = 60.0
"""A dataplane that fails for less is not told of: it is tried again meanwhile."""
MOST_HOLDING = 256
"""Notices that are kept at once; further ones wait until some hold no more."""
_API_VERSIONS = {"Service": "v1", "EndpointSlice": "discovery.k8s.io/v1"}

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class Seen(Struct, frozen=True, kw_only=True):
    """The daemon at one moment, as far as anything of it is told."""

    node: str
    mode: str
    table: Table
    problems: Mapping[str, ManifestError] = {}
    rejected: Mapping[Key, Exception] = {}
    failure: str = ""
    """Why the last commit failed; empty when it did not."""
    going_on: Mapping[str, float] = {}
    """Parties that change what is ours again and again, and how long the next repair waits."""
    left_by_kube_proxy: tuple[str, ...] = ()
    failed_ports: Mapping[NamespacedName, tuple[int, str]] = {}
    """Health-check node ports that cannot be listened on, and why."""


def holding(seen: Seen, failing_seconds: float) -> Iterator[Notice]:
    """Yield what is worth telling as it is now. `failing_seconds`: since when commits fail.

    The order is the same each time, whatever order things come in, and so is what goes beyond the
    most that are kept: the same ones wait.
    """
    node = seen.node
    if seen.failure and failing_seconds >= FAILING_SECONDS:
        why = f"the {seen.mode} dataplane cannot be brought up to date: {seen.failure}"
        yield on_node(node, "DataplaneFailing", "Commit", why)
    for party in sorted(seen.going_on):
        why = f"{party or 'somebody'} changes rules of vipd again and again; repairs wait"
        yield on_node(node, "DriftGoesOn", "Repair", why)
    if seen.left_by_kube_proxy:
        some = "; ".join(seen.left_by_kube_proxy[:3])
        why = f"kube-proxy left {some}; `vipd cleanup --kube-proxy` takes it away"
        yield on_node(node, "KubeProxyLeftovers", "Start", why)
    for key, error in _ordered(seen.rejected):
        if claims := seen.table.claims.get(key):
            owner = claims[0].owner.service
            why = f"node {node} does not serve {key}: {error}"
            yield on_service(owner.namespace, owner.name, "RejectedByKernel", "Commit", why)
    for service, (port, why) in _ordered(seen.failed_ports):
        yield health_check_port_failed(service.namespace, service.name, node, port, why)
    for _, conflict in _ordered(seen.table.contested):
        yield from _lost(conflict)
    for _, error in _ordered(seen.problems):
        yield from _malformed(error)


def _ordered(things: Mapping[KeyT, ValueT]) -> list[tuple[KeyT, ValueT]]:
    """Return things by name: sentences are made of the first ones only, and cost more."""
    return sorted(things.items(), key=lambda one: str(one[0]))


def _lost(conflict: Conflict) -> Iterator[Notice]:
    reason: str = conflict.why
    for loser in dict.fromkeys(one.service for one in conflict.losers):
        winner = conflict.winner.service
        if winner != loser:  # else two ports of one service: the API server refuses that
            who = "another service"
            if winner.namespace == loser.namespace:
                who = f"service {winner.name}"
            why = f"{conflict.key} is not served for this service: {who} {reason} and has it"
            yield on_service(
                loser.namespace, loser.name, "AddressConflict", "Resolve", why, shared=True
            )
        reason = "goes before it"  # what is known is why the first loser lost


def _malformed(error: ManifestError) -> Iterator[Notice]:
    kind, _, text = error.thing.partition(" ")
    namespace, _, name = text.partition("/")
    if kind in _API_VERSIONS and namespace and name:
        subject = Subject(_API_VERSIONS[kind], kind, namespace, name)
        told = shortened(": ".join(one for one in (error.field, error.why) if one))
        yield Notice(subject, "Malformed", "Read", told, shared=True)


def started(node: str, version: str, mode: str, why: str) -> Notice:
    """Return the notice that a daemon serves; its reason is kube-proxy's."""
    text = f"vipd {version} serves in {mode} mode" + (f": {why}" if why else "")
    return on_node(node, "Starting", "StartVipd", text, warning=False)


def switched(node: str, report: SwitchReport) -> Notice:
    """Return the notice on a switch that has ended."""
    way = f"from {report.origin} to {report.target}"
    if report.failure:
        why = f"the switch {way} failed, nothing is changed: {report.failure}"
        return on_node(node, "SwitchFailed", "Switch", why)
    return on_node(node, "Switched", "Switch", f"switched {way}", warning=False)


class Holding:
    """What held when it was looked last, so that it is told when it begins, and now and then."""

    def __init__(self) -> None:
        self._told: dict[Notice, float] = {}

    def due(self, notices: Iterable[Notice], now: float) -> list[Notice]:
        """Return which of the notices that hold now are to be told. `now` in seconds."""
        told: dict[Notice, float] = {}
        due = []
        for notice in islice(notices, MOST_HOLDING):
            if notice in told:
                continue
            last = self._told.get(notice)
            if last is None or now - last >= AGAIN_SECONDS:
                due.append(notice)
                last = now
            told[notice] = last
        self._told = told
        return due
