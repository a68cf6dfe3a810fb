"""What one worker is told, and what it could not do.

Lives here: instructions in batches, with the listeners that they need, and the listeners that go
from one worker to another. Must not: decide what is wanted, or of which worker (workers.py).
"""

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterable, Mapping

from vipd.backends.userspace import messages
from vipd.backends.userspace.assignment import batches
from vipd.backends.userspace.listeners import holders, listener
from vipd.backends.userspace.messages import (
    MOST_LISTENERS,
    Answer,
    Batch,
    Cut,
    Done,
    HandedOver,
    HandOver,
    Instruction,
    Listen,
    Stop,
)
from vipd.backends.userspace.objects import Forwarding, Place, Surroundings
from vipd.backends.userspace.worker import Worker
from vipd.proxy.errors import Busy, DataplaneError, Rejected
from vipd.proxy.virtualserver import Endpoint

AT_ONCE = 2
"""Workers that are given listeners side by side: each takes MOST_LISTENERS descriptors here, and
the soft limit of a process is often 1,024."""


class Telling:
    """Batches to workers, each with the `surroundings` that hold now."""

    def __init__(self) -> None:
        self.surroundings = Surroundings()
        self._batches = 0
        self._making = asyncio.Semaphore(AT_ONCE)

    async def do(
        self, worker: Worker, instructions: Iterable[Instruction]
    ) -> dict[Place, DataplaneError]:
        """Let a worker do instructions in order; a worker that ends gets them when it is back."""
        failed: dict[Place, DataplaneError] = {}
        for part in batches(list(instructions)):
            async with self._making:
                made, refused = await asyncio.to_thread(_listen, part)
                failed |= refused
                todo = [
                    one
                    for one in part
                    if not isinstance(one, Listen) or messages.place_of(one.place) not in refused
                ]
                try:
                    answer, _ = await worker.ask(self._batch(todo), made)
                except Busy:
                    return failed
            undone = _failed(answer)
            failed |= undone
            for one in todo:
                place = messages.place_of(one.place)
                if isinstance(one, Listen) and place not in undone:
                    worker.places.add(place)
                elif isinstance(one, Stop):
                    worker.places.discard(place)
        return failed

    async def surround(self, surroundings: Surroundings, workers: Iterable[Worker]) -> None:
        """Tell workers what they have to know of the node."""
        self.surroundings = surroundings
        asked = (one.ask(self._batch([])) for one in workers)
        for error in await asyncio.gather(*asked, return_exceptions=True):
            # One that ended is told as it comes back.
            if isinstance(error, BaseException) and not isinstance(error, DataplaneError):
                raise error

    async def hand_over(self, old: Worker, new: Worker, wanted: Mapping[Place, Forwarding]) -> None:
        """Give the listeners of a worker to another, open, as far as they are wanted.

        Where descriptors are lost on the way, it lacks these: others have to be made.
        """
        places = [messages.wire_place(one) for one in old.places if one in wanted]
        for first in range(0, len(places), MOST_LISTENERS):
            answer, given = await old.ask(HandOver(places[first : first + MOST_LISTENERS]))
            if not isinstance(answer, HandedOver):
                continue
            wires = answer.places[: len(given)]
            todo: list[Instruction] = [
                Listen(one, messages.wire_forwarding(wanted[messages.place_of(one)]))
                for one in wires
            ]
            done, _ = await new.ask(self._batch(todo), given)
            new.places |= {messages.place_of(one) for one in wires} - _failed(done).keys()

    async def cut(
        self, departed: Iterable[tuple[Place, Endpoint]], workers: Iterable[Worker]
    ) -> int:
        """End what is open to endpoints; return how many connections and sessions."""
        todo: list[Instruction] = [
            Cut(messages.wire_place(place), messages.wire_endpoint(one)) for place, one in departed
        ]
        ended = 0
        for worker in workers:
            with contextlib.suppress(DataplaneError):  # it ended, and what was open with it
                for part in batches(todo):
                    answer, _ = await worker.ask(self._batch(part))
                    ended += answer.cut if isinstance(answer, Done) else 0
        return ended

    def _batch(self, instructions: list[Instruction]) -> Batch:
        self._batches += 1
        around = messages.wire_surroundings(self.surroundings)
        return Batch(self._batches, instructions, around)


def _failed(answer: Answer) -> dict[Place, DataplaneError]:
    """Return what a worker could not do, each with the reason; Busy where it may be able soon."""
    found: dict[Place, DataplaneError] = {}
    if isinstance(answer, Done):
        for wire, why in answer.failed:
            place = messages.place_of(wire)
            found[place] = Rejected(f"listen {place}", why)
        for wire, why in answer.short:
            place = messages.place_of(wire)
            found[place] = Busy(f"listen {place}: {why}")
    return found


def _listen(
    instructions: Iterable[Instruction],
) -> tuple[list[socket.socket], dict[Place, DataplaneError]]:
    """Return a listener for each instruction that needs one, and the places that have none."""
    made: list[socket.socket] = []
    refused: dict[Place, DataplaneError] = {}
    errors: dict[Place, str] = {}
    for one in instructions:
        if not isinstance(one, Listen):
            continue
        place = messages.place_of(one.place)
        try:
            made.append(listener(place))
        except OSError as error:
            why = os.strerror(error.errno or 0)
            if error.errno in _SHORT:
                refused[place] = Busy(f"listen {place}: {why}")
            else:
                errors[place] = why
    who = holders(errors) if errors else {}
    for place, why in errors.items():
        refused[place] = Rejected(
            f"listen {place}", f"{why}: {who[place]}" if place in who else why
        )
    return made, refused


_SHORT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of this process, or of the node, that pass."""
