"""Plans of every backend are differences: its kernel takes each text and then holds the program."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.properties import strategies as some
from tests.properties.dataplanes import DATAPLANES, Dataplane
from tests.properties.worlds import difference, snapshot_of, table_of, winners

from vipd.proxy.events import Event
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import fold
from vipd.proxy.virtualserver import Table

pytestmark = [
    pytest.mark.usefixtures("small_maglev"),
    pytest.mark.parametrize("plane", DATAPLANES, ids=lambda one: one.mode),
]


def compiled(plane: Dataplane, table: Table) -> object:
    return plane.compiler.compile(table.virtual_servers(), table.network)


def left(plan: object) -> list[str]:
    """Return what a plan would do; what cannot be served is only said, in each plan anew."""
    return [line for line in str(plan).splitlines() if not line.startswith("# ")]


def observed(plane: Dataplane, program: object) -> object:
    return plane.compiler.load(plane.compiler.dump(program))


@given(some.clusters(), some.node_settings)
def test_a_second_plan_is_empty(
    plane: Dataplane, events: list[Event], settings: NodeSettings
) -> None:
    program = compiled(plane, table_of(events, settings))
    made, after = plane.compiler.plan(None, program)
    assert made
    assert made.size
    again, same = plane.compiler.plan(observed(plane, after), program)
    assert (left(again), bool(again), again.size) == ([], bool(str(again)), 0)
    assert same == after


@given(some.clusters(), some.clusters(), some.node_settings, some.node_settings)
def test_a_plan_leads_from_any_program_to_any_other(
    plane: Dataplane, old: list[Event], new: list[Event], was: NodeSettings, now: NodeSettings
) -> None:
    made, before = plane.compiler.plan(None, compiled(plane, table_of(old, was)))
    kernel = plane.kernel()
    kernel.commit(made)
    wanted = compiled(plane, table_of(new, now))
    made, after = plane.compiler.plan(observed(plane, before), wanted)
    kernel.commit(made)
    assert kernel.state() == plane.holding(after).state()


@given(some.clusters(), some.batches, some.node_settings)
def test_plans_of_changes_add_up_to_the_plan_of_everything(
    plane: Dataplane, first: list[Event], batches: Sequence[list[Event]], settings: NodeSettings
) -> None:
    snapshot = snapshot_of(first)
    table = resolve(snapshot, settings)
    made, program = plane.compiler.plan(None, compiled(plane, table))
    kernel = plane.kernel()
    kernel.commit(made)
    for batch in batches:
        snapshot, touched = fold(snapshot, batch)
        table, changes = update(table, snapshot, settings, touched)
        made, program = plane.compiler.plan_changes(program, changes)
        kernel.commit(made)
        assert kernel.state() == plane.holding(program).state()
        everything, kept = plane.compiler.plan(observed(plane, program), compiled(plane, table))
        assert left(everything) == []
        assert observed(plane, kept) == observed(plane, program)


@given(some.clusters(), some.node_settings)
def test_a_change_that_changes_nothing_is_an_empty_plan(
    plane: Dataplane, events: list[Event], settings: NodeSettings
) -> None:
    table = table_of(events, settings)
    program = plane.compiler.plan(None, compiled(plane, table))[1]
    same, after = plane.compiler.plan_changes(program, difference(table, table))
    assert (str(same), bool(same), same.size) == ("", False, 0)
    assert after == program


@given(some.clusters(), some.node_settings)
def test_what_was_removed_leaves_nothing(
    plane: Dataplane, events: list[Event], settings: NodeSettings
) -> None:
    table = table_of(events, settings)
    empty = table_of([some.OWN_ADDRESSES], settings)
    first, program = plane.compiler.plan(None, compiled(plane, table))
    for made, after in (
        plane.compiler.plan_changes(program, difference(table, empty)),
        plane.compiler.plan(observed(plane, program), compiled(plane, empty)),
    ):
        kernel = plane.kernel()
        kernel.commit(first)
        kernel.commit(made)
        everything, _ = plane.compiler.plan(observed(plane, after), compiled(plane, empty))
        assert left(everything) == []
        assert kernel.state() == plane.holding(after).state()
        served = {str(key.address) for key in winners(table) if key.address is not None}
        mentioned = str(plane.compiler.plan(None, after)[0]).split()
        assert not served & {*mentioned, *(f"{one}/32" for one in mentioned)}


@given(some.clusters(), some.clusters(), some.node_settings, st.data())
def test_without_leaves_the_rejected_as_they_were(
    plane: Dataplane, old: list[Event], new: list[Event], settings: NodeSettings,
    data: st.DataObject,
) -> None:  # fmt: skip
    """What the daemon does: program the rest, remember `without`, and come back to it later."""
    before_table, after_table = table_of(old, settings), table_of(new, settings)
    program = plane.compiler.plan(None, compiled(plane, before_table))[1]
    changes = difference(before_table, after_table)
    both = (winners(before_table), winners(after_table))
    after = plane.compiler.plan_changes(program, changes)[1]
    keys = sorted(changes.virtual_servers, key=str)
    drawn = data.draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []
    # The addresses of a service port share chains of its own, which are as the last one that was
    # accepted has them: so these are rejected together.
    owners = {key: {one[key].owner for one in both if key in one} for key in keys}
    concerned = set().union(*(owners[key] for key in drawn))
    rejected = {key for key in keys if owners[key] & concerned}
    kept = plane.compiler.without(program, after, rejected)
    rest = {key: one for key, one in winners(after_table).items() if key not in rejected}
    back = {key: one for key, one in winners(before_table).items() if key in rejected}
    mixed = plane.compiler.compile([*rest.values(), *back.values()], after_table.network)
    assert left(plane.compiler.plan(observed(plane, kept), mixed)[0]) == []
    assert observed(plane, plane.compiler.without(program, after, ())) == observed(plane, after)


@given(some.clusters(), some.node_settings)
def test_a_dump_loads_as_an_observation_of_the_program(
    plane: Dataplane, events: list[Event], settings: NodeSettings
) -> None:
    program = plane.compiler.plan(None, compiled(plane, table_of(events, settings)))[1]
    seen = observed(plane, program)
    made, same = plane.compiler.plan(seen, program)
    assert left(made) == []
    assert observed(plane, same) == seen
