"""Node ports, external IPs and load-balancer IPs: outcomes and sources (§0, §2.2, §2.3)."""

from collections.abc import Callable

import pytest
from tests.netns.cluster import (
    LOCAL,
    REFUSED,
    REMOTE,
    SECOND_ADDRESS,
    SILENCE,
    TCP4,
    Cluster,
    Flavour,
    Served,
    every,
)
from tests.netns.modes import MODES

from vipd.proxy.names import Address, Family, parse_address

pytestmark = [pytest.mark.netns, pytest.mark.modes(*MODES)]

CLIENTS = ("client-1", "node", "outside")
KINDS = ("node port", "external IP", "load-balancer IP")
BOTH = (LOCAL, REMOTE)
Place = tuple[Address, int]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


Serve = Callable[..., tuple[Served, Place]]


@pytest.fixture
def serve(cluster: Cluster, flavour: Flavour, kind: str) -> Serve:
    """Make a service of the kind, with a policy; return it and where it is asked from outside."""

    def made(*pods: str, policy: str = "Cluster") -> tuple[Served, Place]:
        served = cluster.serve(flavour)
        place: Place = (served.outside_address, 80)
        match kind:
            case "node port":
                served.change(type="NodePort", externalTrafficPolicy=policy)
                place = served.on_node()
            case "external IP":
                address = str(served.outside_address)
                served.change(externalIPs=[address], externalTrafficPolicy=policy)
            case _:
                served.change(
                    type="LoadBalancer",
                    externalTrafficPolicy=policy,
                    status=ingress(served.outside_address),
                )
        return served.endpoints(*pods), place

    return made


def ingress(address: Address, **more: str) -> dict[str, object]:
    return {"loadBalancer": {"ingress": [{"ip": str(address), **more}]}}


@pytest.mark.essential
class TestPolicyCluster:
    @pytest.mark.parametrize("client", [*CLIENTS, "web-2"])
    def test_every_source_is_masqueraded(self, serve: Serve, client: str) -> None:
        served, place = serve(*BOTH)
        assert served.outcomes(client, *place) == every(BOTH, "node")

    @pytest.mark.parametrize("client", CLIENTS)
    def test_without_endpoints_it_is_refused(self, serve: Serve, client: str) -> None:
        served, place = serve()
        assert served.outcome(client, *place) == REFUSED

    def test_the_cluster_ip_of_it_keeps_sources(self, serve: Serve) -> None:
        served, _ = serve(LOCAL)
        assert served.outcome("client-1") == f"{LOCAL} saw client-1"
        assert served.outcome("outside") == f"{LOCAL} saw node"


@pytest.mark.essential
class TestPolicyLocal:
    def test_from_outside_only_local_endpoints_and_the_source_kept(self, serve: Serve) -> None:
        served, place = serve(LOCAL, "web-2", REMOTE, policy="Local")
        assert served.outcomes("outside", *place) == every((LOCAL, "web-2"), "outside")

    def test_from_outside_none_local_is_silence(self, serve: Serve) -> None:
        served, place = serve(REMOTE, policy="Local")
        assert served.outcome("outside", *place) == SILENCE

    @pytest.mark.parametrize("client", CLIENTS)
    def test_none_anywhere_is_refused(self, serve: Serve, client: str) -> None:
        served, place = serve(policy="Local")
        assert served.outcome(client, *place) == REFUSED

    @pytest.mark.parametrize("pods", [BOTH, (REMOTE,)])
    def test_a_pod_of_this_node_takes_the_short_circuit(
        self, serve: Serve, pods: tuple[str, ...]
    ) -> None:
        served, place = serve(*pods, policy="Local")
        assert served.outcomes("client-1", *place) == every(reached(served, pods), "client-1")

    @pytest.mark.parametrize("pods", [BOTH, (REMOTE,)])
    def test_the_node_itself_reaches_every_endpoint_masqueraded(
        self, serve: Serve, pods: tuple[str, ...]
    ) -> None:
        served, place = serve(*pods, policy="Local")
        assert served.outcomes("node", *place) == every(reached(served, pods), "node")

    def test_the_cluster_ip_of_it_reaches_every_endpoint(self, serve: Serve) -> None:
        served, _ = serve(*BOTH, policy="Local")
        assert served.outcomes("client-1") == every(BOTH, "client-1")

    def test_a_pod_reaches_itself(self, serve: Serve) -> None:
        served, place = serve(LOCAL, policy="Local")
        assert served.outcome(LOCAL, *place) == f"{LOCAL} saw node"

    def test_the_policy_is_switched(self, serve: Serve) -> None:
        served, place = serve(LOCAL)
        assert served.outcome("outside", *place) == f"{LOCAL} saw node"
        served.change(externalTrafficPolicy="Local")
        assert served.outcome("outside", *place) == f"{LOCAL} saw outside"
        served.change(externalTrafficPolicy="Cluster")
        assert served.outcome("outside", *place) == f"{LOCAL} saw node"


