"""Programs and plans of IPVS mode: what a change costs, its order, and what is told of others."""

from ipaddress import ip_network
from typing import Any

import pytest
from msgspec.structs import replace

from vipd.backends.ipvs.backend import IpvsCompiler
from vipd.backends.ipvs.compile import Program
from vipd.backends.ipvs.departing import Departing
from vipd.backends.ipvs.objects import ADD, DELETE, SET, Destination, Operation, Route, Service
from vipd.backends.ipvs.observed import Observed
from vipd.backends.ipvs.plan import IpvsPlan, expected, plan
from vipd.backends.ipvs.schedulers import choose
from vipd.backends.ipvs.work import (
    Work,
    brings_destination,
    brings_member,
    brings_route,
    brings_service,
)
from vipd.backends.protocol import Packet
from vipd.proxy.errors import Rejected
from vipd.proxy.model import SCHEDULERS, Algorithm
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName, parse_address
from vipd.proxy.virtualserver import (
    Changes,
    Endpoint,
    Key,
    Kind,
    Masquerade,
    NodeNetwork,
    PodSources,
    Refusal,
    Use,
    VirtualServer,
)

NODE = parse_address("192.168.0.1")
NETWORK = NodeNetwork(
    pod_sources=PodSources(cidrs=(ip_network("10.0.0.0/8"),)),
    node_port_ranges=(ip_network("192.168.0.1/32"),),
    own_addresses=(NODE,),
    primary_addresses=(NODE,),
)
COMPILER = IpvsCompiler()
A, B = Endpoint(parse_address("10.1.0.1"), 8080), Endpoint(parse_address("10.1.0.2"), 8080)
VIP = "10.96.0.1"


def server(
    *endpoints: Endpoint, at: str | None = VIP, port: int = 80, **more: Any
) -> VirtualServer:
    protocol = more.pop("protocol", Protocol.TCP)
    told: dict[str, Any] = {
        "key": Key(Family.IPV4, parse_address(at) if at else None, protocol, port),
        "owner": ServicePortName(NamespacedName("test", "web"), "", protocol),
        "kind": Kind.CLUSTER,
        "cluster": endpoints,
        "local": (),
    }
    return VirtualServer(**{**told, **more})


def program(*servers: VirtualServer, network: NodeNetwork = NETWORK) -> Program:
    return COMPILER.compile(servers, network)


def change(before: Program, *servers: VirtualServer) -> tuple[list[str], list[str], Program]:
    made, after = COMPILER.plan_changes(before, Changes({one.key: one for one in servers}))
    return (*_texts(made), after)


def gone(before: Program, *servers: VirtualServer) -> tuple[list[str], list[str], Program]:
    made, after = COMPILER.plan_changes(before, Changes({one.key: None for one in servers}))
    return (*_texts(made), after)


def _texts(made: IpvsPlan) -> tuple[list[str], list[str]]:
    return (
        [str(one) for unit in made.units for one in unit.now],
        [str(one) for unit in made.units for one in unit.later],
    )


def test_one_endpoint_more_is_one_message() -> None:
    now, later, _ = change(program(server(A)), server(A, B))
    assert (now, later) == ([f"-a -t {VIP}:80 -r {B} -m -w 1"], [])


def test_one_endpoint_less_is_one_message_now_and_one_when_it_is_idle() -> None:
    now, later, _ = change(program(server(A, B)), server(A))
    assert now == [f"-e -t {VIP}:80 -r {B} -m -w 0"]
    assert later == [f"-d -t {VIP}:80 -r {B}"]


def test_an_endpoint_is_added_before_another_is_told_to_leave() -> None:
    now, _, _ = change(program(server(A)), server(B))
    assert now == [f"-a -t {VIP}:80 -r {B} -m -w 1", f"-e -t {VIP}:80 -r {A} -m -w 0"]


def test_a_udp_endpoint_leaves_at_once() -> None:
    now, later, _ = change(
        program(server(A, B, protocol=Protocol.UDP)), server(A, protocol=Protocol.UDP)
    )
    assert (now, later) == ([f"-d -u {VIP}:80 -r {B}"], [])


def test_the_last_endpoint_is_refused_before_it_leaves() -> None:
    now, _, _ = change(program(server(A)), server())
    assert now == [
        f"ipset add VIPD-IPVS-REJECT {VIP},tcp:80",
        f"-e -t {VIP}:80 -r {A} -m -w 0",
    ]
    now, _, _ = change(program(server()), server(A))
    assert now[-1] == f"ipset del VIPD-IPVS-REJECT {VIP},tcp:80"


