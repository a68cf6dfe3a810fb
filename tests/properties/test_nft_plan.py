"""Plans are differences: the modelled kernel takes each text and then holds exactly the program."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.properties import strategies as some
from tests.properties.kernel import Kernel
from tests.properties.worlds import difference, program_of, snapshot_of, table_of

from vipd.backends.nftables.backend import NftablesCompiler
from vipd.backends.nftables.mending import wanted_elements
from vipd.backends.nftables.objects import Element
from vipd.backends.nftables.observed import Observed, dump, load
from vipd.backends.nftables.pipeline import containers
from vipd.backends.nftables.plan import (
    NftPlan,
    discard,
    expected,
    plan,
    plan_changes,
    transaction,
    without,
)
from vipd.backends.nftables.raw import encoded, layout
from vipd.proxy.events import Event
from vipd.proxy.names import Family
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import fold

pytestmark = pytest.mark.usefixtures("small_maglev")


def commit(kernel: Kernel, made: NftPlan) -> None:
    """Do a plan as the driver does: garbage goes in a transaction of its own."""
    kernel.run(transaction(made.prologue, made.units))
    kernel.run(discard(made.garbage))


@given(some.clusters(), some.node_settings)
def test_a_first_plan_makes_the_program_and_a_second_is_empty(
    events: list[Event], settings: NodeSettings
) -> None:
    program = program_of(table_of(events, settings))
    made, after = plan(None, program)
    kernel = Kernel()
    commit(kernel, made)
    assert kernel.observed() == expected(after) == expected(program)
    again, same = plan(kernel.observed(), program)
    assert (str(again), bool(again), again.size) == ("", False, 0)
    assert same == after


@given(some.clusters(), some.clusters(), some.node_settings, some.node_settings)
def test_a_plan_leads_from_any_program_to_any_other(
    old: list[Event], new: list[Event], was: NodeSettings, now: NodeSettings
) -> None:
    kernel = Kernel()
    before = program_of(table_of(old, was))
    commit(kernel, plan(None, before)[0])
    made, after = plan(load(dump(expected(before))), program_of(table_of(new, now)))
    commit(kernel, made)
    assert kernel.observed() == expected(after)
    assert not plan(kernel.observed(), after)[0]


@given(some.clusters(), some.batches, some.node_settings)
def test_plans_of_changes_add_up_to_the_plan_of_everything(
    first: list[Event], batches: Sequence[list[Event]], settings: NodeSettings
) -> None:
    snapshot = snapshot_of(first)
    table = resolve(snapshot, settings)
    made, program = plan(None, program_of(table))
    kernel = Kernel()
    commit(kernel, made)
    for batch in batches:
        snapshot, touched = fold(snapshot, batch)
        table, changes = update(table, snapshot, settings, touched)
        made, program = plan_changes(program, changes)
        commit(kernel, made)
        assert kernel.observed() == expected(program)
        everything, kept = plan(kernel.observed(), program_of(table))
        assert str(everything) == ""
        assert kept.entries == program.entries
        assert kept.shared == program.shared


@given(some.clusters(), some.node_settings, st.data())
def test_units_may_be_cut_anywhere_and_done_in_any_order(
    events: list[Event], settings: NodeSettings, data: st.DataObject
) -> None:
    made, after = plan(None, program_of(table_of(events, settings)))
    kernel = Kernel()
    kernel.run(transaction(made.prologue, ()))
    for unit in data.draw(st.permutations(made.units)):
        kernel.run(transaction((), [unit]))
    assert kernel.observed() == expected(after)


@given(some.clusters(), some.clusters(), some.node_settings, st.data())
def test_rejected_units_leave_what_was_there(
    old: list[Event], new: list[Event], settings: NodeSettings, data: st.DataObject
) -> None:
    """What the daemon does: program the rest, remember `without`, and come back to it later."""
    before_table, after_table = table_of(old, settings), table_of(new, settings)
    made, before = plan(None, program_of(before_table))
    kernel = Kernel()
    commit(kernel, made)
    made, after = plan_changes(before, difference(before_table, after_table))
    keys = [unit.key for unit in made.units if unit.key is not None]
    rejected = set(data.draw(st.lists(st.sampled_from(keys), unique=True))) if keys else set()
    kept = without(before, after, rejected)
    for key in rejected:
        assert kept.entries.get(key) == before.entries.get(key)
    for key in keys:
        assert key in rejected or kept.entries.get(key) == after.entries.get(key)


@given(some.clusters(), some.node_settings, st.data())
def test_whatever_is_broken_in_the_kernel_is_repaired(
    events: list[Event], settings: NodeSettings, data: st.DataObject
) -> None:
    program = program_of(table_of(events, settings))
    kernel = Kernel()
    commit(kernel, plan(None, program)[0])
    for place in data.draw(st.lists(st.sampled_from(sorted(kernel.tables)), max_size=2)):
        table = kernel.tables.get(place)
        if table is None:
            continue
        how = data.draw(st.sampled_from(("table", "rules", "comment", "elements", "container")))
        if how == "table":
            del kernel.tables[place]
        elif how == "rules":
            table.chains[data.draw(st.sampled_from(sorted(table.chains)))].rules.clear()
        elif how == "comment":
            chain = table.chains[data.draw(st.sampled_from(sorted(table.chains)))]
            chain.rules.append(("drop", "of a stranger"))
        elif table.containers:
            container = table.containers[data.draw(st.sampled_from(sorted(table.containers)))]
            if how == "elements":
                container.elements.clear()
            else:
                container.comment = "#of another version"
    observed = kernel.observed()
    made, after = plan(observed, program)
    if made.whole:  # containers of another version: only the table that is deleted counts
        kernel.run(str(made))
    else:
        commit(kernel, made)
    shapes = {place: kernel.observed().chains.get(place) for place in expected(after).chains}
    assert shapes == expected(after).chains
    assert kernel.observed().elements == expected(after).elements
    assert kernel.observed().skeletons == expected(after).skeletons


@given(some.clusters(), some.node_settings)
def test_what_is_observed_survives_dump_and_load(
    events: list[Event], settings: NodeSettings
) -> None:
    program = program_of(table_of(events, settings))
    assert load(dump(expected(program))) == expected(program)
    assert NftablesCompiler().load(NftablesCompiler().dump(program)) == expected(program)
    assert load(dump(Observed())) == Observed()


@given(some.clusters(), some.node_settings)
def test_elements_are_the_same_as_bytes(events: list[Event], settings: NodeSettings) -> None:
    """What is quick to make for slots is what their text would be."""
    program = program_of(table_of(events, settings))
    as_text = expected(program).elements
    as_bytes = wanted_elements(program)
    assert as_bytes.keys() == as_text.keys()
    for family in Family:
        for container in containers(family):
            place, of = (family, container.name), layout(container)
            made = (Element(container.name, *one) for one in as_text[place].items())
            assert as_bytes[place] == dict(encoded(of, one) for one in made)


@given(some.clusters(), some.node_settings)
def test_a_shape_that_somebody_emptied_and_nobody_needs_goes(
    events: list[Event], settings: NodeSettings
) -> None:
    """An idle one is kept for the next service; it must be whole then."""
    program = program_of(table_of(events, settings))
    kernel = Kernel()
    commit(kernel, plan(None, program)[0])
    kernel.run("add chain ip6 vipd random-77\n")
    made, after = plan(kernel.observed(), program)
    commit(kernel, made)
    assert kernel.observed() == expected(after) == expected(program)
