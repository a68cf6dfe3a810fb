"""Every metric that the daemon exports: its name, what it is, its labels, and in which modes.

Lives here: the list, which docs/metrics.md is checked against. Pure. Must not: know where values
come from (kube_proxy.py, own.py).
Source of kube-proxy's: pkg/proxy/metrics/metrics.go, v1.36.
"""

from typing import Literal, NamedTuple

Type = Literal["counter", "gauge", "histogram"]

MODES = ("nftables", "iptables", "ipvs", "userspace")
_TABLES = ("nftables", "iptables")
_KERNEL = ("nftables", "iptables", "ipvs")
_XTABLES = ("iptables", "ipvs")
_FAMILY = ("ip_family",)
_PORT = ("namespace", "service", "port", "protocol")


class Described(NamedTuple):
    """A family of samples. `modes` are those in which it is exported."""

    name: str
    type: Type
    help: str
    labels: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES


KUBE_PROXY = (
    Described(
        "kubeproxy_sync_proxy_rules_duration_seconds", "histogram",
        "Time of a sync, from the plan to the end of its commit.", _FAMILY,
    ),
    Described(
        "kubeproxy_sync_full_proxy_rules_duration_seconds", "histogram",
        "The same, of syncs that observed the kernel first: at a start, and in doubt.",
        _FAMILY, _TABLES,
    ),
    Described(
        "kubeproxy_sync_partial_proxy_rules_duration_seconds", "histogram",
        "The same, of syncs of what had changed.", _FAMILY, _TABLES,
    ),
    Described(
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds", "gauge",
        "When a sync last succeeded.", _FAMILY,
    ),
    Described(
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds", "gauge",
        "When there was last something to be synced.", _FAMILY,
    ),
    Described(
        "kubeproxy_network_programming_duration_seconds", "histogram",
        "From a change of endpoints, as its controller stamped it, to the end of the commit.",
        _FAMILY,
    ),
    Described(
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending", "gauge",
        "Events about EndpointSlices since the last sync began.",
    ),
    Described(
        "kubeproxy_sync_proxy_rules_endpoint_changes_total", "counter",
        "Events about EndpointSlices.",
    ),
    Described(
        "kubeproxy_sync_proxy_rules_service_changes_pending", "gauge",
        "Events about Services since the last sync began.",
    ),
    Described(
        "kubeproxy_sync_proxy_rules_service_changes_total", "counter", "Events about Services."
    ),
    Described(
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total", "gauge",
        "Service ports of traffic policy Local with endpoints, but none on this node.",
        ("ip_family", "traffic_policy"),
    ),
    Described(
        "kubeproxy_sync_proxy_rules_iptables_restore_failures_total", "counter",
        "Syncs that failed as a whole.", _FAMILY, _XTABLES,
    ),
    Described(
        "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total", "counter",
        "Of these, syncs of what had changed.", _FAMILY, ("iptables",),
    ),
    Described(
        "kubeproxy_sync_proxy_rules_iptables_total", "gauge",
        "Rules of ours, as listed last.", ("ip_family", "table"), ("iptables",),
    ),
    Described(
        "kubeproxy_sync_proxy_rules_iptables_last", "gauge",
        "Rules that the last sync wrote.", ("ip_family", "table"), ("iptables",),
    ),
    Described(
        "kubeproxy_sync_proxy_rules_nftables_sync_failures_total", "counter",
        "Syncs that failed as a whole.", _FAMILY, ("nftables",),
    ),
    Described(
        "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total", "counter",
        "Chains and maps out of use that could not be removed yet.", _FAMILY, ("nftables",),
    ),
    Described(
        "kubeproxy_conntrack_reconciler_sync_duration_seconds", "histogram",
        "Time to remove stale flows.", _FAMILY, _KERNEL,
    ),
    Described(
        "kubeproxy_conntrack_reconciler_deleted_entries_total", "counter",
        "Stale flows that were removed.", _FAMILY, _KERNEL,
    ),
    Described("kubeproxy_proxy_healthz_total", "counter", "Answers of /healthz.", ("code",)),
    Described("kubeproxy_proxy_livez_total", "counter", "Answers of /livez.", ("code",)),
)  # fmt: skip

