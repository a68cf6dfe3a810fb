"""Virtual servers whose endpoints are places of this node: plans of changes are those of a fresh
start, and nothing is forwarded to a worker."""

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st
from tests.properties.userspace import Userspace

from vipd.backends.userspace.backend import UserspaceCompiler
from vipd.backends.userspace.compile import refusal
from vipd.backends.userspace.objects import Element, Place, Route, Thing
from vipd.backends.userspace.plan import expected
from vipd.proxy.names import (
    Family,
    NamespacedName,
    Protocol,
    ServicePortName,
    parse_address,
    parse_network,
)
from vipd.proxy.settings import DataplaneSettings, UserspaceSettings
from vipd.proxy.virtualserver import (
    Changes,
    Endpoint,
    Key,
    Kind,
    Masquerade,
    NodeNetwork,
    Use,
    VirtualServer,
)

NODE, OTHER_NODE, SERVICE, POD = map(
    parse_address, ("192.168.0.10", "192.168.0.11", "10.96.0.1", "10.244.1.2")
)
PORTS = (80, 30080)
KEYS = [
    Key(Family.IPV4, address, protocol, port)
    for address in (SERVICE, NODE, POD, None)
    for protocol in (Protocol.TCP, Protocol.UDP)
    for port in PORTS
]
OWNER, OTHER_OWNER = NamespacedName("x", "a"), NamespacedName("x", "b")
endpoints = st.lists(
    st.builds(
        Endpoint,
        st.sampled_from((NODE, OTHER_NODE, SERVICE, POD)),
        st.sampled_from(PORTS),
        local=st.booleans(),
    ),
    max_size=2,
    unique=True,
).map(tuple)
networks = st.builds(
    lambda own, ranges: NodeNetwork(own_addresses=own, node_port_ranges=ranges),
    st.sampled_from(((NODE,), (NODE, OTHER_NODE), ())),
    st.sampled_from(((parse_network("0.0.0.0/0"),), (parse_network("192.168.0.10/32"),))),
)


@st.composite
def served(draw: st.DrawFn, key: Key) -> VirtualServer:
    """Return a virtual server that may forward to this node's own places."""
    return VirtualServer(
        key=key,
        owner=ServicePortName(draw(st.sampled_from((OWNER, OTHER_OWNER))), "", key.protocol),
        kind=Kind.EXTERNAL if key.address else Kind.NODE_PORT,
        cluster=draw(endpoints),
        local=draw(endpoints),
        use=draw(st.sampled_from(Use)),
        masquerade=draw(st.sampled_from(Masquerade)),
    )


@st.composite
def all_changes(draw: st.DrawFn) -> Changes:
    """Return some virtual servers that come, change or go, and now and then another network."""
    keys = draw(st.lists(st.sampled_from(KEYS), max_size=3, unique=True))
    wanted: Mapping[Key, VirtualServer | None] = {
        key: draw(st.none() | served(key)) for key in keys
    }
    return Changes(wanted, draw(st.none() | networks))


@given(st.lists(all_changes(), max_size=6), networks, st.booleans())
def test_changes_add_up_and_no_worker_is_an_endpoint(
    batches: list[Changes], network: NodeNetwork, transparent: bool
) -> None:
    settings = UserspaceSettings(transparent=transparent, transparent_bit=4)
    compiler = UserspaceCompiler(DataplaneSettings(userspace=settings))
    node, table = Userspace(), dict[Key, VirtualServer]()
    made, program = compiler.plan(None, compiler.compile((), network))
    node.run(made)
    told: dict[Key, str] = {}
    for batch in batches:
        network = batch.network or network
        table |= {key: one for key, one in batch.virtual_servers.items() if one is not None}
        table = {k: one for k, one in table.items() if batch.virtual_servers.get(k, one) is one}
        made, program = compiler.plan_changes(program, batch)
        node.run(made)
        fresh, wanted = compiler.plan(None, compiler.compile(table.values(), network))
        again = Userspace()
        again.run(fresh)
        assert node.state() == again.state()
        assert program == wanted
        shown = {one.family for one, how in node.places.items() if how.transparent}
        assert node.return_paths == dict.fromkeys(shown, "0x10")
        assert transparent or not shown
        for place, how in node.places.items():
            assert not {*how.transparent} & {*network.own_addresses}
            for one in (*how.inside, *how.outside):
                there = Place(place.family, place.protocol, one.address, one.port)
                assert there not in node.places
        said = {one.key: one.conflict for one in fresh.units if one.conflict}
        told = {key: why for key, why in told.items() if key not in batch.virtual_servers}
        told = {key: why for key, why in told.items() if made.withdrawn.get(key) != why}
        told |= {one.key: one.conflict for one in made.units if one.key and one.conflict}
        assert told == said == {key: why for key in table if (why := refusal(wanted, key))}


OTHER_SERVICE = parse_address("10.96.0.2")
SERVICE_KEYS = [
    Key(Family.IPV4, address, protocol, port)
    for address in (SERVICE, OTHER_SERVICE)
    for protocol in (Protocol.TCP, Protocol.UDP)
    for port in PORTS
]
AWAY = st.sampled_from([(), (Endpoint(POD, 80),), (Endpoint(POD, 81), Endpoint(OTHER_NODE, 80))])
batches_of_services = st.lists(
    st.dictionaries(
        st.sampled_from(SERVICE_KEYS),
        st.none() | st.builds(lambda some, use: (some, use), AWAY, st.sampled_from(Use)),
        max_size=4,
    ),
    max_size=5,
)
TAKEABLE: list[Thing] = [
    *(
        Place(one.family, one.protocol, one.address, one.port)
        for one in SERVICE_KEYS
        if one.address
    ),
    *(Route(Family.IPV4, one) for one in (SERVICE, OTHER_SERVICE)),
]


@given(batches_of_services, st.sets(st.sampled_from(TAKEABLE)), st.data())
def test_of_those_who_are_rejected_nothing_is_left_but_what_others_need(
    batches: list[dict[Key, tuple[tuple[Endpoint, ...], Use] | None]],
    taken: set[Thing],
    data: st.DataObject,
) -> None:
    """What another program takes, at any time, is what our own things are not."""
    compiler = UserspaceCompiler()
    network = NodeNetwork(own_addresses=(NODE,))
    node = Userspace()
    nothing = compiler.compile((), network)
    made, program = compiler.plan(None, nothing)
    node.run(made)
    for batch in batches:
        wanted = {
            key: None
            if told is None
            else VirtualServer(
                key=key,
                owner=ServicePortName(OWNER, "", key.protocol),
                kind=Kind.EXTERNAL,
                cluster=told[0],
                local=told[0][:1],
                use=told[1],
            )
            for key, told in batch.items()
        }
        if data.draw(st.booleans(), "observed"):
            table = {one.key: one for one in program.entries.values()} | wanted
            whole = compiler.compile([one for one in table.values() if one], network)
            made, after = compiler.plan(expected(program), whole)
            before = nothing
        else:
            made, after = compiler.plan_changes(program, Changes(wanted))
            before = program
        rejected = node.run(made, taken)
        program = compiler.without(before, after, rejected) if rejected else after
        right = Userspace()
        right.run(compiler.plan(None, compiler.compile(program.entries.values(), network))[0])
        assert node.state() == right.state()
        guarded = {one for one in expected(program).things if isinstance(one, Element | Route)}
        assert taken.isdisjoint(guarded | node.places.keys())
