"""What DNS workers are told: what can be seen in names, each once, as it is at that moment."""

from collections.abc import Sequence

import pytest
from msgspec import structs

from vipd.dns import feed
from vipd.dns.facts import Kind as What
from vipd.dns.feed import Changed, Kept, Portion, Untold
from vipd.proxy.events import Applied, Deleted, Event, Kind, Synced
from vipd.proxy.model import EndpointSlice, Namespace, Node, Pod, Service, SliceEndpoint
from vipd.proxy.names import Family, NamespacedName, parse_address, parse_network
from vipd.proxy.snapshot import fold

WEB = NamespacedName("default", "web")


class Source:
    """Folds events, as the daemon does."""

    def __init__(self, *, pods: bool = False) -> None:
        self.kept = Kept(pods=pods)

    def tell(self, *events: Event) -> Changed:
        before = self.kept.snapshot
        after, touched = fold(before, events)
        return self.kept.take(events, before, after, touched)


def service(name: NamespacedName = WEB, address: str = "10.96.0.1", **more: object) -> Applied:
    told = Service(name=name, cluster_ips=(parse_address(address),), **more)  # type: ignore[arg-type]
    return Applied(told)


def endpoints(*addresses: str, ready: bool = True) -> Applied:
    return Applied(
        EndpointSlice(
            name=NamespacedName("default", "web-1"),
            service=WEB,
            family=Family.IPV4,
            endpoints=tuple(
                SliceEndpoint(address=parse_address(one), ready=ready) for one in addresses
            ),
        )
    )


def everything(untold: Untold, kept: Kept) -> Sequence[Portion]:
    found = []
    while untold:
        found.append(untold.portion(kept))
    return found


def test_what_names_do_not_show_is_not_told() -> None:
    source = Source()
    assert source.tell(service()).services == [WEB]
    assert not source.tell(service(affinity_seconds=10))
    assert not source.tell(endpoints("10.244.0.1"))
    assert source.tell(service(address="10.96.0.2")).services == [WEB]


def test_endpoints_of_a_headless_service_are_told() -> None:
    source = Source()
    headless = Applied(Service(name=WEB, headless=True))
    source.tell(headless)
    assert source.tell(endpoints("10.244.0.1")).services == [WEB]
    assert not source.tell(endpoints("10.244.0.1"))
    assert source.tell(endpoints("10.244.0.1", ready=False)).services == [WEB]


def test_a_slow_worker_is_told_the_last_state_once() -> None:
    source, untold = Source(), Untold()
    for last in range(1, 100):
        untold.note(source.tell(service(address=f"10.96.0.{last}")))
    (portion,) = everything(untold, source.kept)
    assert [facts.cluster_ips for facts in portion.put] == [(parse_address("10.96.0.99").packed,)]
    assert portion.drop == ()


def test_what_came_and_went_is_dropped() -> None:
    source, untold = Source(), Untold()
    untold.note(source.tell(service()))
    untold.note(source.tell(Deleted(Kind.SERVICE, WEB)))
    (portion,) = everything(untold, source.kept)
    assert (portion.put, portion.drop) == ((), (WEB,))


def test_portions_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MOST_AT_ONCE", 10)
    source, untold = Source(), Untold()
    names = [NamespacedName("default", f"svc-{n}") for n in range(35)]
    untold.note(source.tell(*(service(one) for one in names)))
    portions = everything(untold, source.kept)
    assert [len(one.put) for one in portions] == [10, 10, 10, 5]
    assert {facts.key for one in portions for facts in one.put} == set(names)


def test_everything_is_told_to_one_that_is_new() -> None:
    source, untold = Source(), Untold()
    source.tell(service(), Applied(Namespace("shop")), Synced())
    untold.note(source.kept.everything())
    (portion,) = everything(untold, source.kept)
    assert [facts.kind for facts in portion.put] == [What.CLUSTER]
    assert portion.namespaces == frozenset({"shop"})
    assert (portion.admit, portion.expel) == ((), ())
    assert source.kept.synced


def test_namespaces_come_and_go() -> None:
    source = Source()
    assert source.tell(Applied(Namespace("shop"))).namespaces
    assert not source.tell(Applied(Namespace("shop"))).namespaces
    assert source.tell(Deleted(Kind.NAMESPACE, NamespacedName("", "shop"))).namespaces
    assert source.kept.namespaces == set()


@pytest.mark.parametrize("needed", [True, False])
def test_pods_are_told_where_names_depend_on_them(needed: bool) -> None:
    source = Source(pods=needed)
    pod = Pod(name=NamespacedName("default", "a"), ips=(parse_address("10.244.0.9"),), ready=True)
    assert bool(source.tell(Applied(pod)).pods) is needed
    assert not source.tell(Applied(pod)).pods
    untold = Untold()
    untold.note(source.kept.everything())
    (portion,) = everything(untold, source.kept)
    assert len(portion.put_pods) == needed
    assert bool(source.tell(Deleted(Kind.POD, pod.name)).pods) is needed


def test_nodes_and_their_pods_may_ask() -> None:
    source = Source()
    node = Node(
        name="n1",
        addresses=(parse_address("192.0.2.1"),),
        pod_cidrs=(parse_network("10.244.1.0/24"),),
    )
    assert source.tell(Applied(node)).sources == ["192.0.2.1", "10.244.1.0/24"]
    own = parse_address("198.51.100.1"), parse_address("192.0.2.1")
    assert source.kept.take_own(own).sources == ["198.51.100.1"]
    assert not source.kept.take_own(own)
    assert set(source.kept.sources) == {"198.51.100.1", "192.0.2.1", "10.244.1.0/24"}
    assert not source.tell(Applied(structs.replace(node, zone="a"))).sources
    # Its address is this node's as well.
    assert source.tell(Deleted(Kind.NODE, NamespacedName("", "n1"))).sources == ["10.244.1.0/24"]


def test_of_sources_only_what_changes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MOST_AT_ONCE", 10)
    source, untold = Source(), Untold()
    nodes = [Node(name=f"n{n}", addresses=(parse_address(f"192.0.2.{n}"),)) for n in range(25)]
    untold.note(source.tell(*map(Applied, nodes)))
    assert [len(one.admit) for one in everything(untold, source.kept)] == [10, 10, 5]
    untold.note(source.tell(Applied(Node(name="n7", addresses=(parse_address("192.0.3.7"),)))))
    (portion,) = everything(untold, source.kept)
    assert (portion.admit, portion.expel) == (("192.0.3.7",), ("192.0.2.7",))
