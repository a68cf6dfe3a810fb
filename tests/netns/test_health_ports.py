"""Health-check node ports, asked from outside of the node and from within, in every mode."""

import contextlib
import json
from collections.abc import Iterator

import pytest
from tests.netns.cluster import LOCAL, REMOTE, TCP4, TCP6, Cluster, Flavour, until
from tests.netns.http_asking import asked
from tests.netns.modes import MODES

from vipd.proxy.names import Family

pytestmark = [pytest.mark.netns]


@pytest.mark.modes(*MODES)
@pytest.mark.essential
@pytest.mark.parametrize("one", [TCP4, TCP6], ids=str)
def test_load_balancers_outside_learn_who_has_endpoints(cluster: Cluster, one: Flavour) -> None:
    served = cluster.serve(one, LOCAL, REMOTE)
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
    if cluster.mode in ("iptables", "ipvs"):  # as kube-proxy in these modes
        with dropping(cluster, one, port):
            assert asked(cluster, "outside", node, port)[0] == 200
    served.endpoints(REMOTE)
    assert asked(cluster, "outside", node, port)[0] == 503
    # The port belongs to the node: on an address of a service there is nothing.
    with pytest.raises(OSError, match=r"refused|timed out"):
        asked(cluster, "client-1", served.address, port)
    served.remove()
    until(lambda: not listened(cluster), "the port is left")
    with pytest.raises(ConnectionRefusedError):
        asked(cluster, "outside", node, port)


@contextlib.contextmanager
def dropping(cluster: Cluster, flavour: Flavour, port: int) -> Iterator[None]:
    """Let the node have a firewall that drops new connections to a port."""
    tool = "iptables" if flavour.family is Family.IPV4 else "ip6tables"
    new = ["-m", "conntrack", "--ctstate", "NEW"]
    rule = ["INPUT", "-p", "tcp", "--dport", str(port), *new, "-j", "DROP"]
    cluster.lab.exec("node", [tool, "-w", "-A", *rule], check=True)
    try:
        yield
    finally:
        cluster.lab.exec("node", [tool, "-w", "-D", *rule], check=True)


def listened(cluster: Cluster) -> list[str]:
    return [one for one in cluster.status().http if "health-check node port" in one]
