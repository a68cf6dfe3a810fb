"""What is told of, when again, and how much of it is written: pure, with clocks of the test's."""

from ipaddress import ip_address
from typing import Any, cast

import pytest
from immutables import Map
from msgspec.structs import replace

from vipd.proxy.errors import ManifestError, Rejected
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName
from vipd.proxy.notice import LONGEST_TEXT_BYTES, Notice, on_node, on_service, shortened
from vipd.proxy.notices import (
    AGAIN_SECONDS,
    FAILING_SECONDS,
    MOST_HOLDING,
    Holding,
    Seen,
    holding,
    started,
    switched,
)
from vipd.proxy.sources.kubernetes import notice_rates as rates
from vipd.proxy.sources.kubernetes.notice_rates import Rates
from vipd.proxy.status import SwitchReport
from vipd.proxy.virtualserver import Conflict, Key, NodeNetwork, Table, VirtualServer
from vipd.proxy.virtualserver import Kind as ServerKind

KEY = Key(Family.IPV4, ip_address("10.96.0.10"), Protocol.TCP, 80)
EMPTY = Table(Map(), Map(), Map(), NodeNetwork())


def owner(text: str) -> ServicePortName:
    return ServicePortName(NamespacedName(*text.split("/")), "http", Protocol.TCP)


def seen(table: Table = EMPTY, **more: object) -> Seen:
    return Seen(node="node-1", mode="nftables", table=table, **more)  # type: ignore[arg-type]


def told(what: Seen, failing: float = 0.0) -> list[tuple[str, str, str]]:
    return [(str(n.subject.name), n.reason, n.text) for n in holding(what, failing)]


def served(key: Key) -> VirtualServer:
    return VirtualServer(
        key=key, owner=owner("shop/web"), kind=ServerKind.CLUSTER, cluster=(), local=()
    )


LATE = owner("shop/late")


def test_nothing_is_told_where_all_is_well() -> None:
    assert told(seen()) == []


def test_a_rejected_service() -> None:
    table = Table(Map(), Map({KEY: (served(KEY),)}), Map(), NodeNetwork())
    ((name, reason, text),) = told(seen(table, rejected={KEY: Rejected("add", "no memory")}))
    assert (name, reason) == ("web", "RejectedByKernel")
    assert "node node-1" in text
    assert "10.96.0.10:80/TCP" in text
    assert "no memory" in text


def test_a_conflict_is_told_to_the_loser_and_names_nobody_of_another_namespace() -> None:
    conflict = Conflict(KEY, owner("shop/web"), (owner("shop/late"), owner("bank/secret")))
    notices = list(holding(seen(Table(Map(), Map(), Map({KEY: conflict}), NodeNetwork())), 0.0))
    assert [(n.subject.namespace, n.subject.name, n.shared) for n in notices] == [
        ("shop", "late", True),
        ("bank", "secret", True),
    ]
    assert "service web" in notices[0].text
    assert "secret" not in notices[0].text
    assert "web" not in notices[1].text
    assert "shop" not in notices[1].text


def test_a_malformed_object_is_told_and_what_has_no_name_is_not() -> None:
    errors = [
        ManifestError("API server: services", "Service shop/web", "spec.ports[0].port", "is 0"),
        ManifestError("API server: x", "EndpointSlice shop/web-1", "endpoints", "is wrong"),
        ManifestError("API server: services", "Service", "metadata.name", "is missing"),
        ManifestError("API server", "services", "", "503"),
    ]
    what = seen(problems={str(number): one for number, one in enumerate(errors)})
    assert told(what) == [
        ("web", "Malformed", "spec.ports[0].port: is 0"),
        ("web-1", "Malformed", "endpoints: is wrong"),
    ]


def test_a_dataplane_that_fails_for_long() -> None:
    failing = seen(failure="the kernel is busy")
    assert told(failing, FAILING_SECONDS - 1) == []
    ((name, reason, text),) = told(failing, FAILING_SECONDS)
    assert (name, reason) == ("node-1", "DataplaneFailing")
    assert "nftables" in text
    assert "the kernel is busy" in text


def test_drift_that_goes_on_and_what_kube_proxy_left() -> None:
    what = seen(going_on={"flusher": 4.0}, left_by_kube_proxy=("nft table ip kube-proxy",))
    (drift, left) = told(what)
    assert drift[1] == "DriftGoesOn"
    assert "flusher" in drift[2]
    assert left[1] == "KubeProxyLeftovers"
    assert "nft table ip kube-proxy" in left[2]


