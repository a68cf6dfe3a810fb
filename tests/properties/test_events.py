"""Snapshots and tables do not depend on how the news came: order, batches, increments."""

from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st
from tests.properties import strategies as some
from tests.properties.worlds import difference, snapshot_of

from vipd.proxy.events import Applied, Event, Kind, kind_of, name_of
from vipd.proxy.names import NamespacedName
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot, fold


def about(event: Event) -> tuple[Kind, NamespacedName]:
    """Return the object that an event is about."""
    if isinstance(event, Applied):
        return kind_of(event.object), name_of(event.object)
    assert not isinstance(event, Applied)
    return event.kind, event.name  # type: ignore[union-attr]


@given(st.lists(some.events, max_size=16), st.randoms(use_true_random=False))
def test_the_order_of_events_about_different_objects_does_not_matter(
    events: list[Event], random: Random
) -> None:
    by_object: dict[tuple[Kind, NamespacedName], list[Event]] = {}
    for event in events:
        by_object.setdefault(about(event), []).append(event)
    queues = list(by_object.values())
    shuffled: list[Event] = []
    while queues:
        queue = random.choice(queues)
        shuffled.append(queue.pop(0))
        queues = [one for one in queues if one]
    assert snapshot_of(shuffled) == snapshot_of(events)


@given(some.batches)
def test_batches_fold_like_one_sequence(batches: Sequence[list[Event]]) -> None:
    stepwise = Snapshot()
    for batch in batches:
        stepwise, _ = fold(stepwise, batch)
    assert stepwise == snapshot_of([event for batch in batches for event in batch])


@given(some.batches)
def test_a_fold_names_everything_it_changed(batches: Sequence[list[Event]]) -> None:
    before = Snapshot()
    for batch in batches:
        after, touched = fold(before, batch)
        for name in {*before.services, *after.services, *before.slices, *after.slices}:
            same_service = before.services.get(name) == after.services.get(name)
            same_slices = before.slices.get(name) == after.slices.get(name)
            assert (same_service and same_slices) or name in touched.services
        for node in {*before.nodes, *after.nodes}:
            assert before.nodes.get(node) == after.nodes.get(node) or node in touched.nodes
        assert before.service_cidrs == after.service_cidrs or touched.service_cidrs
        before = after


@given(some.batches)
def test_the_same_news_again_touches_nothing(batches: Sequence[list[Event]]) -> None:
    snapshot = snapshot_of([event for batch in batches for event in batch])
    again: list[Event] = [
        Applied(one)
        for group in (snapshot.services, snapshot.nodes, snapshot.service_cidrs)
        for one in group.values()
    ]
    again += [Applied(one) for group in snapshot.slices.values() for one in group]
    after, touched = fold(snapshot, again)
    assert after == snapshot
    assert not touched.services
    assert not touched.nodes
    assert not touched.service_cidrs


@given(some.clusters(), some.batches, some.node_settings)
def test_updates_give_the_table_of_a_fresh_start_and_exactly_its_changes(
    first: list[Event], batches: Sequence[list[Event]], settings: NodeSettings
) -> None:
    snapshot = snapshot_of(first)
    table = resolve(snapshot, settings)
    for batch in batches:
        snapshot, touched = fold(snapshot, batch)
        after, changes = update(table, snapshot, settings, touched)
        assert after == resolve(snapshot, settings)
        assert changes == difference(table, after)
        table = after
