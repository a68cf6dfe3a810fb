"""The e2e catalogue of Kubernetes (§10.1, §10.2), as far as one node can show it. Names: S…"""

import shutil
import socket
from collections import Counter

import pytest
from tests.netns.cluster import (
    LOCAL,
    MANY,
    REFUSED,
    REMOTE,
    SILENCE,
    TCP4,
    TCP6,
    UDP4,
    UDP6,
    Cluster,
    Flavour,
    Manifest,
    Served,
    cluster_ip,
    endpoint_slice,
    every,
    node,
    service,
)
from tests.netns.modes import MODES, Mode

from vipd.bench.lab_topology import STANDARD
from vipd.bench.pod import HTTP_PORT, TCP_PORT, UDP_PORT
from vipd.proxy.names import Address, Family

pytestmark = [pytest.mark.netns, pytest.mark.modes(*MODES)]

CLIENTS = ("client-1", "node", "outside")
FAMILIES = tuple(Family)
WRITTEN = {
    "nftables": ("nft", "list", "table", "ip", "vipd"),
    "iptables-legacy": ("xtables-legacy-multi", "iptables-save"),
    "iptables-nft": ("xtables-nft-multi", "iptables-save"),
    "ipvs": ("ipvsadm", "--save", "--numeric"),
    "userspace": ("ip", "-4", "route", "show", "table", "local", "proto", "119"),
}
"""What prints a cluster IP in each mode, and in no other."""
PORTS = {"TCP": TCP_PORT, "UDP": UDP_PORT}