def test_a_service_goes_after_its_connections_then_its_route_then_its_record() -> None:
    now, later, after = gone(program(server(A)), server(A))
    assert now == [
        f"ipset add VIPD-IPVS-REJECT {VIP},tcp:80",
        f"-e -t {VIP}:80 -r {A} -m -w 0",
    ]
    assert later == [
        f"-d -t {VIP}:80 -r {A}",
        f"-D -t {VIP}:80",
        f"ip route del local {VIP} dev lo table local proto 118",
        f"ipset del VIPD-IPVS-SERVED {VIP},tcp:80",
        f"ipset del VIPD-IPVS-REJECT {VIP},tcp:80",
        f"ipset del VIPD-IPVS-ADDRESSES {VIP}",
    ]
    assert not after.entries
    assert not after.shared


def test_the_route_stays_while_another_port_needs_it() -> None:
    both = program(server(A), server(A, port=81))
    _, later, after = gone(both, server(A))
    assert not [one for one in later if "route" in one or "ADDRESSES" in one]
    _, later, _ = gone(after, server(A, port=81))
    assert [one for one in later if "route" in one]


def test_a_second_port_brings_no_second_route() -> None:
    now, _, _ = change(program(server(A)), server(A, port=81))
    assert not [one for one in now if "route" in one or "ADDRESSES" in one]
    both = str(plan(None, program(server(A), server(A, port=81)))[0])
    assert both.count("ip route add") == 1


def test_an_address_of_the_node_has_no_route_and_no_guard() -> None:
    made = str(plan(None, program(server(A, at=str(NODE))))[0])
    assert f"-A -t {NODE}:80" in made
    assert "route" not in made
    assert f"ADDRESSES {NODE}" not in made


def test_node_ports_follow_the_addresses_of_the_node() -> None:
    everywhere = NodeNetwork(node_port_ranges=(ip_network("0.0.0.0/0"),), own_addresses=(NODE,))
    second = parse_address("192.168.9.1")
    before = program(server(A, at=None, port=30080), network=everywhere)
    after = NodeNetwork(node_port_ranges=(ip_network("0.0.0.0/0"),), own_addresses=(NODE, second))
    made, _ = COMPILER.plan_changes(before, Changes({}, after))
    now, later = _texts(made)
    assert f"-A -t {second}:30080 -s rr" in now
    assert not later
    assert not [one for one in now if str(NODE) in one]


def test_a_node_port_stands_aside_for_a_service_on_the_nodes_own_address() -> None:
    port, exact = server(A, at=None, port=30080), server(B, at=str(NODE), port=30080)
    now, _, after = change(program(port), exact)
    assert f"-a -t {NODE}:30080 -r {B} -m -w 1" in now
    assert f"-A -t {NODE}:30080 -s rr" in str(plan(None, program(port, exact))[0])
    back, _, _ = gone(after, exact)
    assert f"-a -t {NODE}:30080 -r {A} -m -w 1" in back


def test_what_stands_in_the_kernel_is_not_planned_again() -> None:
    wanted = program(server(A, B, affinity_seconds=600), server(at="10.96.0.2"))
    seen = COMPILER.load(COMPILER.dump(wanted))
    assert not COMPILER.plan(seen, wanted)[0]
    assert seen.things == expected(wanted).things


def test_a_weight_of_zero_is_undone_and_a_leftover_at_zero_departs() -> None:
    wanted = program(server(A))
    service = Service(Family.IPV4, Protocol.TCP, parse_address(VIP), 80)
    things = {
        **expected(wanted).things,
        Destination(service, A.address, A.port): 0,
        Destination(service, B.address, B.port): 0,
    }
    seen = Observed(things, rules=expected(wanted).rules, sets=expected(wanted).sets)
    now, later = _texts(COMPILER.plan(seen, wanted)[0])
    assert now == [f"-e -t {VIP}:80 -r {A} -m -w 1"]
    assert later == [f"-d -t {VIP}:80 -r {B}"]


def test_what_others_have_is_a_conflict_of_its_key_only() -> None:
    taken = Service(Family.IPV4, Protocol.TCP, parse_address(VIP), 80)
    free = server(A, at="10.96.0.2")
    routed = server(A, at="10.96.0.3")
    seen = Observed(foreign=frozenset([taken]), strange=frozenset([routed.key.address or NODE]))
    made, _ = COMPILER.plan(seen, program(server(A), free, routed))
    conflicts = {unit.key: unit.conflict for unit in made.units if unit.conflict}
    assert set(conflicts) == {server(A).key, routed.key}
    assert "another program" in conflicts[server(A).key]
    assert not [one for one in str(made).splitlines() if f"{VIP}:" in one and one[0] != "#"]


