"""Session affinity, algorithms and weights, with real clients (S24 to S26, §2.1)."""

import itertools
import json
import math
import time
from collections import Counter

import pytest
from tests.netns.cluster import FLAVOURS, TCP4, TCP6, Cluster, Flavour, Served, until
from tests.netns.modes import MODES

pytestmark = [pytest.mark.netns, pytest.mark.modes(*MODES)]

WEBS = ("web-1", "web-2", "web-3", "web-4", "web-5", "web-6")
CLIENTS = ("client-1", "client-2", "outside", "node")
FEW = 10
"""Requests that would all meet one of six endpoints by chance once in ten million times."""


def affinity(seconds: int) -> dict[str, object]:
    return {
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}},
    }


def only(pods: list[str]) -> str:
    (pod,) = set(pods)
    return pod


class TestAffinity:
    @pytest.mark.essential
    @pytest.mark.parametrize("place", ["cluster IP", "node port"])
    def test_s24_a_client_keeps_its_endpoint(
        self, cluster: Cluster, flavour: Flavour, place: str
    ) -> None:
        served = cluster.serve(flavour, *WEBS, type="NodePort", **affinity(300))
        where = served.on_node() if place == "node port" else (served.address, 80)
        for client in CLIENTS:
            only(served.pods(client, FEW, *where))

    @pytest.mark.parametrize("place", ["cluster IP", "node port"])
    def test_s25_switched_on_and_off(self, cluster: Cluster, flavour: Flavour, place: str) -> None:
        served = cluster.serve(flavour, *WEBS, type="NodePort")
        where = served.on_node() if place == "node port" else (served.address, 80)
        for _ in range(2):
            assert len(set(served.pods("client-1", to=where[0], port=where[1]))) > 1
            served.change(**affinity(300))
            only(served.pods("client-1", FEW, *where))
            served.change(sessionAffinity="None", sessionAffinityConfig=None)

    # IPVS forgets a client only with its last connection.
    @pytest.mark.modes("nftables", "iptables-legacy", "iptables-nft")
    def test_s26_forgotten_after_its_time(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, *WEBS, **affinity(1))
        first = only(served.pods("client-1", 3))
        asked = time.monotonic()

        def forgotten() -> bool:
            # Each request refreshes, so ask only when the kernel has forgotten the client.
            # xt_recent cannot be asked: it compares times when a packet comes.
            if cluster.mode == "nftables":
                return not remembered(cluster, served)
            return time.monotonic() > asked + 1.5

        seen = {first}
        for _ in range(20):  # the new endpoint is the old one again once in six times
            until(forgotten, "the client is forgotten")
            seen.add(served.ask("client-1").pod)
            asked = time.monotonic()
            if len(seen) > 1:
                return
        raise AssertionError(f"always {first}")

    @pytest.mark.modes("nftables")  # the others cannot be asked how long a client has left
    def test_each_new_connection_refreshes(self, cluster: Cluster) -> None:
        served = cluster.serve(TCP4, *WEBS, **affinity(300))
        served.ask("client-1")

        def left() -> float:
            (found,) = remembered(cluster, served)
            return found

        # The clock has moved by some, whatever the machine: the rest is less, then whole again.
        until(lambda: left() < 300, "time goes by")
        before = left()
        until(lambda: left() < before, "time goes by")
        served.ask("client-1")
        assert left() >= before

    def test_another_endpoint_leaves(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, *WEBS, **affinity(300))
        mine = {client: only(served.pods(client, 3)) for client in CLIENTS}
        left = list(WEBS)
        for gone in [pod for pod in WEBS if pod not in mine.values()]:
            left.remove(gone)
            served.endpoints(*left)
            assert {client: only(served.pods(client, 3)) for client in CLIENTS} == mine

    @pytest.mark.essential
    def test_its_own_endpoint_leaves(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, *WEBS, **affinity(300))
        mine = {client: only(served.pods(client, 3)) for client in CLIENTS}
        gone = mine["client-1"]
        served.endpoints(*(pod for pod in WEBS if pod != gone))
        now = {client: only(served.pods(client, FEW)) for client in CLIENTS}
        assert now["client-1"] != gone
        kept = {client: pod for client, pod in mine.items() if pod != gone}
        assert {client: now[client] for client in kept} == kept
        # Back again: nobody is moved to it.
        served.endpoints(*WEBS)
        assert {client: only(served.pods(client, 3)) for client in CLIENTS} == now

    def test_new_endpoints_move_nobody(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, "web-3", "web-4", **affinity(300))
        mine = {client: only(served.pods(client, 3)) for client in CLIENTS}
        served.endpoints(*WEBS)
        assert {client: only(served.pods(client, 3)) for client in CLIENTS} == mine

    def test_all_endpoints_leave_and_others_come(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, "web-1", **affinity(300))
        assert only(served.pods("client-1", 3)) == "web-1"
        served.endpoints("web-2")
        assert only(served.pods("client-1", 3)) == "web-2"

    @pytest.mark.parametrize("first", ["cluster IP", "node port"])
    def test_cluster_ip_and_node_port_share_it(
        self, cluster: Cluster, flavour: Flavour, first: str
    ) -> None:
        if cluster.differs("affinity-by-address"):
            pytest.skip(f"{cluster.mode} differs: affinity-by-address")
        served = cluster.serve(flavour, *WEBS, type="NodePort", **affinity(300))
        places = [(served.address, 80), served.on_node()]
        if first == "node port":
            places.reverse()
        for client in ("client-1", "outside"):
            assert len({only(served.pods(client, 3, *place)) for place in places}) == 1

    def test_two_services_have_memories_of_their_own(
        self, cluster: Cluster, flavour: Flavour
    ) -> None:
        first = cluster.serve(flavour, "web-1", **affinity(300))
        second = cluster.serve(flavour, "web-2", **affinity(300))
        for _ in range(3):
            assert (first.ask("client-1").pod, second.ask("client-1").pod) == ("web-1", "web-2")

    def test_with_policy_local(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(
            flavour, *WEBS, type="NodePort", externalTrafficPolicy="Local", **affinity(300)
        )
        assert only(served.pods("outside", FEW, *served.on_node())) in WEBS[:3]
        assert served.outcome("outside", *served.on_node()).endswith("saw outside")


def remembered(cluster: Cluster, served: Served) -> list[float]:
    """How many seconds each client of a service has left in the kernel's memory."""
    word = "ip" if served.flavour.family == 4 else "ip6"
    found: list[float] = []
    for one in json.loads(cluster.nft("-j", "list", "table", word, "vipd"))["nftables"]:
        memory = one.get("map", {})
        if served.name in memory.get("name", ""):
            for entry in memory.get("elem", []):
                key = entry[0]["elem"] if isinstance(entry, list) else entry["elem"]
                found.append(float(key["expires"]))
    return found


class TestRoundRobin:
    def annotated(self, name: str) -> dict[str, object]:
        return {"annotations": {"vipd/algorithm": name}}

    @pytest.mark.essential
    def test_exact_alternation(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, "web-1", "web-2", "web-4", **self.annotated("round-robin"))
        pods = served.pods("client-1", 12)
        assert pods == pods[:3] * 4
        assert set(pods) == {"web-1", "web-2", "web-4"}

    def test_two_services_in_turn_have_turns_of_their_own(
        self, cluster: Cluster, flavour: Flavour
    ) -> None:
        first = cluster.serve(flavour, "web-1", "web-2", **self.annotated("round-robin"))
        second = cluster.serve(flavour, "web-3", "web-4", **self.annotated("round-robin"))
        pods = [(first.ask("client-1").pod, second.ask("client-1").pod) for _ in range(6)]
        assert Counter(pod for pair in pods for pod in pair) == dict.fromkeys(WEBS[:4], 3)
        assert all(one != two for one, two in itertools.pairwise(pods))

    def test_weights_are_turns(self, cluster: Cluster) -> None:
        served = cluster.serve(
            TCP4,
            "web-1",
            "web-2",
            annotations={"vipd/algorithm": "round-robin", "vipd/weights": "web-1=3"},
        )
        assert Counter(served.pods("client-1", 12)) == {"web-1": 9, "web-2": 3}


class TestHashes:
    @pytest.mark.parametrize("place", ["cluster IP", "node port"])
    def test_source_hash_sends_a_client_to_one_endpoint(
        self, cluster: Cluster, flavour: Flavour, place: str
    ) -> None:
        served = cluster.serve(
            flavour, *WEBS, type="NodePort", annotations={"vipd/algorithm": "source-hash"}
        )
        where = served.on_node() if place == "node port" else (served.address, 80)
        mine = {client: only(served.pods(client, FEW, *where)) for client in CLIENTS}
        assert {client: only(served.pods(client, 3, *where)) for client in CLIENTS} == mine

    @pytest.mark.parametrize("flavour", [TCP4, TCP6], ids=str)
    def test_maglev_keeps_a_flow_when_another_endpoint_leaves(
        self, cluster: Cluster, flavour: Flavour
    ) -> None:
        if cluster.differs("iptables-maglev"):
            pytest.skip(f"{cluster.mode} differs: iptables-maglev")
        served = cluster.serve(flavour, *WEBS, annotations={"vipd/algorithm": "maglev"})
        ports = range(20000, 20060)  # below those that the kernel gives away

        def flows() -> dict[int, str]:
            return {port: served.ask("client-1", source_port=port).pod for port in ports}

        before = flows()
        assert set(before.values()) == set(WEBS)
        assert flows() == before
        served.endpoints(*WEBS[:5])
        after = flows()
        moved = [p for p in ports if before[p] != after[p] and before[p] != WEBS[5]]
        assert "web-6" not in after.values()
        # Maglev moves a little more than it has to: about 1 in 10 of what could stay.
        assert len(moved) < 20


@pytest.mark.parametrize("flavour", FLAVOURS, ids=str)
@pytest.mark.parametrize("algorithm", ["random", "maglev"])
def test_weights_are_shares(cluster: Cluster, flavour: Flavour, algorithm: str) -> None:
    served = cluster.serve(
        flavour,
        "web-1",
        "web-2",
        annotations={"vipd/algorithm": algorithm, "vipd/weights": "web-1=4"},
    )
    count = 250
    share = Counter(served.pods("client-1", count))["web-1"] / count
    sigma = math.sqrt(0.8 * 0.2 / count)
    assert abs(share - 0.8) < 6 * sigma + 0.02


def test_random_is_fair(cluster: Cluster, flavour: Flavour) -> None:
    served = cluster.serve(flavour, "web-1", "web-2")
    count = 200
    share = Counter(served.pods("client-1", count))["web-1"] / count
    assert abs(share - 0.5) < 6 * math.sqrt(0.25 / count)