@pytest.fixture(params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    assert isinstance(request.param, Family)
    return request.param


def at(pod: str, family: Family, **more: object) -> Manifest:
    host = STANDARD.host(pod)
    return {"addresses": [str(host.address(family))], "nodeName": host.node, **more}


def named(name: str, protocol: str, port: int, **more: object) -> Manifest:
    return {"name": name, "protocol": protocol, "port": port, **more}


@pytest.mark.essential
def test_the_node_has_the_dataplane_of_the_mode_and_no_other(cluster: Cluster, mode: Mode) -> None:
    served = cluster.serve(TCP4, LOCAL)
    printed = {
        name: cluster.lab.exec("node", [tool, *arguments]).stdout
        for name, (command, *arguments) in WRITTEN.items()
        if (tool := shutil.which(command, path="/usr/sbin:/sbin:/usr/bin:/bin")) is not None
    }
    assert {name for name, text in printed.items() if f"{served.address}" in text} == {mode.name}


@pytest.mark.essential
def test_s2_endpoints_come_and_go(cluster: Cluster, flavour: Flavour) -> None:
    served = cluster.serve(flavour)
    for pods in (
        ("web-1",),
        ("web-1", "web-2"),
        ("web-1", "web-2", "web-4"),
        ("web-2", "web-4"),
        ("web-4",),
    ):
        served.endpoints(*pods)
        assert {o for _ in range(2) for o in served.outcomes("client-1")} == every(pods, "client-1")
    served.endpoints()
    assert served.outcome("client-1") == REFUSED


@pytest.mark.essential
@pytest.mark.parametrize("kind", ["ClusterIP", "LoadBalancer"])
def test_s3_s4_one_port_number_with_two_protocols(
    cluster: Cluster, family: Family, kind: str
) -> None:
    address = cluster_ip(20000, family)
    ports = [named(p.lower(), p, 80, targetPort=PORTS[p]) for p in PORTS]
    both = service("both", address, type=kind, ports=ports)
    slices = {
        p: endpoint_slice(
            f"both-{p.lower()}",
            family,
            [at(pod, family)],
            [named(p.lower(), p, PORTS[p])],
            of="both",
        )
        for p, pod in (("TCP", "web-1"), ("UDP", "web-4"))
    }
    cluster.apply(both, *slices.values())
    cluster.settled()
    assert cluster.outcome("client-1", "tcp", address, 80) == "web-1 saw client-1"
    assert cluster.outcome("client-1", "udp", address, 80) == "web-4 saw client-1"
    cluster.remove(slices["TCP"])
    cluster.settled()
    assert cluster.outcome("client-1", "tcp", address, 80) == REFUSED
    assert cluster.outcome("client-1", "udp", address, 80) == "web-4 saw client-1"
    cluster.apply(slices["TCP"])
    cluster.remove(slices["UDP"])
    cluster.settled()
    assert cluster.outcome("client-1", "tcp", address, 80) == "web-1 saw client-1"
    assert cluster.outcome("client-1", "udp", address, 80) == REFUSED


def test_s5_each_port_has_endpoints_of_its_own(cluster: Cluster, family: Family) -> None:
    address = cluster_ip(20001, family)
    cluster.apply(
        service("multi", address, ports=[named("a", "TCP", 80), named("b", "TCP", 81)]),
        endpoint_slice(
            "multi-a", family, [at("web-1", family)], [named("a", "TCP", TCP_PORT)], of="multi"
        ),
        endpoint_slice(
            "multi-b",
            family,
            [at("web-2", family), at("web-4", family)],
            [named("b", "TCP", TCP_PORT)],
            of="multi",
        ),
    )
    cluster.settled()
    for _ in range(10):
        assert cluster.outcome("client-1", "tcp", address, 80) == "web-1 saw client-1"
        assert cluster.outcome("client-1", "tcp", address, 81) in every(
            ("web-2", "web-4"), "client-1"
        )


@pytest.mark.essential
def test_s6_ports_are_added_and_removed(cluster: Cluster, family: Family) -> None:
    address = cluster_ip(20002, family)
    ports = [named("a", "TCP", 80), named("b", "TCP", 81), named("c", "UDP", 80)]
    slices = endpoint_slice(
        "ports",
        family,
        [at("web-1", family)],
        [named("a", "TCP", TCP_PORT), named("b", "TCP", HTTP_PORT), named("c", "UDP", UDP_PORT)],
    )

    def outcomes() -> tuple[str, str, str]:
        return (
            cluster.outcome("client-1", "tcp", address, 80),
            cluster.outcome("client-1", "http", address, 81),
            cluster.outcome("client-1", "udp", address, 80),
        )

    served = "web-1 saw client-1"
    for names, expected in (
        ("a", (served, REFUSED, REFUSED)),
        ("ab", (served, served, REFUSED)),
        ("abc", (served, served, served)),
        ("bc", (REFUSED, served, served)),
        ("c", (REFUSED, REFUSED, served)),
        ("a", (served, REFUSED, REFUSED)),
    ):
        cluster.apply(service("ports", address, ports=[p for p in ports if p["name"] in names]))
        cluster.apply(slices)
        cluster.settled()
        assert outcomes() == expected


def test_s6_a_port_changes_its_number(cluster: Cluster, flavour: Flavour) -> None:
    served = cluster.serve(flavour, LOCAL)
    served.change(ports=[served.port(port=8000)])
    assert served.outcome("client-1") == REFUSED
    assert served.outcome("client-1", port=8000) == f"{LOCAL} saw client-1"


def test_s9_services_go_up_and_down(cluster: Cluster, flavour: Flavour) -> None:
    first, second = cluster.serve(flavour, "web-1"), cluster.serve(flavour, "web-2")
    assert first.outcome("node") == "web-1 saw node"
    first.remove()
    third = cluster.serve(flavour, "web-4")
    assert second.outcome("node") == "web-2 saw node"
    assert third.outcome("node") == "web-4 saw node"
    assert not first.outcome("node").startswith("web")


@pytest.mark.essential
def test_s10_recreated_with_the_same_address(cluster: Cluster, flavour: Flavour) -> None:
    served = cluster.serve(flavour, LOCAL)
    for _ in range(2):
        assert served.outcome("client-1") == f"{LOCAL} saw client-1"
        served.remove()
        assert not served.outcome("client-1").startswith("web")
        served.change().endpoints(LOCAL)
    other = Served(cluster, flavour, {})
    served.remove()
    other.address = served.address
    other.change().endpoints("web-2")
    assert other.outcome("client-1") == "web-2 saw client-1"


@pytest.mark.essential
def test_s14_external_ip_that_no_node_has(cluster: Cluster, flavour: Flavour) -> None:
    served = cluster.serve(flavour, LOCAL)
    assert served.outcome("client-1", served.outside_address) == SILENCE
    served.change(externalIPs=[str(served.outside_address)])
    for client in CLIENTS:
        assert served.outcome(client, served.outside_address) == f"{LOCAL} saw node"
    served.change(externalIPs=None)
    assert not served.outcome("client-1", served.outside_address).startswith("web")


@pytest.mark.essential
def test_s15_one_node_port_number_with_two_protocols(cluster: Cluster, family: Family) -> None:
    address = cluster_ip(20003, family)
    ports = [named(p.lower(), p, 80, nodePort=31999, targetPort=PORTS[p]) for p in ("TCP", "UDP")]
    slices = [
        endpoint_slice(
            f"np-{p.lower()}", family, [at(pod, family)], [named(p.lower(), p, PORTS[p])], of="np"
        )
        for p, pod in (("TCP", "web-1"), ("UDP", "web-4"))
    ]
    where = cluster.lab.node("node").address(family)
    cluster.apply(service("np", address, type="NodePort", ports=ports), *slices)
    cluster.settled()
    assert cluster.outcome("outside", "tcp", where, 31999) == "web-1 saw node"
    assert cluster.outcome("outside", "udp", where, 31999) == "web-4 saw node"
    cluster.apply(service("np", address, type="NodePort", ports=ports[1:]))
    cluster.settled()
    assert cluster.outcome("outside", "tcp", where, 31999) == REFUSED
    assert cluster.outcome("outside", "udp", where, 31999) == "web-4 saw node"


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_s16_to_s19_external_name_and_back(cluster: Cluster, flavour: Flavour, kind: str) -> None:
    served = cluster.serve(flavour, LOCAL, type=kind)

    def outcomes() -> set[str]:
        places: list[tuple[Address, int]] = [(served.address, 80)]
        if kind == "NodePort":
            places.append(served.on_node())
        return {served.outcome("outside", *place) for place in places}

    assert outcomes() == {f"{LOCAL} saw node"}
    served.change(type="ExternalName", externalName="example.com")
    assert outcomes() <= {REFUSED, SILENCE}
    served.change(type=kind, externalName=None)
    assert outcomes() == {f"{LOCAL} saw node"}


def pod(
    name: str,
    address: Address,
    *,
    ready: bool = True,
    deleted: bool = False,
    phase: str = "Running",
) -> Manifest:
    """A Pod at an address of the lab's pods."""
    host = next(h for h in STANDARD.hosts if address in h.addresses)
    metadata = {"name": name, "namespace": "test", "labels": {"app": "pods"}}
    if deleted:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"nodeName": host.node, "containers": [{"name": "c", "ports": []}]},
        "status": {
            "phase": phase,
            "podIP": str(address),
            "podIPs": [{"ip": str(address)}],
            "conditions": [{"type": "Ready", "status": str(ready)}],
        },
    }


