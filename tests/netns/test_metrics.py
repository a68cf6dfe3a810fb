"""Metrics of a running daemon: connections that are really made are counted, in every mode."""

from functools import partial

import pytest
from tests.netns.cluster import (
    LOCAL,
    REFUSED,
    REMOTE,
    SILENCE,
    TCP4,
    Cluster,
    Served,
    until,
)
from tests.netns.modes import MODES, Mode
from tests.netns.scraped import counted, samples, sums
from tests.unit.metric_names import NOT_ALWAYS

from vipd.proxy.metrics.described import METRICS, PROCESS

pytestmark = pytest.mark.netns


@pytest.mark.essential
@pytest.mark.modes(*MODES)
def test_connections_are_counted(cluster: Cluster, mode: Mode) -> None:
    served = cluster.serve(TCP4, LOCAL, REMOTE)
    for _ in range(3):
        assert served.ask("client-1").pod in {LOCAL, REMOTE}
    until(lambda: counted(cluster, served, 3), "three connections")
    names = {name.removesuffix("_count") for name, _, _ in samples(cluster)}
    for described in METRICS.values():
        name = described.name
        if mode.mode not in described.modes:
            assert name not in names
        elif name not in NOT_ALWAYS:
            assert name in names, f"{name} is not exported"
    assert {one.name for one in PROCESS} <= names


def refused(served: Served, why: str) -> bool:
    return sums(served.cluster, served).get(why, 0) > 0


def test_what_is_refused_is_counted(cluster: Cluster) -> None:
    nobody, elsewhere, barred = (cluster.serve(TCP4) for _ in range(3))
    elsewhere.change(internalTrafficPolicy="Local").endpoints(REMOTE)
    barred.change(
        type="LoadBalancer",
        loadBalancerSourceRanges=["192.0.2.0/24"],
        status={"loadBalancer": {"ingress": [{"ip": str(barred.outside_address)}]}},
    )
    barred.endpoints(LOCAL)
    assert nobody.outcome("client-1") == REFUSED
    assert elsewhere.outcome("client-1") == SILENCE
    assert barred.outcome("outside", barred.outside_address) == SILENCE
    assert barred.ask("client-1").pod == LOCAL
    for served, why in ((nobody, "rejected"), (elsewhere, "dropped"), (barred, "denied")):
        until(partial(refused, served, why), why)
    assert sums(cluster, barred)["service_connections"] == 1
