"""kube-proxy's metrics, from what the parts of the daemon keep.

Lives here: which fact stands behind which name of kube-proxy. Must not: format (families.py).
What differs from kube-proxy, and what is left out, is in docs/metrics.md.
"""

from collections import Counter
from collections.abc import Iterable

from vipd.proxy.events import Kind as ObjectKind
from vipd.proxy.measured import Distribution
from vipd.proxy.metrics.families import Families
from vipd.proxy.metrics.subjects import Subjects, Tidying, WritingRules
from vipd.proxy.names import Family, ServicePortName
from vipd.proxy.virtualserver import Kind, Refusal, Table, Use

_CHANGES = {"endpoint": ObjectKind.ENDPOINT_SLICE, "service": ObjectKind.SERVICE}
_RULES = "kubeproxy_sync_proxy_rules"


def collect(families: Families, subjects: Subjects) -> None:
    """Add everything under kube-proxy's names."""
    _syncs(families, subjects)
    _changes(families, subjects)
    _failures(families, subjects)
    _without_local_endpoints(families, subjects.sync.table)
    driver = subjects.switching.serving.driver
    if isinstance(driver, WritingRules):
        for name, rules in (("total", driver.rules), ("last", driver.written)):
            for (table, family), number in list(rules.items()):
                families.add(f"{_RULES}_iptables_{name}", number, family, table)
    if isinstance(driver, Tidying):
        for family in _used(subjects):
            number = driver.cleanup_failures.get(family, 0)
            families.add(f"{_RULES}_nftables_cleanup_failures_total", number, family)
    if subjects.stale_flows is not None:
        for family, took in list(subjects.stale_flows.took.items()):
            families.distribution(
                "kubeproxy_conntrack_reconciler_sync_duration_seconds", took, family
            )
        for family, number in list(subjects.stale_flows.deleted.items()):
            families.add("kubeproxy_conntrack_reconciler_deleted_entries_total", number, family)
    if subjects.health is not None:
        for (what, code), number in list(subjects.health.answers.items()):
            families.add(f"kubeproxy_proxy_{what}_total", number, code)


def _used(subjects: Subjects) -> list[Family]:
    """Return the families that there is something to be synced of."""
    return sorted(subjects.programming.queued_at)


def _syncs(families: Families, subjects: Subjects) -> None:
    told = subjects.programming
    by_family: dict[Family, list[Distribution]] = {}
    for (family, full), took in list(told.syncs.items()):
        by_family.setdefault(family, []).append(took)
        extent = "full" if full else "partial"
        families.distribution(f"kubeproxy_sync_{extent}_proxy_rules_duration_seconds", took, family)
    for family, all_of_them in by_family.items():
        families.distribution(f"{_RULES}_duration_seconds", _sum(all_of_them), family)
    for family, at in list(told.synced_at.items()):
        families.add(f"{_RULES}_last_timestamp_seconds", at, family)
    for family, at in list(told.queued_at.items()):
        families.add(f"{_RULES}_last_queued_timestamp_seconds", at, family)
    for family, latency in list(told.latency.items()):
        families.distribution("kubeproxy_network_programming_duration_seconds", latency, family)


def _sum(distributions: Iterable[Distribution]) -> Distribution:
    first, *others = distributions
    total = Distribution(first.bounds)
    for one in (first, *others):
        total.counts = [a + b for a, b in zip(total.counts, one.counts, strict=True)]
        total.total += one.total
    return total


def _changes(families: Families, subjects: Subjects) -> None:
    for word, kind in _CHANGES.items():
        told = subjects.programming.changes[kind]
        families.add(f"{_RULES}_{word}_changes_pending", told.pending)
        families.add(f"{_RULES}_{word}_changes_total", told.total)


def _failures(families: Families, subjects: Subjects) -> None:
    mode = subjects.switching.serving.mode
    for family in _used(subjects):
        failed = dict.fromkeys((True, False), 0)
        for (kinds, of), number in list(subjects.programming.failures.items()):
            if kinds.mode == mode and of is family:
                failed[kinds.full] += number
        families.add(f"{_RULES}_nftables_sync_failures_total", sum(failed.values()), family)
        families.add(f"{_RULES}_iptables_restore_failures_total", sum(failed.values()), family)
        name = f"{_RULES}_iptables_partial_restore_failures_total"
        families.add(name, failed[False], family)


def _without_local_endpoints(families: Families, table: Table) -> None:
    for (family, policy), number in without_local_endpoints(table).items():
        families.add(f"{_RULES}_no_local_endpoints_total", number, family, policy)


def without_local_endpoints(table: Table) -> Counter[tuple[Family, str]]:
    """Return how many service ports have endpoints and none here, by family and policy.

    Both policies are there for each family, if with 0.
    """
    found: set[tuple[Family, str, ServicePortName]] = set()
    families = {Family.IPV4}
    for key, claims in table.claims.items():
        families.add(key.family)
        one = claims[0]
        if one.use is not Use.CLUSTER and not one.local and one.when_empty is Refusal.DROP:
            policy = "internal" if one.kind is Kind.CLUSTER else "external"
            found.add((key.family, policy, one.owner))
    counts = Counter({(one, policy): 0 for one in families for policy in ("internal", "external")})
    counts.update((family, policy) for family, policy, _ in found)
    return counts