@pytest.mark.parametrize("publish", [True, False])
@pytest.mark.parametrize("state", ["unready", "terminating and unready"])
def test_s21_to_s23_unready_pods(
    cluster: Cluster, flavour: Flavour, publish: bool, state: str
) -> None:
    served = Served(
        cluster,
        flavour,
        {"selector": {"app": "pods"}, "publishNotReadyAddresses": publish, "type": "NodePort"},
    )
    address = STANDARD.host(LOCAL).address(flavour.family)
    cluster.apply(served.manifest(), pod(LOCAL, address))
    cluster.settled()
    assert served.outcome("client-1") == f"{LOCAL} saw client-1"
    cluster.apply(pod(LOCAL, address, ready=False, deleted=state != "unready"))
    cluster.settled()
    for client, place in (("client-1", (served.address, 80)), ("outside", served.on_node())):
        expected = f"{LOCAL} saw {'client-1' if client == 'client-1' else 'node'}"
        assert served.outcome(client, *place) == (expected if publish else REFUSED)


def test_s28_service_proxy_name(cluster: Cluster, flavour: Flavour) -> None:
    served = cluster.serve(flavour, LOCAL)
    served.labelled(**{"service.kubernetes.io__service-proxy-name": "other"})
    assert not served.outcome("client-1").startswith("web")
    served.labelled()
    assert served.outcome("client-1") == f"{LOCAL} saw client-1"