def test_a_start_and_a_switch() -> None:
    assert started("node-1", "1.2", "ipvs", "no nft").text == "vipd 1.2 serves in ipvs mode: no nft"
    report = SwitchReport(origin="nftables", target="ipvs", started=1.0, ended=2.0)
    assert (switched("n", report).reason, switched("n", report).warning) == ("Switched", False)
    report.failure = "no module"
    assert (switched("n", report).reason, switched("n", report).warning) == ("SwitchFailed", True)


def some(number: int) -> Notice:
    return on_node("node-1", "DataplaneFailing", "Commit", f"why {number}")


def test_what_holds_is_told_when_it_begins_and_then_seldom() -> None:
    watch = Holding()
    assert watch.due([some(1)], 0.0) == [some(1)]
    assert watch.due([some(1)], 5.0) == []
    assert watch.due([some(1), some(2)], 10.0) == [some(2)]
    assert watch.due([some(1), some(2)], AGAIN_SECONDS) == [some(1)]
    assert watch.due([], AGAIN_SECONDS + 1) == []
    assert watch.due([some(1)], AGAIN_SECONDS + 2) == [some(1)], "it is there again"


def test_many_that_hold_are_bounded() -> None:
    watch = Holding()
    assert len(watch.due(map(some, range(10 * MOST_HOLDING)), 0.0)) == MOST_HOLDING


@pytest.mark.parametrize("what", ["rejected", "contested", "failed_ports", "problems"])
def test_many_that_hold_are_the_same_ones_in_whatever_order_they_come(what: str) -> None:
    keys = [replace(KEY, port=number + 1) for number in range(MOST_HOLDING + 44)]
    watch = Holding()
    told = []
    for some in (keys, keys[::-1]):
        found: dict[Any, Any] = {}
        table = replace(EMPTY, claims=Map({key: (served(key),) for key in keys}))
        match what:
            case "rejected":
                found = {key: Rejected("add", "no memory") for key in some}
            case "contested":
                lost = {key: Conflict(key, owner("shop/web"), (LATE,)) for key in some}
                table = replace(table, contested=cast(Any, lost))
            case "failed_ports":
                found = {NamespacedName("shop", str(key)): (30000, "taken") for key in some}
            case "problems":
                found = {
                    f"s/{key}": ManifestError("f", f"Service s/{key}", "spec", "no") for key in some
                }
        holds = holding(seen(table, **({what: found} if found else {})), 0.0)
        told.append(len(watch.due(holds, 0.0)))
    assert told == [MOST_HOLDING, 0]


def test_texts_fit() -> None:
    assert shortened("a\n b\x00\tc") == "a b c"
    assert len(shortened("ß" * 2000).encode()) <= LONGEST_TEXT_BYTES


def test_one_object_has_25_at_once_and_then_one_in_five_minutes() -> None:
    bound = Rates()
    admitted = [bound.admits(some(number), 0.0) for number in range(30)]
    assert admitted.count(True) == 25
    assert not bound.admits(some(31), rates.SUBJECT_SECONDS - 1)
    assert bound.admits(some(32), rates.SUBJECT_SECONDS + 1)
    assert not bound.admits(some(33), rates.SUBJECT_SECONDS + 2)


def test_all_objects_together_have_a_bound_too() -> None:
    bound = Rates()
    notices = [on_service("shop", f"s{n}", "Malformed", "Read", "why") for n in range(500)]
    assert sum(bound.admits(one, 0.0) for one in notices) == rates.TOTAL_BURST
    assert bound.admits(notices[-1], rates.TOTAL_SECONDS + 1)


def test_a_series_counts_and_is_written_seldom() -> None:
    bound = Rates()
    assert bound.series(some(1), 0.0) is None
    bound.wrote(some(1), "name", 0.0)
    assert bound.series(some(1), 1.0) is not None
    assert bound.admits(some(1), 1.0)
    bound.wrote(some(1), "name", 1.0)
    for now in range(2, 100):
        bound.series(some(1), float(now))
        assert not bound.admits(some(1), float(now))
    late = 1.0 + rates.SERIES_WRITE_SECONDS
    bound.series(some(1), late)
    assert bound.admits(some(1), late)
    assert bound.count(some(1)) == 101
    assert bound.series(some(1), late + 2 * rates.SERIES_SECONDS) is None, "it is forgotten"


def test_strangers_make_nothing_grow() -> None:
    bound = Rates()
    for number in range(3 * rates.MOST_KEPT):
        notice = on_service("shop", f"s{number}", "Malformed", "Read", "why")
        bound.admits(notice, 0.0)
        bound.wrote(notice, f"n{number}", 0.0)
    assert len(bound._subjects) <= rates.MOST_KEPT
    assert len(bound._series) <= rates.MOST_KEPT
