"""The iptables program: names, the dispatch tree, choices with their probabilities."""

import random
from collections.abc import Iterable
from fractions import Fraction
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import msgspec
import pytest
from tests.unit.iptables_cases import NETWORK, many, server

from vipd.backends.iptables import balance, dispatch
from vipd.backends.iptables.compile import own_elements, program
from vipd.backends.iptables.dispatch import Leaf, Node
from vipd.backends.iptables.objects import Chain, hashed
from vipd.backends.iptables.observed import decode
from vipd.backends.iptables.plan import plan, plan_changes, without
from vipd.backends.iptables.trace import Walk, trace
from vipd.backends.protocol import Packet
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Family, NamespacedName, Protocol
from vipd.proxy.virtualserver import (
    Changes,
    Endpoint,
    Key,
    Kind,
    Masquerade,
    NodeNetwork,
    Refusal,
    Use,
)


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("default/kubernetes:httpstcp", "NPX46M4PTMTKRN6Y"),
        ("kube-system/kube-dns:dnsudp", "TCOU7JCQXEZGVUNU"),
        ("kube-system/kube-dns:dns-tcptcp", "ERIFXISQEP7F7OF4"),
    ],
)
def test_the_letters_of_a_chain_are_those_that_kube_proxy_gives_it(text: str, letters: str) -> None:
    assert hashed("SVC", text) == f"VIPD-SVC-{letters}"


def test_names_of_strangers_cannot_leave_the_comment() -> None:
    one = server(1)
    owner = msgspec.structs.replace(one.owner, port='x" -j ACCEPT\n-A INPUT')
    (chain,) = balance.chains(msgspec.structs.replace(one, owner=owner), NETWORK)
    assert chain.comment.startswith("ns/svc-1:x__-j_ACCEPT_-A_INPUT #")


