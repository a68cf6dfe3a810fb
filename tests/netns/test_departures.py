"""What becomes of open connections when their endpoint leaves the service."""

import contextlib
import socket
from collections.abc import Callable

import pytest
from tests.netns.cluster import TCP4, UDP4, Cluster, Held, held, until
from tests.netns.modes import MODES

pytestmark = [pytest.mark.netns, pytest.mark.modes(*MODES)]

NewCluster = Callable[..., Cluster]


def test_a_terminating_endpoint_keeps_its_connections_and_gets_no_new_one(
    new_cluster: NewCluster,
) -> None:
    cluster = new_cluster()
    cluster.start()
    served = cluster.serve(TCP4, "web-1")
    with held(cluster, "client-1", served.address) as connection:
        served.endpoints("web-2", served.endpoint("web-1", ready=False, terminating=True))
        assert set(served.pods("client-1")) == {"web-2"}
        assert connection.who() == "web-1"
        served.endpoints("web-2")
        assert connection.who() == "web-1"
        assert cluster.status().flows_cut == 0


def test_at_the_deadline_connections_are_cut_and_counted(new_cluster: NewCluster) -> None:
    cluster = new_cluster("--drain", "0")
    cluster.start()
    served = cluster.serve(TCP4, "web-1", "web-2")
    with contextlib.ExitStack() as stack:
        connections: list[Held] = []
        while {one.who() for one in connections} != {"web-1", "web-2"}:
            connections.append(stack.enter_context(held(cluster, "client-1", served.address)))
        first = [one for one in connections if one.who() == "web-1"]
        second = [one for one in connections if one not in first]
        served.endpoints("web-2", served.endpoint("web-1", ready=False))
        assert {one.who() for one in connections} == {"web-1", "web-2"}  # it is merely not ready
        served.endpoints("web-1", "web-2")
        served.endpoints("web-2", served.endpoint("web-1", ready=False, terminating=True))
        until(lambda: cluster.status().flows_cut == len(first), "their flows are cut")
        assert {one.who() for one in second} == {"web-2"}
        for one in first:
            with pytest.raises(ConnectionResetError):  # told at once, not left to time out
                one.who()


@pytest.mark.modes("nftables")
def test_a_daemon_that_starts_forgets_the_flows_of_those_who_left_and_no_others(
    new_cluster: NewCluster,
) -> None:
    cluster = new_cluster()
    cluster.start()
    served = cluster.serve(UDP4, "web-1", "web-2")
    with cluster.lab.socket("client-1", socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(0.5)
        client.connect((str(served.address), 80))

        def who() -> str:
            with contextlib.suppress(TimeoutError, ConnectionError):
                client.send(b"who\n")
                return client.recv(4096).decode().partition(" ")[0]
            return ""

        until(who, "somebody answers")
        first = who()
        (other,) = {"web-1", "web-2"} - {first}
        cluster.stop()
        cluster.apply(served.endpoints_are(first, "web-3", "web-4").slice())
        cluster.start()
        assert {who() for _ in range(20)} == {first}
        cluster.stop()
        cluster.apply(served.endpoints_are(other).slice())
        cluster.start()
        until(lambda: who() == other, "the one that is left answers")
