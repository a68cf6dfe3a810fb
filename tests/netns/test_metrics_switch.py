"""Metrics of a daemon that changes its mode."""

from collections.abc import Callable

import pytest
from tests.netns.cluster import LOCAL, UDP6, Cluster, until
from tests.netns.scraped import counted, samples

pytestmark = pytest.mark.netns


def test_sums_go_on_in_another_mode(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster()
    cluster.start()
    served = cluster.serve(UDP6, LOCAL)
    assert served.ask("client-1").pod == LOCAL
    until(lambda: counted(cluster, served, 1), "one connection")
    cluster.mode = "iptables"  # what is cleaned up afterwards
    assert cluster.cli("mode", "iptables", "--socket", cluster.socket).returncode == 0
    assert served.ask("client-1").pod == LOCAL
    until(lambda: counted(cluster, served, 2), "one in each mode")
    assert ("vipd_switches_total", {"mode": "iptables", "outcome": "success"}, 1.0) in samples(
        cluster
    )
