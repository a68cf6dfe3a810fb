"""Metrics of a daemon that changes its mode."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from tests.netns.cluster import LOCAL, REMOTE, UDP6, Cluster, until
from tests.netns.scraped import counted, samples

pytestmark = pytest.mark.netns

TRIGGER = "endpoints.kubernetes.io/last-change-trigger-time"


def test_sums_go_on_in_another_mode(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster()
    cluster.start()
    served = cluster.serve(UDP6, LOCAL)
    assert served.ask("client-1").pod == LOCAL
    until(lambda: counted(cluster, served, 1), "one connection")
    change = served.slice()
    change["endpoints"].append(served.endpoint(REMOTE))
    change["metadata"]["annotations"] = {TRIGGER: datetime.now(UTC).isoformat()}
    cluster.apply(change)
    name = "kubeproxy_network_programming_duration_seconds_count"
    until(lambda: (name, {"ip_family": "IPv6"}, 1.0) in samples(cluster), "one latency")
    cluster.mode = "iptables"  # what is cleaned up afterwards
    assert cluster.cli("mode", "iptables", "--socket", cluster.socket).returncode == 0
    assert served.ask("client-1").pod in {LOCAL, REMOTE}
    until(lambda: counted(cluster, served, 2), "one in each mode")
    assert ("vipd_switches_total", {"mode": "iptables", "outcome": "success"}, 1.0) in samples(
        cluster
    )
