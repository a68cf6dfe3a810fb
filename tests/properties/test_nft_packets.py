"""The nftables program does to every packet what the table of virtual servers promises."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.properties import strategies as some
from tests.properties.kernel import Kernel
from tests.properties.oracle import promised
from tests.properties.packets import Memory, outcomes
from tests.properties.test_nft_plan import commit
from tests.properties.worlds import OWN, packets, program_of, snapshot_of

from vipd.backends.nftables.plan import plan, plan_changes
from vipd.proxy.events import Event
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import fold

pytestmark = pytest.mark.usefixtures("small_maglev")


@settings(max_examples=settings.default.max_examples * 2)  # type: ignore[union-attr]
@given(some.clusters(), st.lists(some.events, max_size=4), some.node_settings, st.data())
def test_program_and_table_agree(
    first: list[Event], later: list[Event], node: NodeSettings, data: st.DataObject
) -> None:
    snapshot = snapshot_of(first)
    table = resolve(snapshot, node)
    made, program = plan(None, program_of(table))
    kernel = Kernel()
    commit(kernel, made)
    snapshot, touched = fold(snapshot, later)
    table, changes = update(table, snapshot, node, touched)
    commit(kernel, plan_changes(program, changes)[0])
    for packet in data.draw(st.lists(packets(table), min_size=10, max_size=20)):
        got = outcomes(kernel, packet, OWN)
        assert frozenset(got) == promised(table, packet, OWN), packet


@given(some.clusters(), st.lists(some.events, max_size=4), some.node_settings, st.data())
def test_a_client_with_affinity_stays_until_its_endpoint_goes(
    first: list[Event], later: list[Event], node: NodeSettings, data: st.DataObject
) -> None:
    snapshot = snapshot_of(first)
    table = resolve(snapshot, node)
    sticky = [one for one in table.virtual_servers() if one.affinity_seconds is not None]
    assume(sticky)
    made, program = plan(None, program_of(table))
    kernel = Kernel()
    commit(kernel, made)
    packet = data.draw(packets(table))
    memories: dict[str, Memory] = {}
    for outcome, memory in outcomes(kernel, packet, OWN).items():
        if outcome.verdict == "dnat" and any(memory.values()):
            memories[outcome.target] = memory
            assert set(outcomes(kernel, packet, OWN, memory)) == {outcome}
    snapshot, touched = fold(snapshot, later)
    table, changes = update(table, snapshot, node, touched)
    commit(kernel, plan_changes(program, changes)[0])
    wanted = promised(table, packet, OWN)
    for target, memory in memories.items():
        known = {name: held for name, held in memory.items() if _there(kernel, name)}
        got = set(outcomes(kernel, packet, OWN, known))
        kept = {one for one in wanted if one.target == target}
        if kept and known == memory:
            assert got == kept, "still there, so the client stays"
        elif not kept:
            assert got == wanted, "gone, so another is chosen"
        else:
            assert got <= wanted


def _there(kernel: Kernel, name: str) -> bool:
    return any(name in table.containers for table in kernel.tables.values())
