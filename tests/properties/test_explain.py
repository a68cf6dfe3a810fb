"""What `vipd explain` says is what nftables and workers do, for every cluster and packet."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.properties import strategies as some
from tests.properties.kernel import Kernel
from tests.properties.packets import Outcome, outcomes
from tests.properties.statements import Packet as Sent
from tests.properties.test_nft_plan import commit
from tests.properties.userspace import Userspace
from tests.properties.worlds import OWN, packets, program_of, snapshot_of

from vipd.backends.nftables.plan import plan
from vipd.backends.nftables.trace import trace
from vipd.backends.protocol import Packet, Step
from vipd.backends.userspace.backend import UserspaceCompiler
from vipd.proxy.events import Event
from vipd.proxy.explain import Explanation, Verdict, answering, explain
from vipd.proxy.names import Protocol
from vipd.proxy.resolve import resolve
from vipd.proxy.serving import as_served
from vipd.proxy.settings import NodeSettings
from vipd.proxy.virtualserver import Endpoint

pytestmark = pytest.mark.usefixtures("small_maglev")


@given(some.clusters(), some.node_settings, st.data())
def test_explanation_path_and_kernel_agree(
    events: list[Event], node: NodeSettings, data: st.DataObject
) -> None:
    snapshot = snapshot_of(events)
    table = resolve(snapshot, node)
    made, program = plan(None, program_of(table))
    kernel = Kernel()
    commit(kernel, made)
    for sent in data.draw(st.lists(packets(table), min_size=5, max_size=10)):
        packet = _first(sent)
        if packet is None:
            continue
        met = frozenset(outcomes(kernel, sent, OWN))
        told = explain(snapshot, table, node, packet, own=OWN)
        assert _said(told) == met, sent
        path = trace(program, packet)
        assert _end(path) is told.verdict, sent
        server = answering(table, packet)
        if server is not None and told.verdict is Verdict.ENDPOINT:
            assert _asks_for_masquerade(path) is told.masquerade.startswith("yes"), sent
            entry = program.entries[server.key]
            assert _shares(told) in (_held(entry.cluster), _held(entry.local)), sent
        every = [*(one.endpoint for one in told.endpoints), *(o.endpoint for o in told.left_out)]
        assert len(every) == len({*every}) or _without_the_port(told)


@given(some.clusters(), some.node_settings, st.data())
def test_explanation_and_workers_agree(
    events: list[Event], node: NodeSettings, data: st.DataObject
) -> None:
    """Also about what this mode cannot serve, and endpoints that workers never ask."""
    snapshot = snapshot_of(events)
    table = resolve(snapshot, node)
    compiler, workers = UserspaceCompiler(), Userspace()
    made, program = compiler.plan(None, compiler.compile(table.virtual_servers(), table.network))
    workers.run(made)
    for sent in data.draw(st.lists(packets(table), min_size=5, max_size=10)):
        packet = _first(sent)
        server = answering(table, packet) if packet is not None else None
        if packet is None or server is None:
            continue
        by_table = explain(snapshot, table, node, packet, own=OWN)
        told = as_served(by_table, server, compiler.serving(program, server.key), "")
        met = {(one.verdict, one.target) for one in workers.chances(sent, OWN)}
        if told.verdict is Verdict.UNSERVED:
            assert not [one for one in met if one[0] == "dnat"], sent
        else:
            assert {(one.verdict, one.target) for one in _said(told)} == met, sent
            assert all(one.masqueraded for one in told.endpoints), sent


def _first(sent: Sent) -> Packet | None:
    """The packet as it is explained, or None for what is no first packet of a connection."""
    if sent.protocol not in ("tcp", "udp", "sctp") or not sent.syn:
        return None
    return Packet(
        source=sent.source,
        destination=sent.destination,
        protocol=Protocol(sent.protocol.upper()),
        port=sent.port,
        source_port=sent.source_port,
        from_node=sent.source in OWN,
        to_node=sent.destination in OWN,
        interface=sent.interface,
    )


def _said(told: Explanation) -> frozenset[Outcome]:
    if told.verdict is not Verdict.ENDPOINT:
        return frozenset({Outcome(told.verdict.value)})
    return frozenset(
        Outcome("dnat", _place(one.endpoint), one.masqueraded) for one in told.endpoints
    )


def _place(endpoint: str) -> str:
    host, _, port = endpoint.rpartition(":")
    return f"{host.strip('[]')} . {port}"


def _shares(told: Explanation) -> dict[str, Fraction]:
    return {one.endpoint: Fraction(one.slots, one.of) for one in told.endpoints}


def _held(slots: tuple[Endpoint, ...]) -> dict[str, Fraction]:
    return {str(one): Fraction(count, len(slots)) for one, count in Counter(slots).items()}


def _end(path: Sequence[Step]) -> Verdict:
    if any(" dnat " in step.what for step in path):
        return Verdict.ENDPOINT
    last = path[-1]
    if last.what.endswith("reject") or "reject with" in last.what:
        return Verdict.REJECT
    if last.what.endswith("drop") or last.outcome.endswith(": drop"):
        return Verdict.DROP
    return Verdict.PASS


def _asks_for_masquerade(path: Sequence[Step]) -> bool:
    return any("masquerade" in step.what and "@hairpin" not in step.what for step in path)


def _without_the_port(told: Explanation) -> bool:
    """Whether endpoints are named by address alone, which several slices may do."""
    return any("has no port" in one.why for one in told.left_out)