def test_s29_headless_label(cluster: Cluster, flavour: Flavour) -> None:
    served = cluster.serve(flavour, LOCAL)
    served.labelled(**{"service.kubernetes.io__headless": ""})
    assert not served.outcome("client-1").startswith("web")
    served.labelled()
    assert served.outcome("client-1") == f"{LOCAL} saw client-1"


def test_headless_by_cluster_ip_none(cluster: Cluster, flavour: Flavour) -> None:
    served = cluster.serve(flavour, LOCAL)
    served.change(clusterIP="None", clusterIPs=["None"])
    assert not served.outcome("client-1").startswith("web")


@pytest.mark.parametrize("client", CLIENTS)
def test_s30_refused_without_endpoints_on_the_node_port_too(
    cluster: Cluster, flavour: Flavour, client: str
) -> None:
    served = cluster.serve(flavour, type="NodePort")
    assert served.outcome(client) == REFUSED
    assert served.outcome(client, *served.on_node()) == REFUSED


def test_s31_refused_for_evicted_pods(cluster: Cluster, flavour: Flavour) -> None:
    served = Served(cluster, flavour, {"selector": {"app": "pods"}})
    address = STANDARD.host(LOCAL).address(flavour.family)
    cluster.apply(served.manifest(), pod(LOCAL, address))
    cluster.settled()
    assert served.outcome("client-1") == f"{LOCAL} saw client-1"
    cluster.apply(pod(LOCAL, address, phase="Failed"))
    cluster.settled()
    assert served.outcome("client-1") == REFUSED


def test_s32_internal_policy_local_with_the_endpoint_here_and_there(
    cluster: Cluster, flavour: Flavour
) -> None:
    here = cluster.serve(flavour, LOCAL, internalTrafficPolicy="Local")
    there = cluster.serve(flavour, REMOTE, internalTrafficPolicy="Local")
    assert here.outcome("client-1") == f"{LOCAL} saw client-1"
    assert there.outcome("client-1") == SILENCE


@pytest.mark.essential
def test_s33_s34_internal_policy_local_with_the_hosts_network(
    cluster: Cluster, flavour: Flavour
) -> None:
    cluster.lab.serve("node", "node-2")
    here = cluster.serve(flavour, LOCAL, internalTrafficPolicy="Local")
    there = cluster.serve(flavour, REMOTE, internalTrafficPolicy="Local")
    assert (here.outcome("node"), there.outcome("node")) == (f"{LOCAL} saw node", SILENCE)
    here.endpoints("node")
    there.endpoints("node-2")
    for client in ("client-1", "node"):
        assert here.outcome(client) == f"node saw {client}"
        assert there.outcome(client) == SILENCE


def dying(served: Served, name: str, *, serving: bool = True) -> Manifest:
    return served.endpoint(name, ready=False, serving=serving, terminating=True)