def test_without_gives_back_what_a_rejected_server_shared() -> None:
    before = program(server(A, port=81))
    made, after = COMPILER.plan_changes(before, Changes({server(A).key: server(A)}))
    assert made
    assert COMPILER.without(before, after, [server(A).key]) == before


@pytest.mark.parametrize(
    ("algorithm", "weights", "asked", "name"),
    [
        (Algorithm.RANDOM, (1, 1), "", "rr"),
        (Algorithm.RANDOM, (1, 2), "", "wrr"),
        (Algorithm.ROUND_ROBIN, (2, 2), "", "rr"),
        (Algorithm.SOURCE_HASH, (1, 1), "", "sh -b sh-fallback"),
        (Algorithm.MAGLEV, (1, 1), "", "mh -b mh-fallback,mh-port"),
        (Algorithm.MAGLEV, (1, 2), "lc", "lc"),
    ],
)
def test_the_scheduler(
    algorithm: Algorithm, weights: tuple[int, ...], asked: str, name: str
) -> None:
    ends = [Endpoint(A.address, 1, weight=one) for one in weights]
    assert str(choose(asked, algorithm, ends, "rr")) == name


def test_there_are_thirteen_schedulers() -> None:
    assert " ".join(SCHEDULERS) == "rr wrr lc wlc lblc lblcr sh mh dh sed nq fo ovf"


# What departs


def test_what_departs_goes_when_it_has_no_connections() -> None:
    departing = Departing()
    made, _ = COMPILER.plan_changes(program(server(A, B)), Changes({server().key: None}))
    departing.add(made.units[0].later)
    (service,) = departing.services()
    held = {(A.address, A.port): 1, (B.address, B.port): 0}
    assert [str(one) for one in departing.due({service: held})] == [f"-d -t {VIP}:80 -r {B}"]
    last = [str(one) for one in departing.due({service: {(A.address, A.port): 0}})]
    assert last[:2] == [f"-d -t {VIP}:80 -r {A}", f"-D -t {VIP}:80"]
    assert len(last) == 6
    assert not departing


def test_what_comes_back_is_changed_and_its_refusal_is_lifted() -> None:
    departing = Departing()
    made, after = COMPILER.plan_changes(program(server(A)), Changes({server().key: None}))
    departing.add(made.units[0].later)
    again, _ = COMPILER.plan_changes(after, Changes({server().key: server(A)}))
    adapted = departing.adapted(again.units[0].now)
    assert not departing
    kinds = {type(one.thing): one.verb for one in adapted if one.verb is not DELETE}
    assert kinds[Service] == kinds[Destination] == kinds[Route] == SET
    assert str(adapted[-1]) == f"ipset del VIPD-IPVS-REJECT {VIP},tcp:80"
    assert ADD not in [one.verb for one in adapted]


def test_cut_takes_what_departs_and_nothing_else() -> None:
    departing = Departing()
    service = Service(Family.IPV4, Protocol.TCP, parse_address(VIP), 80)
    one, other = (Destination(service, end.address, end.port) for end in (A, B))
    departing.add([Operation(DELETE, one, 0)])
    assert departing.cut([one, other]) == [Operation(DELETE, one, 0)]
    assert departing.cut([one]) == []


# What a packet meets


def met(held: Program, source: str, **more: Any) -> list[str]:
    packet = Packet(
        source=parse_address(source),
        destination=parse_address(VIP),
        protocol=Protocol.TCP,
        port=more.pop("port", 80),
        **more,
    )
    return [step.what for step in COMPILER.trace(held, packet)]


def test_a_packet_from_outside_is_marked_balanced_and_masqueraded() -> None:
    held = program(server(A, masquerade=Masquerade.OFF_CLUSTER))
    steps = met(held, "172.16.0.9")
    assert "-s 10.0.0.0/8 -j RETURN" not in steps
    assert "-j MARK --set-xmark 0x4000/0x4000" in steps
    assert f"-t {VIP}:80 -s rr" in steps
    assert steps[-1] == "-j MASQUERADE --random-fully"
    pod = met(held, "10.9.9.9")
    assert "-s 10.0.0.0/8 -j RETURN" in pod
    assert "-j MASQUERADE --random-fully" not in pod


