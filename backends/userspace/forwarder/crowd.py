"""Sessions by client: who has most, and which of theirs is the idlest.

Lives here: the order in which sessions have to go where there is room for no more. Pure. Must not:
know what a session is, or how many are too many.

Fair is: of the client that has most, the session that was not used for longest. So a client that
floods evicts itself, whoever else is there. Among clients that have as many, it is the one that has
been silent for longest. Each step costs the same, however many sessions there are.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Session = TypeVar("Session", bound=Hashable)


class Crowd(Generic[Session]):
    """Sessions of any number of clients. Its length is that of all of them."""

    def __init__(self) -> None:
        self._of: dict[str, OrderedDict[Session, None]] = {}
        self._by_size: dict[int, OrderedDict[str, None]] = {}
        self._largest = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def size_of(self, client: str) -> int:
        """Return how many sessions the client has."""
        return len(self._of.get(client, ()))

    def add(self, client: str, session: Session) -> None:
        """Add a session that is used now. It must not be there."""
        held = self._of.setdefault(client, OrderedDict())
        held[session] = None
        self._size += 1
        self._moves(client, len(held) - 1, len(held))

    def used(self, client: str, session: Session) -> None:
        """Note that a session that is there is used now."""
        held = self._of[client]
        held.move_to_end(session)
        self._by_size[len(held)].move_to_end(client)

    def remove(self, client: str, session: Session) -> None:
        """Remove a session that is there."""
        held = self._of[client]
        del held[session]
        self._size -= 1
        if not held:
            del self._of[client]
        self._moves(client, len(held) + 1, len(held))

    def idlest_of(self, client: str) -> Session:
        """Return the client's session that was not used for longest; it must have one."""
        return next(iter(self._of[client]))

    def idlest(self) -> Session:
        """Return the one that has to go first; there must be one."""
        return self.idlest_of(next(iter(self._by_size[self._largest])))

    def _moves(self, client: str, before: int, after: int) -> None:
        """Move the client to those that have `after` sessions, one more or less than `before`."""
        if before:
            there = self._by_size[before]
            del there[client]
            if not there:
                del self._by_size[before]
        if after:
            self._by_size.setdefault(after, OrderedDict())[client] = None
        if after > self._largest or self._largest not in self._by_size:
            self._largest = after
