"""Slices made from Pods, and who wins when there are real ones."""

from ipaddress import ip_address
from typing import Any

from vipd.proxy.decode_endpoints import Endpoints
from vipd.proxy.events import Applied, Deleted, Event, Kind, kind_of, name_of
from vipd.proxy.model import (
    ContainerPort,
    EndpointSlice,
    KubernetesObject,
    Node,
    Pod,
    Service,
    ServicePort,
    ServiceType,
    SliceEndpoint,
    SlicePort,
    TrafficDistribution,
)
from vipd.proxy.names import Family, NamespacedName, Protocol
from vipd.proxy.sources.claims import Change
from vipd.proxy.sources.controller import Controller
from vipd.proxy.sources.files import Key
from vipd.proxy.sources.selection import Selection

NAME = NamespacedName("default", "web")


def service(name: str = "web", app: str = "web", **fields: object) -> Service:
    given: dict[str, object] = {
        "name": NamespacedName("default", name),
        "selector": (("app", app),) if app else (),
        "ports": (ServicePort(name="", protocol=Protocol.TCP, port=80, target_port="http"),),
        "cluster_ips": (ip_address("10.0.0.1"),),
    }
    return Service(**(given | fields))  # type: ignore[arg-type]


def pod(name: str = "a", ip: str = "172.16.0.1", number: int = 8080, **fields: Any) -> Pod:
    given: dict[str, object] = {
        "labels": (("app", "web"), ("x", "y")),
        "ips": (ip_address(ip),),
        "ready": True,
        "node": "n",
        "ports": (ContainerPort("http", Protocol.TCP, number),),
    }
    given["name"] = NamespacedName(str(fields.pop("namespace", "default")), name)
    return Pod(**(given | fields))  # type: ignore[arg-type]


def real(name: str = "web-real", ip: str = "172.16.9.9") -> EndpointSlice:
    return EndpointSlice(
        name=NamespacedName("default", name),
        service=NAME,
        family=Family.IPV4,
        endpoints=(SliceEndpoint(address=ip_address(ip)),),
        ports=(SlicePort("", Protocol.TCP, 80),),
    )


def put(value: KubernetesObject) -> Change:
    return Change(Key(kind_of(value).value, name_of(value)), value)


def gone(value: KubernetesObject) -> Change:
    return Change(Key(kind_of(value).value, name_of(value)), None)


class World:
    """A controller, and what its events add up to."""

    def __init__(self, *values: KubernetesObject) -> None:
        self.controller = Controller()
        self.slices: dict[str, EndpointSlice] = {}
        self.apply(*map(put, values))

    def apply(self, *changes: Change) -> list[Event]:
        events = self.controller.apply(changes)
        for event in events:
            if isinstance(event, Applied) and isinstance(event.object, EndpointSlice):
                self.slices[event.object.name.name] = event.object
            elif isinstance(event, Deleted) and event.kind is Kind.ENDPOINT_SLICE:
                del self.slices[event.name.name]  # a deletion of what was never told is an error
        return events

    def addresses(self) -> list[str]:
        return [str(e.address) for s in self.slices.values() for e in s.endpoints]


def test_endpoint_of_a_pod() -> None:
    world = World(service(), pod(), Node(name="n", zone="z"))
    assert world.slices == {
        "web~pods-ipv4-0": EndpointSlice(
            name=NamespacedName("default", "web~pods-ipv4-0"),
            service=NAME,
            family=Family.IPV4,
            endpoints=(
                SliceEndpoint(address=ip_address("172.16.0.1"), node="n", zone="z", pod="a"),
            ),
            ports=(SlicePort("", Protocol.TCP, 8080),),
        )
    }


def test_conditions() -> None:
    cases: list[tuple[dict[str, Any], bool, tuple[bool, bool, bool]]] = [
        ({}, False, (True, True, False)),
        ({"ready": False}, False, (False, False, False)),
        ({"ready": False}, True, (True, False, False)),
        ({"terminating": True}, False, (False, True, True)),
        ({"terminating": True, "ready": False}, True, (True, False, True)),
    ]
    for given, publish, expected in cases:
        world = World(service(publish_not_ready=publish), pod(**given))
        ((endpoint,),) = [s.endpoints for s in world.slices.values()]
        assert (endpoint.ready, endpoint.serving, endpoint.terminating) == expected


def test_who_is_no_endpoint() -> None:
    for each in (
        pod(finished=True),
        pod(ips=()),
        pod(labels=(("app", "db"),)),
        pod(namespace="other"),
    ):
        assert World(service(), each).slices == {}
    assert World(service(app=""), pod()).slices == {}
    assert World(service(type=ServiceType.EXTERNAL_NAME), pod()).slices == {}


def test_pods_that_number_a_named_port_otherwise_go_in_another_slice() -> None:
    world = World(service(), pod(), pod("b", "172.16.0.2", 9090), pod("c", "172.16.0.3"))
    found = {s.ports[0].port: [e.pod for e in s.endpoints] for s in world.slices.values()}
    assert found == {8080: ["a", "c"], 9090: ["b"]}
    assert sorted(world.slices) == ["web~pods-ipv4-0", "web~pods-ipv4-1"]


def test_protocol_belongs_to_a_port_name() -> None:
    ports = (ContainerPort("http", Protocol.UDP, 1), ContainerPort("http", Protocol.TCP, 2))
    (found,) = World(service(), pod(ports=ports)).slices.values()
    assert found.ports == (SlicePort("", Protocol.TCP, 2),)


