"""What of a stranger's names reaches nft text, and how identities keep apart."""

from ipaddress import ip_address

import pytest

from vipd.backends.nftables.compile import chain_name, entry, identities
from vipd.backends.nftables.pipeline import classid, shape_chain
from vipd.backends.nftables.plan import compile_program, plan
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName
from vipd.proxy.virtualserver import Endpoint, Key, Kind, NodeNetwork, VirtualServer

ENDPOINTS = (Endpoint(ip_address("10.244.1.2"), 8080), Endpoint(ip_address("10.244.1.3"), 8080))
HOSTILE = [
    'a" ; flush ruleset ; add rule ip x y comment "',
    "a\nflush ruleset",
    "} }; delete table ip filter",
    "a b",
    "$(reboot)",
    "ä\u2028\x00",
    "x" * 500,
    "",
]


def server(name: str = "web", port: str = "", **more: object) -> VirtualServer:
    owner = ServicePortName(NamespacedName("default", name), port, Protocol.TCP)
    fields = {
        "key": Key(Family.IPV4, ip_address("10.96.0.1"), Protocol.TCP, 80),
        "owner": owner,
        "kind": Kind.CLUSTER,
        "cluster": ENDPOINTS,
        "local": (),
        "affinity_seconds": 10,
    } | more
    return VirtualServer(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("where", ["service", "port", "pod"])
def test_hostile_names_never_reach_nft(name: str, where: str) -> None:
    bad = server(name) if where == "service" else server(port=name)
    if where == "pod":
        bad = server(
            cluster=tuple(Endpoint(e.address, e.port, pod=name, node=name) for e in ENDPOINTS)
        )
    harmless = plan(None, compile_program([server()], NodeNetwork()))[0]
    made = plan(None, compile_program([bad], NodeNetwork()))[0]
    own = chain_name(bad, 2, local=False)
    assert own.replace("-", "").replace("_", "").replace("/", "").replace(".", "").isalnum()
    assert own.isascii()
    assert len(f"node-port-local-{own}") < 128
    assert str(made).replace(own, "NAME").count("\n") == str(harmless).count("\n")
    assert "ruleset" not in str(made).replace(own, "NAME")


def test_names_that_look_alike_have_chains_of_their_own() -> None:
    names = {
        chain_name(server("a", port), 1, local=False)
        for port in ("b c", "b_c", "b\tc", "b-c", "x" * 200, "x" * 201)
    }
    assert len(names) == 6


def test_tcp_and_udp_ports_of_one_name_have_chains_of_their_own() -> None:
    udp = ServicePortName(NamespacedName("default", "web"), "", Protocol.UDP)
    assert chain_name(server(), 1, local=False) != chain_name(server(owner=udp), 1, local=False)


def test_own_chains_are_no_shapes() -> None:
    for port in ("random-5", "maglev-3", "local-random-1"):
        for algorithm in Algorithm:
            name = chain_name(server("random-5", port, algorithm=algorithm), 3, local=False)
            with pytest.raises(ValueError, match="own"):
                shape_chain(name, Family.IPV4)


@pytest.mark.parametrize("name", ["random-", "random-x", "random", "inc-5", "", "-5", "dispatch"])
def test_what_is_no_shape(name: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the message is the name
        shape_chain(name, Family.IPV4)


def test_identities_depend_on_the_endpoint_alone() -> None:
    alone = identities(ENDPOINTS[:1], local=False)
    assert alone.items() <= identities(ENDPOINTS, local=False).items()
    assert identities(ENDPOINTS, local=False) == identities(reversed(ENDPOINTS), local=False)
    assert not set(identities(ENDPOINTS, local=True).values()) & set(alone.values())


def test_identities_that_collide_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vipd.backends.nftables.compile._IDENTITIES", 3)
    with_two = identities(ENDPOINTS, local=False)
    assert len(set(with_two.values())) == 2
    assert with_two == identities(reversed(ENDPOINTS), local=False)


def test_identities_are_neither_slots_nor_words() -> None:
    many = [Endpoint(ip_address(f"10.244.{i // 250}.{i % 250}"), 80) for i in range(5000)]
    for local in (False, True):
        numbers = identities(many, local=local).values()
        assert len(set(numbers)) == 5000
        assert all(0x80000000 <= number < 0xFFFFFFFF for number in numbers)
        assert all(classid(number) not in ("0:0", "ffff:ffff") for number in numbers)


def test_slots_stay_when_an_endpoint_is_told_differently() -> None:
    before = entry(server())
    renamed = tuple(Endpoint(e.address, e.port, pod="new", local=True) for e in reversed(ENDPOINTS))
    after = entry(server(cluster=renamed), before)
    assert [str(one) for one in after.cluster] == [str(one) for one in before.cluster]
    assert all(one.pod == "new" for one in after.cluster)