def test_refusals_are_met_before_ipvs() -> None:
    assert "--reject-with tcp-reset" in met(program(server()), "10.9.9.9")[-1]
    unknown = met(program(server(A)), "10.9.9.9", port=81)
    assert "VIPD-IPVS-ADDRESSES dst -j REJECT" in unknown[-1]
    dropped = server(use=Use.LOCAL, when_empty=Refusal.DROP)
    assert met(program(dropped), str(NODE), from_node=True)[-1].endswith("-j DROP")
    closed = server(A, kind=Kind.LOAD_BALANCER, allowed_sources=(ip_network("10.9.0.0/16"),))
    assert met(program(closed), "10.8.8.8")[-1].endswith("-j DROP")
    assert met(program(closed), "10.9.9.9")[-1].startswith("-m mark !")


def test_health_checks_pass_a_firewall_of_the_host() -> None:
    ports = ((NamespacedName("shop", "web"), 31000),)
    held = program(server(A), network=replace(NETWORK, health_ports=ports))
    check = "-p tcp -m tcp --dport 31000 -j ACCEPT"
    packet = Packet(
        source=parse_address("172.16.0.9"), destination=NODE, protocol=Protocol.TCP, port=31000
    )
    assert check in [step.what for step in COMPILER.trace(held, packet)]
    # On an address of a service the host's ports stay out of reach.
    assert "-j REJECT" in met(held, "172.16.0.9", port=31000)[-1]
    made, _ = COMPILER.plan_changes(program(server(A)), Changes({}, held.network))
    assert {chain.name for _, chain in made.prologue.chains} == {"VIPD-IPVS-GUARD"}


def test_policy_local_keeps_outsiders_from_other_nodes_endpoints() -> None:
    held = program(
        server(A, use=Use.LOCAL_FROM_OUTSIDE, kind=Kind.LOAD_BALANCER, when_empty=Refusal.DROP)
    )
    assert met(held, "172.16.0.9")[-1] == "-j DROP"
    assert f"-t {VIP}:80 -s rr" in met(held, "10.9.9.9")
    assert f"-t {VIP}:80 -s rr" in met(held, str(NODE), from_node=True)


# What a commit takes back


def test_a_refused_service_takes_back_what_it_brought_and_no_more() -> None:
    made, _ = COMPILER.plan(None, program(server(A), server(A, at="10.96.0.2")))
    work = Work(made.units, lambda unit: list(unit.now))
    work.batch(brings_member)
    (taken,) = [one for one in work.batch(brings_service) if str(one.thing) == f"-t {VIP}:80"]
    work.failed({taken: Rejected(str(taken), "another program has it")})
    assert [made.units[number].key for number in work.refused] == [server(A).key]
    assert [str(one) for one in work.backwards()] == [
        f"ipset del VIPD-IPVS-ADDRESSES {VIP}",
        f"ipset del VIPD-IPVS-SERVED {VIP},tcp:80",
    ]


def test_a_refused_port_leaves_the_address_to_the_other_port() -> None:
    made, _ = COMPILER.plan(None, program(server(A), server(A, port=81)))
    work = Work(made.units, lambda unit: list(unit.now))
    work.batch(brings_member)
    (taken,) = [one for one in work.batch(brings_service) if str(one.thing) == f"-t {VIP}:80"]
    work.failed({taken: Rejected(str(taken), "another program has it")})
    back = [str(one) for one in work.backwards()]
    assert f"ipset del VIPD-IPVS-SERVED {VIP},tcp:80" in back
    assert not [one for one in back if "route" in one]


def test_a_refused_route_refuses_all_ports_of_the_address() -> None:
    made, _ = COMPILER.plan(None, program(server(A), server(A, port=81), server(A, at="10.96.0.2")))
    work = Work(made.units, lambda unit: list(unit.now))
    work.batch(brings_member)
    work.batch(brings_service)
    work.batch(brings_destination)
    (taken,) = [one for one in work.batch(brings_route) if VIP in str(one)]
    work.failed({taken: Rejected(str(taken), "somebody else has it")})
    assert len(work.refused) == 2
    back = [str(one) for one in work.backwards()]
    assert {f"-D -t {VIP}:80", f"-D -t {VIP}:81"} < set(back)
    assert not [one for one in back if "route" in one or "10.96.0.2" in one]


def test_a_real_server_that_is_refused_takes_its_new_service_along() -> None:
    made, _ = COMPILER.plan(None, program(server(A)))
    work = Work(made.units, lambda unit: list(unit.now))
    work.batch(brings_service)
    (bad,) = work.batch(brings_destination)
    work.failed({bad: Rejected(str(bad), "no")})
    assert f"-D -t {VIP}:80" in [str(one) for one in work.backwards()]
