"""Names of metrics in rules and dashboards, and which are exported only when there is something.

Lives here: what several tests need to know of names. Must not: know what metrics mean.
"""

import re

from vipd.proxy.metrics.described import METRICS, PROCESS

NOT_ALWAYS = {
    "kubeproxy_network_programming_duration_seconds",
    "kubeproxy_sync_partial_proxy_rules_duration_seconds",
    "kubeproxy_sync_full_proxy_rules_duration_seconds",
    "kubeproxy_conntrack_reconciler_sync_duration_seconds",
    "kubeproxy_conntrack_reconciler_deleted_entries_total",
    "kubeproxy_proxy_healthz_total",
    "kubeproxy_proxy_livez_total",
    "vipd_service_rejected",
    "vipd_service_refused_connections_total",
    "vipd_api_silence_seconds",
    "vipd_events_total",
    "vipd_settings_refused",
    "vipd_draining_flows",
    "vipd_switches_total",
    "vipd_dns_server_up",
    "vipd_dns_server_synced",
    "vipd_dns_server_restarts_total",
}
"""Not exported by a daemon that has just begun to serve manifests without DNS."""
EVERYTHING = {**METRICS, **{one.name: one for one in PROCESS}}
_NAME = re.compile(r"\b(?:vipd|kubeproxy|process)_[a-z0-9_]+")
_SUFFIX = re.compile(r"_(?:bucket|count|sum)$")


def named(expression: str) -> set[str]:
    """Return the metrics that an expression reads."""
    found = set()
    for name in _NAME.findall(expression):
        bare = _SUFFIX.sub("", name)
        is_histogram = bare in EVERYTHING and EVERYTHING[bare].type == "histogram"
        found.add(bare if is_histogram else name)
    return found