def test_one_slice_for_each_family_of_the_service() -> None:
    both = pod(ips=(ip_address("172.16.0.1"), ip_address("fd00::1")))
    six = (ip_address("fd00::a"),)
    assert World(service(), both).addresses() == ["172.16.0.1"]
    assert World(service(cluster_ips=six), both).addresses() == ["fd00::1"]
    assert World(service(cluster_ips=()), both).addresses() == ["172.16.0.1", "fd00::1"]
    only = World(service(cluster_ips=(), families=(Family.IPV6,)), both)
    assert only.addresses() == ["fd00::1"]


def test_hostname_needs_the_subdomain() -> None:
    for subdomain, expected in (("web", "h"), ("db", None), ("", None)):
        world = World(service(headless=True), pod(hostname="h", subdomain=subdomain))
        (found,) = world.slices.values()
        assert (found.endpoints[0].hostname, found.headless) == (expected, True)


def test_a_pod_concerns_the_services_that_select_it_before_or_after() -> None:
    world = World(service(), service("db", "db"), service("no", "no"), pod())
    events = world.apply(put(pod(labels=(("app", "db"),))))
    assert {event.name.name for event in events if isinstance(event, Deleted)} == {
        "web~pods-ipv4-0"
    }
    assert list(world.slices) == ["db~pods-ipv4-0"]
    events = world.apply(gone(pod()))
    assert events == [
        Deleted(Kind.POD, NamespacedName("default", "a")),
        Deleted(Kind.ENDPOINT_SLICE, NamespacedName("default", "db~pods-ipv4-0")),
    ]


def test_a_change_that_changes_no_endpoint_tells_no_slice() -> None:
    world = World(service(), pod())
    changed = pod(labels=(("app", "web"), ("x", "z")))
    assert world.apply(put(changed)) == [Applied(changed)]


def test_selector_changes() -> None:
    world = World(service(), pod())
    world.apply(put(service(app="db")))
    assert world.slices == {}
    world.apply(put(service()))
    assert world.addresses() == ["172.16.0.1"]
    world.apply(gone(service()))
    assert world.slices == {}


def test_all_pairs_of_a_selector_must_match() -> None:
    both = (("app", "web"), ("x", "y"))
    wanted = service(selector=both)
    others = [
        pod("b", labels=both[:1]),
        pod("c", labels=both[1:]),
        pod("d", labels=(*both, ("z", ""))),
    ]
    (found,) = World(wanted, pod(), *others).slices.values()
    assert [endpoint.pod for endpoint in found.endpoints] == ["a", "d"]
    world = World(*others, wanted)
    assert len(world.apply(put(pod("b", labels=both)))) == 2
    (found,) = world.slices.values()
    assert [endpoint.pod for endpoint in found.endpoints] == ["b", "d"]


def test_a_pod_that_matches_in_part_concerns_nobody() -> None:
    selection = Selection()
    wanted = service(selector=(("app", "web"), ("x", "y")))
    selection.service(NAME, wanted)
    assert selection.services_of(pod(labels=(("app", "web"),))) == []
    assert selection.services_of(pod()) == [NAME]


def test_traffic_distribution_becomes_hints() -> None:
    """As trafficdist.go of the EndpointSlice controller: only ready endpoints, what is known."""
    nodes = Node(name="n", zone="z"), Node(name="m")
    away = pod("b", "172.16.0.2", node="m"), pod("c", "172.16.0.3", ready=False)
    for distribution, expected in (
        (TrafficDistribution.ANYWHERE, [(set(), set())] * 3),
        (TrafficDistribution.SAME_ZONE, [({"z"}, set()), (set(), set()), (set(), set())]),
        (TrafficDistribution.SAME_NODE, [({"z"}, {"n"}), (set(), {"m"}), (set(), set())]),
    ):
        world = World(*nodes, service(distribution=distribution), pod(), *away)
        (one,) = world.slices.values()
        hints = [(set(each.zone_hints), set(each.node_hints)) for each in one.endpoints]
        assert hints == expected


def test_zone_of_a_node_changes() -> None:
    world = World(service(), pod())
    for node, zone in ((Node(name="n", zone="z"), "z"), (Node(name="n"), None)):
        world.apply(put(node))
        assert [s.endpoints[0].zone for s in world.slices.values()] == [zone]
    world.apply(put(Node(name="n", zone="z")))
    world.apply(gone(Node(name="n")))
    assert [s.endpoints[0].zone for s in world.slices.values()] == [None]


def test_real_slices_win_and_made_ones_come_back() -> None:
    world = World(service(), pod())
    world.apply(put(real()), put(real("web-more")))
    assert sorted(world.slices) == ["web-more", "web-real"]
    world.apply(gone(real()))
    assert list(world.slices) == ["web-more"]
    world.apply(gone(real("web-more")))
    assert list(world.slices) == ["web~pods-ipv4-0"]


def test_endpoints_win_over_pods_and_lose_to_slices() -> None:
    key = Key("Endpoints", NAME)
    endpoints = Endpoints(NAME, (real("web~endpoints-0-ipv4", "172.16.5.5"),))
    world = World(service(), pod())
    assert world.apply(Change(key, endpoints))
    assert world.addresses() == ["172.16.5.5"]
    world.apply(put(real()))
    assert world.addresses() == ["172.16.9.9"]
    world.apply(gone(real()))
    assert world.addresses() == ["172.16.5.5"]
    world.apply(Change(key, None))
    assert world.addresses() == ["172.16.0.1"]


def test_order_of_arrival_does_not_matter() -> None:
    values: list[KubernetesObject] = [
        service(),
        pod(),
        pod("b", "172.16.0.2"),
        Node(name="n", zone="z"),
    ]
    forwards, backwards = World(*values), World()
    for value in reversed(values):
        backwards.apply(put(value))
    assert forwards.slices == backwards.slices
