"""Fold: events that say nothing new, that come twice, or that are about nobody."""

from vipd.proxy.errors import ManifestError
from vipd.proxy.events import Applied, Deleted, Event, Kind, Problem, Synced
from vipd.proxy.model import EndpointSlice, Namespace, Node, Pod, Service, ServiceCIDR
from vipd.proxy.names import Family, NamespacedName, parse_network
from vipd.proxy.snapshot import Snapshot, Touched, fold

WEB = NamespacedName("default", "web")
ONE = NamespacedName("default", "one")


def one(service: str = "web", name: str = "one") -> EndpointSlice:
    return EndpointSlice(
        name=NamespacedName("default", name),
        service=NamespacedName("default", service),
        family=Family.IPV4,
    )


def test_what_was_never_there_can_be_deleted() -> None:
    events = [Deleted(kind, NamespacedName("default", "x")) for kind in Kind]
    assert fold(Snapshot(), events) == (Snapshot(), Touched())


def test_pods_namespaces_and_the_sources_own_news_are_passed_over() -> None:
    events: list[Event] = [
        Applied(Pod(name=WEB)), Applied(Namespace("default")), Synced(),
        Problem("file", ManifestError("file", "", "", "is empty")), Problem("file", None),
    ]  # fmt: skip
    assert fold(Snapshot(), events) == (Snapshot(), Touched())


def test_a_slice_that_moves_touches_both_services() -> None:
    before, _ = fold(Snapshot(), [Applied(one("web")), Applied(one("web", "two"))])
    after, touched = fold(before, [Applied(one("api"))])
    assert touched.services == {WEB, NamespacedName("default", "api")}
    assert after.slices[WEB] == (one("web", "two"),)
    assert after.slice_owners[ONE] == NamespacedName("default", "api")


def test_the_last_slice_leaves_nothing_behind() -> None:
    before, _ = fold(Snapshot(), [Applied(one())])
    after, touched = fold(before, [Deleted(Kind.ENDPOINT_SLICE, ONE)])
    assert after == Snapshot()
    assert touched == Touched(frozenset({WEB}))


def test_slices_stand_by_name_whatever_came_first() -> None:
    after, _ = fold(Snapshot(), [Applied(one(name=name)) for name in ("c", "a", "b")])
    assert [each.name.name for each in after.slices[WEB]] == ["a", "b", "c"]


def test_the_old_snapshot_stays_what_it_was() -> None:
    before, _ = fold(Snapshot(), [Applied(Service(name=WEB)), Applied(one())])
    fold(before, [Deleted(Kind.SERVICE, WEB), Deleted(Kind.ENDPOINT_SLICE, ONE)])
    assert WEB in before.services
    assert before.slices[WEB] == (one(),)


def test_nodes_and_ranges_are_named() -> None:
    cidr = ServiceCIDR("kubernetes", (parse_network("10.96.0.0/16"),))
    before, touched = fold(Snapshot(), [Applied(Node(name="n")), Applied(cidr)])
    assert touched == Touched(nodes=frozenset({"n"}), service_cidrs=True)
    assert fold(before, [Applied(cidr), Applied(Node(name="n"))])[1] == Touched()