@pytest.mark.essential
class TestTerminating:
    def test_ready_endpoints_are_preferred(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour)
        served.endpoints(dying(served, "web-1"), "web-4")
        assert served.outcomes("client-1") == {"web-4 saw client-1"}

    @pytest.mark.parametrize("name", [LOCAL, REMOTE])
    def test_s36_internal_policy_cluster(
        self, cluster: Cluster, flavour: Flavour, name: str
    ) -> None:
        served = cluster.serve(flavour)
        served.endpoints(dying(served, name))
        for client in ("client-1", "node"):
            assert served.outcome(client) == f"{name} saw {client}"

    def test_not_serving_is_never_used(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour)
        served.endpoints(dying(served, LOCAL, serving=False))
        assert served.outcome("client-1") == REFUSED

    def test_s37_internal_policy_local(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, internalTrafficPolicy="Local")
        served.endpoints(dying(served, LOCAL), REMOTE)
        assert served.outcomes("client-1") == {f"{LOCAL} saw client-1"}
        served.endpoints(dying(served, REMOTE))
        assert served.outcome("client-1") == SILENCE

    def test_s38_external_policy_cluster(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, type="NodePort")
        served.endpoints(dying(served, REMOTE))
        assert served.outcome("outside", *served.on_node()) == f"{REMOTE} saw node"

    def test_s39_external_policy_local(self, cluster: Cluster, flavour: Flavour) -> None:
        served = cluster.serve(flavour, type="NodePort", externalTrafficPolicy="Local")
        served.endpoints(dying(served, LOCAL), REMOTE)
        place = served.on_node()
        assert served.outcomes("outside", *place) == {f"{LOCAL} saw outside"}
        mine = LOCAL if cluster.differs("local-list-for-all") else REMOTE
        assert served.outcomes("client-1", *place) == {f"{mine} saw client-1"}
        served.endpoints(dying(served, REMOTE))
        assert served.outcome("outside", *place) == SILENCE
        assert served.outcome("client-1", *place) == f"{REMOTE} saw client-1"


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_s44_named_target_ports_differ_between_endpoints(cluster: Cluster, family: Family) -> None:
    address = cluster_ip(20004, family)
    cluster.apply(
        service("named", address, ports=[named("http", "TCP", 80, targetPort="http")]),
        endpoint_slice(
            "named-1", family, [at("web-1", family)], [named("http", "TCP", TCP_PORT)], of="named"
        ),
        endpoint_slice(
            "named-2", family, [at("web-4", family)], [named("http", "TCP", HTTP_PORT)], of="named"
        ),
    )
    cluster.settled()
    met: Counter[str] = Counter()
    for _ in range(40):
        with cluster.lab.socket("client-1", _domain(family)) as asking:
            asking.settimeout(5)
            asking.connect((str(address), 80))
            asking.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
            met[asking.recv(5).decode()] += 1
    # The line protocol of web-1 says its name, the HTTP server of web-4 its version.
    assert set(met) == {"web-1", "HTTP/"}


def _domain(family: Family) -> socket.AddressFamily:
    return socket.AF_INET if family is Family.IPV4 else socket.AF_INET6


@pytest.mark.essential
@pytest.mark.parametrize("client", CLIENTS)
def test_a_dual_stack_service(cluster: Cluster, client: str) -> None:
    addresses = [cluster_ip(20005, one) for one in FAMILIES]
    cluster.apply(
        service("dual", *addresses, ports=[named("", "TCP", 80)]),
        *(
            endpoint_slice(
                f"dual-{one}".lower(), one, [at(p, one)], [named("", "TCP", TCP_PORT)], of="dual"
            )
            for one, p in zip(FAMILIES, ("web-1", "web-4"), strict=True)
        ),
    )
    cluster.settled()
    seen = client if client == "client-1" else "node"
    assert cluster.outcome(client, "tcp", addresses[0], 80) == f"web-1 saw {seen}"
    assert cluster.outcome(client, "tcp", addresses[1], 80) == f"web-4 saw {seen}"


def test_several_services_with_one_selector(cluster: Cluster, flavour: Flavour) -> None:
    first, second = (Served(cluster, flavour, {"selector": {"app": "pods"}}) for _ in "12")
    address = STANDARD.host(LOCAL).address(flavour.family)
    cluster.apply(first.manifest(), second.manifest(), pod(LOCAL, address))
    cluster.settled()
    assert {first.outcome("client-1"), second.outcome("client-1")} == {f"{LOCAL} saw client-1"}
    cluster.remove(first.manifest())
    cluster.settled()
    assert second.outcome("client-1") == f"{LOCAL} saw client-1"
    assert not first.outcome("client-1").startswith("web")


