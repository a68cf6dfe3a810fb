"""Corners of resolve that no manifest can say."""

from datetime import UTC, datetime
from ipaddress import ip_address

import pytest
from msgspec import structs
from msgspec.structs import replace

from vipd.proxy.events import Applied, Deleted, Event, Kind
from vipd.proxy.model import Node, Service, ServicePort, ServiceType, TrafficPolicy
from vipd.proxy.names import Family, NamespacedName, Protocol, parse_network
from vipd.proxy.resolve import collapse, node_addresses, resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot, Touched, fold
from vipd.proxy.virtualserver import Before, Changes, Key, Table

SETTINGS = NodeSettings(node_name="node-a")
DAYS = [datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2)]


def web(ip: str = "10.96.0.1", name: str = "web") -> Service:
    return Service(
        name=NamespacedName("default", name),
        cluster_ips=(ip_address(ip),),
        ports=(ServicePort(name="", protocol=Protocol.TCP, port=80),),
    )


def after(*events: Event) -> Snapshot:
    return fold(Snapshot(), events)[0]


def test_nothing_touched_changes_nothing() -> None:
    snapshot = after(Applied(web()))
    table = resolve(snapshot, SETTINGS)
    same, changes = update(table, snapshot, SETTINGS, Touched())
    assert same == table
    assert changes == Changes({})
    assert not changes


def test_other_nodes_concern_nobody() -> None:
    snapshot = after(Applied(web()))
    table = resolve(snapshot, SETTINGS)
    snapshot, touched = fold(snapshot, [Applied(Node(name="node-b", zone="far"))])
    assert not update(table, snapshot, SETTINGS, touched)[1]


def test_networks_are_collapsed_by_family() -> None:
    given = ["fd00::/8", "10.0.0.0/9", "10.128.0.0/9", "10.1.0.0/16", "fd00:1::/32"]
    assert list(map(str, collapse([*map(parse_network, given)]))) == ["10.0.0.0/8", "fd00::/8"]


def test_the_first_address_of_each_family_is_the_nodes() -> None:
    addresses = tuple(map(ip_address, ("fd00::1", "10.0.0.1", "10.0.0.2", "fd00::2")))
    snapshot = after(Applied(Node(name="node-a", addresses=addresses)))
    assert node_addresses(snapshot, SETTINGS) == addresses[:2]


@pytest.mark.parametrize(
    ("winner", "loser", "why"),
    [
        (DAYS[0], DAYS[1], Before.AGE),
        (DAYS[0], DAYS[0], Before.NAME),
        (DAYS[0], None, Before.DATED),
        (None, None, Before.NAME_ALONE),
    ],
)
def test_a_conflict_says_which_rule_settled_it(
    winner: datetime | None, loser: datetime | None, why: Before
) -> None:
    first = structs.replace(web(name="a"), created=winner)
    second = structs.replace(web(name="b"), created=loser)
    (conflict,) = resolve(after(Applied(second), Applied(first)), SETTINGS).contested.values()
    assert (conflict.winner.service.name, conflict.why) == ("a", why)
    assert f"default/a, which {why} and has it" in str(conflict)


def test_only_touched_services_change_but_a_loser_is_known_again() -> None:
    snapshot = after(Applied(web()), Applied(web(name="young")), Applied(web("10.96.0.2", "other")))
    table = resolve(snapshot, SETTINGS)
    snapshot, touched = fold(snapshot, [Deleted(Kind.SERVICE, NamespacedName("default", "web"))])
    table, changes = update(table, snapshot, SETTINGS, touched)
    key = Key(Family.IPV4, ip_address("10.96.0.1"), Protocol.TCP, 80)
    assert list(changes.virtual_servers) == [key]
    winner = changes.virtual_servers[key]
    assert winner is not None
    assert winner.owner.service.name == "young"
    assert not table.contested


def test_health_check_node_ports_follow_their_services() -> None:
    def balanced(name: str, port: int) -> Service:
        return replace(
            web(name=name),
            type=ServiceType.LOAD_BALANCER,
            external_policy=TrafficPolicy.LOCAL,
            health_check_node_port=port,
        )

    snapshot = after(Applied(balanced("a", 31000)), Applied(web("10.96.0.9", "plain")))
    table = resolve(snapshot, SETTINGS)
    told = [told_ports(table)]
    steps: list[tuple[list[Event], bool]] = [
        ([Applied(web("10.96.0.8", "plain"))], False),  # whoever has none changes nothing
        ([Applied(balanced("b", 31001))], True),
        ([Applied(balanced("a", 31002))], True),
        ([Applied(Node(name="node-a", zone="z"))], False),
        ([Applied(web(name="b")), Deleted(Kind.SERVICE, NamespacedName("default", "a"))], True),
    ]
    for events, is_told in steps:
        snapshot, touched = fold(snapshot, events)
        table, changes = update(table, snapshot, SETTINGS, touched)
        assert table.network == resolve(snapshot, SETTINGS).network
        assert changes.network == (table.network if is_told else None)
        told.append(told_ports(table))
    assert told == [
        {"a": 31000},
        {"a": 31000},
        {"a": 31000, "b": 31001},
        {"a": 31002, "b": 31001},
        {"a": 31002, "b": 31001},
        {},
    ]


def told_ports(table: Table) -> dict[str, int]:
    return {name.name: port for name, port in table.network.health_ports}
