"""The operations of a commit, sorted into batches; and what is taken back for a refused unit.

Lives here: which operations go together in which order, and which units they belong to. Pure: the
driver does the batches. Must not: talk to the kernel.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

from vipd.backends.ipvs.objects import (
    ADD,
    DELETE,
    HAIRPIN,
    SET,
    Destination,
    Member,
    Operation,
    Route,
    Service,
)
from vipd.backends.ipvs.plan import Unit
from vipd.proxy.errors import DataplaneError

Kind = Callable[[Operation], bool]


class Work:
    """The units of one commit on their way, with those that were refused."""

    def __init__(self, units: Sequence[Unit], adapt: Callable[[Unit], list[Operation]]) -> None:
        self._units = units
        self._adapted = [adapt(unit) for unit in units]
        self._left = dict(enumerate(self._adapted))
        self._done: set[Operation] = set()
        self.refused: dict[int, DataplaneError] = {}
        """By the unit's number."""

    def batch(self, kind: Kind) -> list[Operation]:
        """Return the operations of one kind of all units that are not refused, each once."""
        found = dict.fromkeys(one for ops in self._left.values() for one in ops if kind(one))
        self._done |= found.keys()
        return list(found)

    def failed(self, errors: Mapping[Operation, DataplaneError]) -> None:
        """Refuse the units that these operations belong to, or that need what they should bring."""
        if not errors:
            return
        self._done -= errors.keys()
        unrouted = {
            one.thing.address: error
            for one, error in errors.items()
            if isinstance(one.thing, Route)
        }
        for number, operations in list(self._left.items()):
            for one in operations:
                error = errors.get(one)
                if error is None and isinstance(one.thing, Service):
                    error = unrouted.get(one.thing.address)
                if error is not None:
                    self.refused[number] = error
                    del self._left[number]
                    break

    def accepted(self) -> Iterable[Unit]:
        """Return the units that were not refused."""
        return (self._units[number] for number in self._left)

    def postponed(self) -> list[Operation]:
        """Return the deletions that refused units had called off: they were to come back."""
        return [
            Operation(DELETE, one.thing, one.value)
            for number in self.refused
            for told, one in zip(self._units[number].now, self._adapted[number], strict=False)
            if (told.verb, one.verb) == (ADD, SET)
        ]

    def backwards(self) -> list[Operation]:
        """Return what takes back the additions of refused units, but for what others need."""
        kept = {one.thing for operations in self._left.values() for one in operations}
        addresses = {one.address for one in kept if isinstance(one, Service)}
        back = []
        for number in self.refused:
            for one in reversed(self._adapted[number]):
                thing = one.thing
                if one not in self._done or one.verb is not ADD or thing in kept:
                    continue
                if isinstance(thing, Route) and thing.address in addresses:
                    continue
                if isinstance(thing, Destination) or _is_hairpin(thing):
                    continue  # real servers go with their service; a pair too many does no harm
                back.append(Operation(DELETE, thing, one.value))
        return back


def brings_route(one: Operation) -> bool:
    """Tell routes that are added or changed."""
    return isinstance(one.thing, Route) and one.verb is not DELETE


def brings_member(one: Operation) -> bool:
    """Tell elements that are added."""
    return isinstance(one.thing, Member) and one.verb is not DELETE


def brings_service(one: Operation) -> bool:
    """Tell services that are added or changed."""
    return isinstance(one.thing, Service) and one.verb is not DELETE


def brings_destination(one: Operation) -> bool:
    """Tell real servers that are added or changed, weight 0 included."""
    return isinstance(one.thing, Destination) and one.verb is not DELETE


def takes_ipvs(one: Operation) -> bool:
    """Tell real servers and services that go."""
    return isinstance(one.thing, Destination | Service) and one.verb is DELETE


def takes_member(one: Operation) -> bool:
    """Tell elements that go."""
    return isinstance(one.thing, Member) and one.verb is DELETE


def takes_route(one: Operation) -> bool:
    """Tell routes that go."""
    return isinstance(one.thing, Route) and one.verb is DELETE


def _is_hairpin(thing: object) -> bool:
    return isinstance(thing, Member) and thing.set == HAIRPIN