@pytest.mark.parametrize("place", ["cluster IP", "node port"])
@pytest.mark.parametrize("size", [1400, 4096])
def test_large_requests_and_replies(
    cluster: Cluster, flavour: Flavour, place: str, size: int
) -> None:
    served = cluster.serve(flavour, REMOTE, type="NodePort")
    where = (served.address, 80) if place == "cluster IP" else served.on_node()
    assert served.ask("outside", *where, payload=b"x" * size).pod == REMOTE
    answer = served.ask("outside", *where, payload=f"bytes {size}".encode())
    assert (answer.pod, answer.size_bytes >= size) == (REMOTE, True)


@pytest.mark.essential
@pytest.mark.parametrize("flavour", [TCP4, UDP4, TCP6, UDP6], ids=str)
def test_a_deleted_endpoint_is_never_met_again(cluster: Cluster, flavour: Flavour) -> None:
    served = cluster.serve(flavour, "web-1", "web-2", "web-4", type="NodePort")
    assert set(served.pods("client-1", 2 * MANY)) == {"web-1", "web-2", "web-4"}
    served.endpoints("web-1", "web-4")
    assert set(served.pods("client-1")) == {"web-1", "web-4"}
    assert set(served.pods("outside", MANY, *served.on_node())) == {"web-1", "web-4"}


@pytest.mark.essential
def test_two_services_that_claim_one_address(cluster: Cluster, flavour: Flavour) -> None:
    old, new = cluster.serve(flavour, "web-1"), Served(cluster, flavour, {})
    new.address = old.address
    for one, created in ((old, "2020-01-01T00:00:00Z"), (new, "2021-01-01T00:00:00Z")):
        manifest = one.manifest()
        manifest["metadata"]["creationTimestamp"] = created
        cluster.apply(manifest)
    new.endpoints("web-2")
    assert old.outcome("client-1") == "web-1 saw client-1"
    (conflict,) = cluster.status().conflicts
    assert old.name in conflict
    assert new.name in conflict
    cluster.remove(old.manifest())
    cluster.settled()
    assert new.outcome("client-1") == "web-2 saw client-1"
    assert cluster.status().conflicts == ()


def test_a_slice_before_its_service(cluster: Cluster, flavour: Flavour) -> None:
    served = Served(cluster, flavour, {})
    served.endpoints(LOCAL)
    assert not served.outcome("client-1").startswith("web")
    served.change()
    assert served.outcome("client-1") == f"{LOCAL} saw client-1"


def test_an_address_ready_in_one_slice_and_not_in_another(
    cluster: Cluster, flavour: Flavour
) -> None:
    served = cluster.serve(flavour, LOCAL)
    port = named("main", str(flavour.protocol), flavour.target)
    unready = served.endpoint(LOCAL, ready=False)
    other = endpoint_slice(f"{served.name}-2", flavour.family, [unready], [port], of=served.name)
    cluster.apply(other)
    cluster.settled()
    assert served.outcome("client-1") == f"{LOCAL} saw client-1"


class TestHints:
    def hinted(self, served: Served, name: str, zone: str) -> Manifest:
        return {**served.endpoint(name), "hints": {"forZones": [{"name": zone}]}}

    def test_endpoints_hinted_for_this_zone_alone(self, cluster: Cluster, flavour: Flavour) -> None:
        zone = {"topology.kubernetes.io/zone": "here"}
        served = cluster.serve(flavour)
        cluster.apply(node("node", cluster.lab, **zone))
        served.endpoints(
            self.hinted(served, "web-1", "there"), self.hinted(served, "web-4", "here")
        )
        assert served.outcomes("client-1") == {"web-4 saw client-1"}
        # One without a hint: nobody knows what was meant, so all are used.
        served.endpoints("web-1", self.hinted(served, "web-4", "here"))
        assert served.outcomes("client-1") == every(("web-1", "web-4"), "client-1")
        # The node moves.
        served.endpoints(
            self.hinted(served, "web-1", "there"), self.hinted(served, "web-4", "here")
        )
        cluster.apply(node("node", cluster.lab, **{"topology.kubernetes.io/zone": "there"}))
        cluster.settled()
        assert served.outcomes("client-1") == {"web-1 saw client-1"}
        cluster.apply(node("node", cluster.lab))
        cluster.settled()