def test_at_another_services_cluster_ip_each_port_keeps_its_policy(cluster: Cluster) -> None:
    web = cluster.serve(TCP4, LOCAL)
    odd = cluster.serve(TCP4)
    odd.change(
        externalIPs=[str(web.address)],
        externalTrafficPolicy="Local",
        ports=[odd.port(port=81)],
    ).endpoints("web-2")
    assert odd.outcome("outside", web.address, 81) == "web-2 saw outside"
    assert web.outcome("outside") == f"{LOCAL} saw node"


def reached(served: Served, pods: tuple[str, ...]) -> tuple[str, ...]:
    """The endpoints that pods of this node and the node itself reach under policy Local."""
    mine = tuple(one for one in pods if served.cluster.lab.node(one).node == "node")
    return mine if mine and served.cluster.differs("local-list-for-all") else pods


class TestNodePort:
    @pytest.fixture
    def served(self, cluster: Cluster, flavour: Flavour) -> Served:
        return cluster.serve(flavour, LOCAL, type="NodePort")

    def test_loopback_does_not_answer(self, served: Served) -> None:
        loopback = parse_address("127.0.0.1" if served.flavour.family is Family.IPV4 else "::1")
        assert served.outcome("node", loopback, served.node_port) == REFUSED
        assert served.outcome("node", *served.on_node()) == f"{LOCAL} saw node"

    @pytest.mark.essential
    def test_a_secondary_address_of_the_node_does_not_answer(self, served: Served) -> None:
        address = SECOND_ADDRESS[served.flavour.family]
        with served.cluster.having("node", address, "eth0") as second:
            for client in ("outside", "node"):
                assert served.outcome(client, second, served.node_port) == REFUSED

    def test_other_ports_of_the_node_are_its_own(self, served: Served) -> None:
        address, port = served.on_node()
        assert served.outcome("outside", address, port + 20000) == REFUSED

    def test_the_node_port_number_on_the_cluster_ip_is_unknown(self, served: Served) -> None:
        assert served.outcome("client-1", served.address, served.node_port) == REFUSED

    def test_pods_are_not_captured_on_their_own_addresses(self, served: Served) -> None:
        pod = served.cluster.lab.node("web-2").address(served.flavour.family)
        assert served.outcome("client-1", pod, served.node_port) == REFUSED

    @pytest.mark.essential
    def test_it_is_taken_away_and_given_to_another(self, cluster: Cluster, served: Served) -> None:
        place = served.on_node()
        served.change(type="ClusterIP")
        assert served.outcome("outside", *place) == REFUSED
        other = cluster.serve(served.flavour, "web-2")
        other.node_port = served.node_port
        other.change(type="NodePort")
        assert other.outcome("outside", *place) == "web-2 saw node"

    def test_the_number_changes(self, served: Served) -> None:
        old = served.on_node()
        served.node_port += 1000
        served.change()
        assert served.outcome("outside", *old) == REFUSED
        assert served.outcome("outside", *served.on_node()) == f"{LOCAL} saw node"


