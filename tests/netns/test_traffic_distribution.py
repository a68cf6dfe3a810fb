"""Traffic distribution with real packets: same zone, same node, and back to all (§1.3, §10.5).

Hints are what the EndpointSlice controller writes for PreferClose, PreferSameZone and
PreferSameNode; a proxy reads nothing else.
"""

from collections.abc import Callable, Iterator

import pytest
from tests.netns.cluster import LOCAL, REMOTE, TCP4, UDP6, Cluster, Flavour, Manifest, Served, node
from tests.netns.modes import MODES

pytestmark = [pytest.mark.netns, pytest.mark.modes("nftables")]

ZONE = "topology.kubernetes.io/zone"
IN_ZONE = {LOCAL: "a", "web-2": "b", REMOTE: "a", "web-5": "c"}
"""The zones of endpoints; that of the node is a, where a test does not say otherwise."""
Place = Callable[[str | None], None]


@pytest.fixture
def place(cluster: Cluster) -> Iterator[Place]:
    """Put the node into a zone, or into none."""

    def put(zone: str | None) -> None:
        labels = {} if zone is None else {ZONE: zone}
        cluster.apply(node("node", cluster.lab, **labels))
        cluster.settled()

    put("a")
    yield put
    put(None)


def hinted(served: Served, pod: str, node: str = "", /, **conditions: bool) -> Manifest:
    hints = {"forZones": [{"name": IN_ZONE[pod]}]}
    if node:
        hints["forNodes"] = [{"name": node}]
    return {**served.endpoint(pod, **conditions), "zone": IN_ZONE[pod], "hints": hints}


def close(served: Served, *pods: str, **conditions: bool) -> list[Manifest]:
    """Endpoints as PreferClose and PreferSameZone have them: each for its own zone."""
    return [hinted(served, pod, **conditions) for pod in pods]


def same_node(served: Served, *pods: str) -> list[Manifest]:
    """Endpoints as PreferSameNode has them: each for its own node, else its own zone."""
    nodes = {pod: served.cluster.lab.node(pod).node or "" for pod in pods}
    return [hinted(served, pod, nodes[pod]) for pod in pods]


def met(served: Served) -> set[str]:
    """Who answers at all: of four chosen at random all do, but for 1 in 10^9."""
    return set(served.pods("client-1", 80))


@pytest.mark.essential
@pytest.mark.modes(*MODES)
def test_in_the_zone_then_all_as_hints_and_zones_change(cluster: Cluster, place: Place) -> None:
    served = cluster.serve(TCP4, trafficDistribution="PreferSameZone")
    served.endpoints(*close(served, *IN_ZONE))
    assert met(served) == {LOCAL, REMOTE}
    served.endpoints(*close(served, "web-2", "web-5"))
    assert met(served) == {"web-2", "web-5"}, "none is for this zone"
    place("c")
    assert met(served) == {"web-5"}


@pytest.mark.parametrize("client", ["node", "outside"])
def test_every_source_stays_in_the_zone(cluster: Cluster, place: Place, client: str) -> None:
    served = cluster.serve(UDP6, type="NodePort", trafficDistribution="PreferClose")
    served.endpoints(*close(served, *IN_ZONE))
    address, port = served.on_node()
    assert {served.ask(client, address, port).pod for _ in range(30)} == {LOCAL, REMOTE}


@pytest.mark.parametrize("flavour", [TCP4, UDP6], ids=str)
def test_one_without_a_hint_means_all(cluster: Cluster, place: Place, flavour: Flavour) -> None:
    served = cluster.serve(flavour)
    served.endpoints(*close(served, LOCAL, "web-2"), served.endpoint("web-5"))
    assert met(served) == {LOCAL, "web-2", "web-5"}
    served.endpoints(*close(served, LOCAL, "web-2"), served.endpoint("web-5", ready=False))
    assert met(served) == {LOCAL}, "what is not ready has no say"


def test_a_node_without_a_zone_means_all(cluster: Cluster, place: Place) -> None:
    place(None)
    served = cluster.serve(TCP4)
    served.endpoints(*close(served, *IN_ZONE))
    assert met(served) == set(IN_ZONE)
    place("b")
    assert met(served) == {"web-2"}


def test_a_zone_that_is_left_by_its_last_ready_endpoint(cluster: Cluster, place: Place) -> None:
    served = cluster.serve(TCP4)
    served.endpoints(*close(served, LOCAL, "web-2"))
    assert met(served) == {LOCAL}
    served.endpoints(*close(served, LOCAL, ready=False), *close(served, "web-2"))
    assert met(served) == {"web-2"}
    draining = {"ready": False, "serving": True, "terminating": True}
    served.endpoints(*close(served, LOCAL, "web-2", **draining))
    assert met(served) == {LOCAL, "web-2"}, "what drains is for everyone"


def test_the_same_node_then_the_zone_then_all(cluster: Cluster, place: Place) -> None:
    served = cluster.serve(TCP4, trafficDistribution="PreferSameNode")
    served.endpoints(*same_node(served, LOCAL, "web-2", REMOTE, "web-5"))
    assert met(served) == {LOCAL, "web-2"}
    served.endpoints(*same_node(served, REMOTE, "web-5"))
    assert met(served) == {REMOTE}, "none on this node: this zone"
    served.endpoints(*same_node(served, "web-5"))
    assert met(served) == {"web-5"}


def test_policy_local_has_no_ear_for_hints(cluster: Cluster, place: Place) -> None:
    served = cluster.serve(TCP4, internalTrafficPolicy="Local")
    served.endpoints(*close(served, "web-2", REMOTE))
    assert met(served) == {"web-2"}, "it is here, though of another zone"
