"""Which worker listens where, and what each is told for that, in batches that can be sent.

Lives here: the assignment of places to workers, and from reports back to what is served. Pure. Must
not: ask a worker (workers.py).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from zlib import crc32

from msgspec import structs

from vipd.backends.userspace import messages
from vipd.backends.userspace.messages import (
    MOST_LISTENERS,
    Change,
    Instruction,
    Listen,
    Stop,
    Told,
)
from vipd.backends.userspace.objects import Forwarding, Place

MOST_INSTRUCTIONS = 1_000
"""In one batch, so that a worker goes on forwarding in between."""


def listeners(place: Place, forwarding: Forwarding, count: int) -> Sequence[int]:
    """Return the numbers of the workers, of `count`, that listen at a place."""
    if forwarding.is_alone:
        return (crc32(str(place).encode()) % count,)
    return range(count)


def changes(
    number: int, count: int, held: Set[Place], wanted: Mapping[Place, Forwarding]
) -> Iterator[Instruction]:
    """Yield what a worker that listens at `held` is told, so that it has its part of `wanted`."""
    for place, forwarding in wanted.items():
        wire = messages.wire_place(place)
        if number not in listeners(place, forwarding, count):
            if place in held:
                yield Stop(wire, at_once=True)
        elif place in held:
            yield Change(wire, messages.wire_forwarding(forwarding))
        else:
            yield Listen(wire, messages.wire_forwarding(forwarding))


def lacking(
    number: int, count: int, held: Set[Place], wanted: Mapping[Place, Forwarding]
) -> list[Place]:
    """Return where a worker that listens at `held` should listen as well."""
    return [
        place
        for place, forwarding in wanted.items()
        if place not in held and number in listeners(place, forwarding, count)
    ]


def stops(held: Set[Place], gone: Collection[Place]) -> list[Instruction]:
    """Return what a worker that listens at `held` is told, so that it leaves what is gone."""
    return [Stop(messages.wire_place(one), at_once=True) for one in gone if one in held]


def batches(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return instructions in batches with no more listeners than can be sent at once."""
    parts: list[list[Instruction]] = []
    new = MOST_LISTENERS
    for one in instructions:
        if not parts or new >= MOST_LISTENERS or len(parts[-1]) >= MOST_INSTRUCTIONS:
            parts.append([])
            new = 0
        parts[-1].append(one)
        new += isinstance(one, Listen)
    return parts


def served(told: Sequence[Told], count: int) -> dict[Place, Forwarding]:
    """Return what is served by reports; where workers differ, with an owner that nobody has.

    So it is not what anybody wants, and a plan says it anew to all of them.
    """
    by_number = {
        one.number: {
            messages.place_of(each.place): messages.forwarding_of(each.forwarding)
            for each in one.places
        }
        for one in told
        if not one.retired
    }
    found: dict[Place, Forwarding] = {}
    for places in by_number.values():
        for place, forwarding in places.items():
            wanted = set(listeners(place, forwarding, count))
            having = {number for number, each in by_number.items() if place in each}
            same = all(by_number[number][place] == forwarding for number in having)
            agreed = same and having == wanted
            found[place] = forwarding if agreed else structs.replace(forwarding, owner="")
    return found