def keys(count: int, seed: int) -> list[Leaf]:
    chance = random.Random(seed)
    places = [
        *(IPv4Address((10 << 24) + (96 << 16) + number) for number in range(count)),
        *(IPv4Address(chance.getrandbits(32)) for _ in range(count // 4)),
    ]
    found = [Key(Family.IPV4, one, Protocol.TCP, 80) for one in places]
    found += [
        Key(Family.IPV4, places[0], chance.choice(list(Protocol)), chance.randrange(1, 1 << 16))
        for _ in range(200)
    ]
    return list({(one := dispatch.leaf(key, "T")).bits: one for key in found}.values())


def by_name(found: Iterable[Chain]) -> dict[str, Chain]:
    return {one.name: one for one in found}


@pytest.mark.parametrize(("count", "seed"), [(3, 1), (40, 2), (700, 3)])
def test_the_tree_depends_on_its_keys_alone_and_a_change_touches_few_chains(
    count: int, seed: int
) -> None:
    leaves = keys(count, seed)
    random.Random(seed).shuffle(leaves)
    stay = leaves[: len(leaves) // 2]
    node: Node = dispatch.EMPTY
    kernel = by_name(dispatch.chains(node, "ROOT", 32))
    for add, leaf in (*((True, it) for it in leaves), *((False, it) for it in leaves[len(stay) :])):
        after = dispatch.with_leaf(node, leaf) if add else dispatch.without_key(node, leaf.bits)
        changes = list(dispatch.differences(node, after, "ROOT", 32))
        assert len(changes) <= 6
        for old, new in changes:
            if old is not None:
                assert kernel.pop(old.name) == old
            if new is not None:
                kernel[new.name] = new
        node = after
    assert node == dispatch.build(stay)
    assert kernel == by_name(dispatch.chains(node, "ROOT", 32))


def packet_to(address: str, port: int = 80, **other: Any) -> Packet:
    told: dict[str, Any] = {
        "source": ip_address("198.51.100.7"),
        "destination": ip_address(address),
        "protocol": Protocol.TCP,
        "port": port,
    }
    return Packet(**(told | other))


@pytest.mark.parametrize("spread", [1, 35])
def test_a_first_packet_meets_few_rules_at_thirty_thousand_services(spread: int) -> None:
    base = int(ip_address("10.96.0.0"))
    servers = [
        server(number, "10.244.1.1", address=str(IPv4Address(base + number * spread)))
        for number in range(30_000)
    ]
    made = program(servers, NETWORK)
    counts = []
    for one in servers[::97]:
        walk = Walk(made, packet_to(str(one.key.address)))
        assert walk.hook("nat", "PREROUTING") == "translated"
        assert walk.targets == {str(one.cluster[0]): 1}
        counts.append(walk.met)
    assert max(counts) <= 40
    other = Walk(made, packet_to("10.244.3.3"))
    assert other.hook("nat", "PREROUTING") == ""
    assert other.met <= 4, "a packet for no service leaves at once"


def test_many_ports_of_one_address_are_no_list() -> None:
    servers = [server(number, address="10.96.0.1", port=1000 + number) for number in range(500)]
    made = program(servers, NETWORK)
    walks = [Walk(made, packet_to("10.96.0.1", 1000 + number)) for number in range(500)]
    assert all(walk.hook("nat", "PREROUTING") == "translated" for walk in walks)
    assert max(walk.met for walk in walks) <= 35


def test_ten_thousand_services_are_seventy_thousand_rules_at_most() -> None:
    servers = [
        server(number, *(f"10.{128 + (number >> 8)}.{number & 255}.{it}" for it in range(5)))
        for number in range(10_000)
    ]
    made, _ = plan(None, program(servers, NETWORK))
    rules = [line for line in str(made).splitlines() if line.startswith("-A")]
    assert 60_000 <= len(rules) <= 70_000


@pytest.mark.parametrize("algorithm", list(Algorithm))
@pytest.mark.parametrize("weights", [(1,), (1, 1, 1), (5, 1, 2), (1,) * 40, (3,) * 20 + (1,) * 300])
def test_each_endpoint_gets_what_it_weighs(algorithm: Algorithm, weights: tuple[int, ...]) -> None:
    endpoints = tuple(
        Endpoint(IPv4Address(0x0AF40000 + number), 8080, weight)
        for number, weight in enumerate(weights)
    )
    one = server(1, cluster=endpoints, algorithm=algorithm)
    walk = Walk(program([one], NETWORK), packet_to("10.96.0.1"))
    walk.hook("nat", "PREROUTING")
    assert sum(walk.targets.values()) == 1
    total = sum(weights)
    near = 0.05 if algorithm is Algorithm.SOURCE_HASH and total > 32 else 1e-8
    for endpoint in endpoints:
        wanted = Fraction(endpoint.weight, total)
        assert abs(walk.targets[str(endpoint)] - wanted) <= near * wanted
    if algorithm in (Algorithm.RANDOM, Algorithm.MAGLEV):
        assert all(len(chain.rules) <= 20 for chain in balance.chains(one, NETWORK))


def test_a_range_of_everything_is_two_halves() -> None:
    """A set of networks refuses a prefix of no bits."""
    ranges = (ip_network("0.0.0.0/0"),)
    texts = [it.text for it in own_elements(server(1, allowed_sources=ranges))]
    assert "10.96.0.1,tcp:80,0.0.0.0/1" in texts
    assert "10.96.0.1,tcp:80,128.0.0.0/1" in texts


def outside(**other: Any) -> Walk:
    local = (Endpoint(ip_address("10.244.1.9"), 80, local=True),)
    one = server(
        1,
        "10.244.2.2",
        "10.244.1.9",
        address="192.0.2.1",
        kind=Kind.LOAD_BALANCER,
        local=local,
        masquerade=Masquerade.NEVER,
        use=Use.LOCAL_FROM_OUTSIDE,
    )
    walk = Walk(program([one], NETWORK), packet_to("192.0.2.1", **other))
    walk.hook("nat", "OUTPUT" if walk.packet.from_node else "PREROUTING")
    return walk


def test_external_policy_local_is_for_others_than_pods_and_the_node() -> None:
    assert set(outside().targets) == {"10.244.1.9:80"}
    assert not outside().marked
    pod = outside(source=ip_address("10.244.7.7"))
    assert len(pod.targets) == 2
    assert not pod.marked
    node = outside(from_node=True)
    assert len(node.targets) == 2
    assert node.marked


@pytest.mark.parametrize(
    ("refusal", "to_node", "outcome"),
    [
        (Refusal.REJECT, False, "refused with tcp-reset"),
        (Refusal.DROP, False, "dropped"),
        (Refusal.REJECT, True, "refused with tcp-reset"),
        (Refusal.DROP, True, "dropped"),
    ],
)
def test_an_empty_virtual_server_is_refused(refusal: Refusal, to_node: bool, outcome: str) -> None:
    for address, port in (("10.96.0.1", 80), ("203.0.113.5", 30080)):
        if address.startswith("203") and not to_node:
            continue
        one = server(
            1,
            address=address if not to_node or port == 80 else None,
            port=port,
            cluster=(),
            when_empty=refusal,
        )
        steps = trace(program([one], NETWORK), packet_to(address, port, to_node=to_node))
        assert steps[-1].outcome == outcome


def test_unknown_ports_and_addresses_are_refused_and_dropped() -> None:
    made = program([server(1)], NETWORK)
    assert trace(made, packet_to("10.96.0.1", 81))[-1].outcome == "refused with tcp-reset"
    assert trace(made, packet_to("10.96.9.9"))[-1].outcome == "dropped"
    assert trace(made, packet_to("10.244.9.9")) == []


def test_health_checks_pass_a_firewall_of_the_host() -> None:
    ports = ((NamespacedName("shop", "web"), 31000),)
    network = msgspec.structs.replace(NETWORK, health_ports=ports)
    made = program([server(1)], network)
    last = trace(made, packet_to("192.168.0.1", 31000, to_node=True))[-1]
    assert last.what.startswith("-p tcp -m tcp --dport 31000")
    assert last.what.endswith("-j ACCEPT")
    other = trace(made, packet_to("192.168.0.1", 31001, to_node=True))
    assert not any("ACCEPT" in one.what for one in other)
    changed, _ = plan_changes(program([server(1)], NETWORK), Changes({}, network))
    written = {chain.name for work in changed.work.tables.values() for chain in work.write}
    assert written == {"VIPD-EXTERNAL-SERVICES"}


def test_a_rule_that_cannot_be_read_is_an_error() -> None:
    walk = Walk(program([server(1)], NETWORK), packet_to("10.96.0.1"))
    with pytest.raises(ValueError, match="--hex"):
        walk._matches("-p tcp -m string --hex 00")
    with pytest.raises(ValueError, match="NFQUEUE"):
        walk._target("NFQUEUE")


def test_a_change_of_the_node_rewrites_what_depends_on_it() -> None:
    made = program(many(3), NETWORK)
    other = msgspec.structs.replace(NETWORK, masquerade_mark=0x8000)
    step, after = plan_changes(made, Changes({}, other))
    assert "0x8000/0x8000" in str(step)
    assert "VIPD-SVC-" not in str(step)
    assert plan_changes(after, Changes({}, other))[0].size == 0


def test_without_gives_back_the_program_before() -> None:
    before = program(many(3), NETWORK)
    other = server(1, "10.244.77.7", affinity_seconds=9)
    _, after = plan_changes(before, Changes({other.key: other, server(2).key: None}))
    assert without(before, after, [other.key, server(2).key]) == before


def test_ipv6_prefixes_and_marks_read_as_the_tool_prints_them() -> None:
    leaf = dispatch.leaf(Key(Family.IPV6, IPv6Address("fd00:96::1"), Protocol.UDP, 53), "T")
    assert dispatch.match(leaf.bits, 0, 128) == "-d fd00:96::1/128 -p udp -m udp --dport 53"
    assert dispatch.match(leaf.bits >> 36, 36, 128) == "-d fd00:96::/110"
    assert dispatch.match(leaf.bits >> 4, 4, 128).endswith("--dport 48:63")
    assert dispatch.match(leaf.bits >> 16, 16, 128) == "-d fd00:96::1/128 -p udp"


def test_other_modes_chains_are_nobodys_here() -> None:
    text = (
        "*nat\n:VIPD-IPVS-ADMIT - [0:0]\n:VIPD-TREE - [0:0]\n-A PREROUTING -j VIPD-IPVS-ADMIT\n"
        "-A POSTROUTING -j VIPD-TREE\n-A VIPD-IPVS-ADMIT -j RETURN\nCOMMIT\n"
    )
    seen = decode({(Family.IPV4, "nat"): text}, {})
    assert list(seen.chains[Family.IPV4, "nat"]) == ["VIPD-TREE"]
    assert seen.jumps[Family.IPV4, "nat"] == [("POSTROUTING", "-j VIPD-TREE")]


def test_node_ports_are_answered_where_the_ranges_say() -> None:
    network = NodeNetwork(node_port_ranges=(ip_network("203.0.113.0/24"),))
    made = program([server(1, address=None, port=30080)], network)
    for address, answered in (
        ("203.0.113.5", True),
        ("198.51.100.5", False),
        ("127.0.0.1", False),
    ):
        walk = Walk(made, packet_to(address, 30080, to_node=True))
        assert bool(walk.hook("nat", "PREROUTING")) is answered