OWN = (
    Described("vipd_build_info", "gauge", "1.", ("version", "python")),
    Described("vipd_mode", "gauge", "1 for the mode that serves, 0 for the others.", ("mode",)),
    Described("vipd_synced", "gauge", "1 once everything known at the start is programmed."),
    Described("vipd_degraded", "gauge", "1 where `vipd status` says degraded."),
    Described("vipd_services", "gauge", "Services."),
    Described("vipd_virtual_servers", "gauge", "Addresses and node ports that are answered."),
    Described("vipd_endpoints", "gauge", "Endpoints, each once for each virtual server."),
    Described("vipd_problems", "gauge", "Objects, files and kinds that cannot be read."),
    Described("vipd_conflicts", "gauge", "Addresses that two services claim."),
    Described("vipd_troubles", "gauge", "What else keeps something from being served."),
    Described("vipd_virtual_servers_rejected", "gauge", "Virtual servers not programmed."),
    Described("vipd_services_rejected", "gauge", "Services that have some of these."),
    Described(
        "vipd_service_rejected", "gauge", "1 for each of these; at most 100 are named.", _PORT
    ),
    Described(
        "vipd_service_connections_total", "counter",
        "New connections that an endpoint got, since this program began to count.", _PORT,
    ),
    Described(
        "vipd_endpoint_connections_total", "counter",
        "The same, by endpoint.", (*_PORT, "endpoint"),
    ),
    Described(
        "vipd_service_refused_connections_total", "counter",
        "Attempts that got no endpoint, repeated ones included.", (*_PORT, "why"),
        ("nftables", "userspace"),
    ),
    Described("vipd_connection_counts_age_seconds", "gauge", "Since connections were read."),
    Described("vipd_connection_counts_read_seconds", "gauge", "How long that took."),
    Described(
        "vipd_connection_counts_failures_total", "counter",
        "Readings of connections that failed or are incomplete.",
    ),
    Described("vipd_syncs_total", "counter", "Syncs.", ("full",)),
    Described(
        "vipd_sync_failures_total", "counter", "Syncs that failed as a whole.", ("mode", "full")
    ),
    Described("vipd_sync_failing", "gauge", "1 while the last sync failed and is tried again."),
    Described("vipd_sync_last_objects", "gauge", "Kernel objects that the last sync changed."),
    Described("vipd_sync_last_virtual_servers", "gauge", "Virtual servers that it changed."),
    Described("vipd_sync_objects_total", "counter", "Kernel objects that all syncs changed."),
    Described(
        "vipd_sync_stage_duration_seconds", "histogram",
        "Time of the parts of a sync: resolve, observe, plan, commit.", ("stage",),
    ),
    Described("vipd_last_event_age_seconds", "gauge", "Since an event of a kind.", ("kind",)),
    Described(
        "vipd_api_silence_seconds", "gauge",
        "Since the API server was heard of on a kind, bookmarks included.", ("kind",),
    ),
    Described(
        "vipd_events_total", "counter",
        "Events told to the API server: written, held_back (enough were), failed, lost (too many).",
        ("outcome",),
    ),
    Described("vipd_repairs_total", "counter", "Changes by others that were put right."),
    Described(
        "vipd_repair_pause_seconds", "gauge",
        "Longest wait before a repair, because the same party did it again and again.",
    ),
    Described(
        "vipd_xtables_lock_waits_total", "counter",
        "How often another program held the xtables lock.", (), _XTABLES,
    ),
    Described("vipd_conntrack_entries", "gauge", "Flows that the kernel tracks."),
    Described("vipd_conntrack_limit", "gauge", "How many it can track."),
    Described(
        "vipd_conntrack_lost_total", "counter",
        "Flows that it could not track: table full (dropped), or two alike (insert_failed).",
        ("why",),
    ),
    Described(
        "vipd_settings_refused", "gauge",
        "1 for each kernel setting that could not be set.", ("setting",),
    ),
    Described("vipd_draining_flows", "gauge", "Flows of modes that were left.", ("mode",)),
    Described("vipd_departed_endpoints", "gauge", "Endpoints gone that may still have flows."),
    Described("vipd_flows_cut_total", "counter", "Flows that were ended at a deadline."),
    Described("vipd_switches_total", "counter", "Switches that ended.", ("mode", "outcome")),
    Described(
        "vipd_workers", "gauge", "Workers that serve.", (), ("userspace",)
    ),
    Described("vipd_workers_wanted", "gauge", "How many there should be.", (), ("userspace",)),
    Described("vipd_workers_full", "gauge", "Workers that accept nothing.", (), ("userspace",)),
    Described("vipd_worker_restarts_total", "counter", "Workers that ended.", (), ("userspace",)),
    Described("vipd_worker_connections", "gauge", "Open connections.", (), ("userspace",)),
    Described("vipd_dns_server_up", "gauge", "1 where all workers of DNS answer."),
    Described("vipd_dns_server_synced", "gauge", "1 where each of them was told everything."),
    Described("vipd_dns_server_restarts_total", "counter", "Workers of DNS that ended."),
)  # fmt: skip

PROCESS = (
    Described("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes."),
    Described("process_resident_memory_bytes", "gauge", "Resident memory size in bytes."),
    Described(
        "process_start_time_seconds", "gauge",
        "Start time of the process since unix epoch in seconds.",
    ),
    Described(
        "process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds."
    ),
    Described("process_open_fds", "gauge", "Number of open file descriptors."),
    Described("process_max_fds", "gauge", "Maximum number of open file descriptors."),
    Described(
        "python_info", "gauge", "Python platform information",
        ("implementation", "major", "minor", "patchlevel", "version"),
    ),
)  # fmt: skip
"""Of prometheus-client itself."""

METRICS = {one.name: one for one in (*KUBE_PROXY, *OWN)}
