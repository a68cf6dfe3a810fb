"""Health-check node ports, asked from outside of the node and from within, in every mode."""

import json

import pytest
from tests.netns.cluster import LOCAL, REMOTE, TCP4, TCP6, Cluster, Flavour, until
from tests.netns.http_asking import asked
from tests.netns.modes import MODES

pytestmark = [pytest.mark.netns]


@pytest.mark.modes(*MODES)
@pytest.mark.essential
@pytest.mark.parametrize("flavour", [TCP4, TCP6], ids=str, indirect=True)
def test_load_balancers_outside_learn_who_has_endpoints(cluster: Cluster, flavour: Flavour) -> None:
    served = cluster.serve(flavour, LOCAL, REMOTE)
    port = served.node_port + 1000
    served.change(type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=port)
    node, _ = served.on_node()
    until(lambda: listened(cluster), "the port is listened on")
    for client in ("outside", "client-1", "node", "web-1"):
        status, body, weight = asked(cluster, client, node, port)
        assert (status, weight) == (200, "1")
        assert json.loads(body) == {
            "service": {"namespace": "test", "name": served.name},
            "localEndpoints": 1,
            "serviceProxyHealthy": True,
        }
    served.endpoints(REMOTE)
    assert asked(cluster, "outside", node, port)[0] == 503
    # The port belongs to the node: on an address of a service there is nothing.
    with pytest.raises(OSError, match=r"refused|timed out"):
        asked(cluster, "client-1", served.address, port)
    served.remove()
    until(lambda: not listened(cluster), "the port is left")
    with pytest.raises(ConnectionRefusedError):
        asked(cluster, "outside", node, port)


def listened(cluster: Cluster) -> tuple[str, ...]:
    return cluster.status().http