class TestLoadBalancer:
    @pytest.fixture
    def served(self, cluster: Cluster, flavour: Flavour) -> Served:
        return cluster.serve(flavour, LOCAL, type="LoadBalancer")

    @pytest.mark.essential
    def test_mode_vip_is_captured_and_mode_proxy_is_not(self, served: Served) -> None:
        vip = served.outside_address
        with served.cluster.having("outside", vip):  # it then refuses; else it says nothing
            served.change(status=ingress(vip, ipMode="VIP"))
            assert served.outcome("client-1", vip) == f"{LOCAL} saw node"
            served.change(status=ingress(vip, ipMode="Proxy"))
            assert served.outcome("client-1", vip) == REFUSED  # by the load balancer itself
            served.change(status=ingress(vip))
            assert served.outcome("client-1", vip) == f"{LOCAL} saw node"

    def test_an_unknown_port_goes_on_to_whoever_has_the_address(self, served: Served) -> None:
        vip = served.outside_address
        with served.cluster.having("outside", vip):
            served.change(status=ingress(vip))
            assert served.outcome("client-1", vip, 81) == REFUSED
        refuses = served.cluster.differs("unknown-ports-are-refused")
        assert served.outcome("client-1", vip, 81) == (REFUSED if refuses else SILENCE)

    def test_without_node_ports(self, served: Served) -> None:
        port = {**served.port(), "nodePort": 0}
        served.change(
            ports=[port],
            allocateLoadBalancerNodePorts=False,
            status=ingress(served.outside_address),
        )
        assert served.outcome("outside", served.outside_address) == f"{LOCAL} saw node"
        assert served.outcome("outside", *served.on_node()) == REFUSED


class TestSourceRanges:
    @pytest.fixture
    def served(self, cluster: Cluster, flavour: Flavour) -> Served:
        served = cluster.serve(flavour, LOCAL)
        return served.change(type="LoadBalancer", status=ingress(served.outside_address))

    @pytest.mark.essential
    @pytest.mark.parametrize("policy", ["Cluster", "Local"])
    def test_only_sources_inside_are_served(self, served: Served, policy: str) -> None:
        served.change(
            externalTrafficPolicy=policy, loadBalancerSourceRanges=around(served, "outside")
        )
        vip = served.outside_address
        assert served.outcome("outside", vip).startswith(LOCAL)
        assert served.outcome("client-1", vip) == SILENCE
        assert served.outcome("node", vip) == SILENCE

    def test_ranges_come_and_go(self, served: Served) -> None:
        vip = served.outside_address
        served.change(loadBalancerSourceRanges=around(served, "client-1"))
        assert served.outcome("outside", vip) == SILENCE
        served.change(loadBalancerSourceRanges=around(served, "client-1", "outside"))
        assert served.outcome("outside", vip) == f"{LOCAL} saw node"
        served.change(loadBalancerSourceRanges=around(served, "client-2"))
        assert served.outcome("outside", vip) == SILENCE
        served.change(loadBalancerSourceRanges=None)
        assert served.outcome("outside", vip) == f"{LOCAL} saw node"

    def test_a_range_with_the_nodes_address_admits_the_node(self, served: Served) -> None:
        served.change(loadBalancerSourceRanges=around(served, "node"))
        vip = served.outside_address
        assert served.outcome("node", vip) == f"{LOCAL} saw node"
        assert served.outcome("outside", vip) == SILENCE

    def test_the_vip_as_source_is_admitted_with_the_node(self, served: Served) -> None:
        served.change(loadBalancerSourceRanges=around(served, "node"))
        vip = served.outside_address
        with served.cluster.having("node", vip):
            assert served.ask("node", vip, source=vip).pod == LOCAL

    @pytest.mark.essential
    def test_ranges_restrict_no_other_address(self, served: Served) -> None:
        served.change(loadBalancerSourceRanges=around(served, "client-2"))
        assert served.outcome("outside", *served.on_node()) == f"{LOCAL} saw node"
        assert served.outcome("client-1") == f"{LOCAL} saw client-1"
        assert served.outcome("outside", served.outside_address) == SILENCE

    def test_ranges_of_the_other_family_alone_restrict_nobody(self, served: Served) -> None:
        other = "fd00::/8" if served.flavour.family is Family.IPV4 else "10.0.0.0/8"
        served.change(loadBalancerSourceRanges=[other])
        assert served.outcome("outside", served.outside_address) == f"{LOCAL} saw node"

    def test_without_endpoints_nobody_is_served(self, served: Served) -> None:
        served.change(loadBalancerSourceRanges=around(served, "outside")).endpoints()
        assert served.outcome("outside", served.outside_address) == REFUSED
        # kube-proxy: drop in nftables mode, refused in iptables mode; either will do.
        assert served.outcome("client-1", served.outside_address) in (REFUSED, SILENCE)


def around(served: Served, *hosts: str) -> list[str]:
    """Ranges that hold these hosts, some wide and with white space, as the API server allows."""
    found = []
    for host in hosts:
        address = served.cluster.lab.node(host).address(served.flavour.family)
        found.append(f" {address}/{32 if address.version == 4 else 128}")
    return found
