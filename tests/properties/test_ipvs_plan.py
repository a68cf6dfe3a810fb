"""What IPVS plans promise beyond those of every backend: few messages, and no server without a real
one while it has one before and after."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.properties import strategies as some
from tests.properties.ipvs import Ipvs, Place
from tests.properties.worlds import difference, table_of

from vipd.backends.ipvs.backend import IpvsCompiler
from vipd.proxy.events import Event
from vipd.proxy.settings import NodeSettings
from vipd.proxy.virtualserver import Changes, Endpoint, Use, VirtualServer

MOST_MESSAGES = 3
pytestmark = pytest.mark.usefixtures("small_maglev")


@given(some.clusters(), some.clusters(), some.node_settings)
def test_no_server_is_without_a_real_one_while_it_has_one_before_and_after(
    old: list[Event], new: list[Event], settings: NodeSettings
) -> None:
    before, after = table_of(old, settings), table_of(new, settings)
    compiler, kernel = IpvsCompiler(), Ipvs()
    made, program = compiler.plan(None, compiler.compile(before.virtual_servers(), before.network))
    kernel.run(str(made))
    had = usable(kernel)
    made, program = compiler.plan_changes(program, difference(before, after))
    then = Ipvs()
    then.run(str(compiler.plan(None, program)[0]))
    kept = had & usable(then)
    for line in kernel.steps(str(made)):
        assert kept <= usable(kernel), f"{line}\\n\\n{made}"
        for _, address, _ in kept:
            assert address in kernel.local(frozenset(some.OWN_ADDRESSES.addresses)), line


def usable(kernel: Ipvs) -> set[Place]:
    return {place for place, one in kernel.servers.items() if one.usable()}


@given(some.clusters(), some.node_settings, st.data())
def test_a_change_of_one_endpoint_is_at_most_three_messages(
    events: list[Event], settings: NodeSettings, data: st.DataObject
) -> None:
    table = table_of(events, settings)
    servers = [
        one
        for one in table.virtual_servers()
        if one.key.address is not None and one.use is Use.CLUSTER and len(one.cluster) > 1
    ]
    assume(servers)
    compiler = IpvsCompiler()
    program = compiler.plan(None, compiler.compile(table.virtual_servers(), table.network))[1]
    server = data.draw(st.sampled_from(servers))
    gone = data.draw(st.sampled_from(server.cluster))
    fewer = replace(server, cluster=tuple(one for one in server.cluster if one != gone))
    for changed, back in ((fewer, server), (heavier(server, gone), server)):
        made, after = compiler.plan_changes(program, Changes({server.key: changed}))
        assert messages(str(made)) <= MOST_MESSAGES, str(made)
        made, _ = compiler.plan_changes(after, Changes({server.key: back}))
        assert messages(str(made)) <= MOST_MESSAGES, str(made)


def heavier(server: VirtualServer, one: Endpoint) -> VirtualServer:
    more = tuple(replace(it, weight=it.weight + 1) if it == one else it for it in server.cluster)
    return replace(server, cluster=more)


def messages(text: str) -> int:
    return len(text.splitlines())
