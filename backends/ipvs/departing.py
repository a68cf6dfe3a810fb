"""What has left the program and waits in the kernel for its old connections to end.

Lives here: which things wait, for what, and when each may go. Pure: the driver tells how many
connections there are, and does what is due. Must not: know time-outs; how long something may wait
is decided by those who call `cut`.
"""

from collections.abc import Iterable, Mapping

from vipd.backends.ipvs.objects import (
    ADD,
    DELETE,
    SET,
    Destination,
    Member,
    Operation,
    Route,
    Service,
    Thing,
    Value,
    member_text,
)
from vipd.proxy.names import Address

Connections = Mapping[tuple[Address, int], int]
"""Connections of each real server of a service."""


class Departing:
    """The waiting things. A thing that comes back stops waiting."""

    def __init__(self) -> None:
        self._waiting: dict[Thing, Value] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, operations: Iterable[Operation]) -> None:
        """Let the things of these deletions wait."""
        self._waiting |= {one.thing: one.value for one in operations}

    def adapted(self, operations: Iterable[Operation]) -> list[Operation]:
        """Return operations as they have to be, given what still waits in the kernel.

        What comes back is changed instead of added; a refusal of new connections that was to go
        with its service goes now, as the service stays.
        """
        changed, lifted = [], []
        for one in operations:
            verb = one.verb
            if self._waiting.pop(one.thing, None) is not None and verb is ADD:
                verb = SET
                if isinstance(one.thing, Service):
                    lifted += self._members_of(one.thing)
            changed.append(Operation(verb, one.thing, one.value))
        kept = {one.thing for one in changed if one.verb is not DELETE}
        changed += [
            Operation(DELETE, one, "")
            for one in lifted
            if one not in kept and self._waiting.pop(one, None) is not None
        ]
        return changed

    def services(self) -> set[Service]:
        """Return the services whose connections have to be counted."""
        found = {one for one in self._waiting if isinstance(one, Service)}
        return found | {one.service for one in self._waiting if isinstance(one, Destination)}

    def due(self, connections: Mapping[Service, Connections]) -> list[Operation]:
        """Return the deletions that nothing keeps any more, in order; they no longer wait.

        `connections` has no entry for a service that the kernel does not have.
        """
        waiting = list(self._waiting)
        destinations = [
            one
            for one in waiting
            if isinstance(one, Destination)
            and connections.get(one.service, {}).get((one.address, one.port), 0) == 0
        ]
        services = [one for one in waiting if isinstance(one, Service)]
        staying = {one for one in services if any(connections.get(one, {}).values())}
        texts = {_text(one) for one in staying}
        texts |= {(one.family, str(one.address)) for one in staying}
        addresses = {one.address for one in staying}
        gone: list[Thing] = [
            *destinations,
            *(one for one in services if one not in staying),
            *(one for one in waiting if isinstance(one, Route) and one.address not in addresses),
            *(
                one
                for one in waiting
                if isinstance(one, Member) and (one.family, one.text) not in texts
            ),
        ]
        return [Operation(DELETE, one, self._waiting.pop(one)) for one in gone]

    def cut(self, wanted: Iterable[Destination]) -> list[Operation]:
        """Return the deletions of these real servers, as far as they wait."""
        return [
            Operation(DELETE, one, self._waiting.pop(one)) for one in wanted if one in self._waiting
        ]

    def destinations(self) -> list[Destination]:
        """Return the real servers that wait."""
        return [one for one in self._waiting if isinstance(one, Destination)]

    def clear(self) -> None:
        """Forget everything."""
        self._waiting.clear()

    def _members_of(self, service: Service) -> list[Member]:
        key = _text(service)
        return [
            one
            for one in self._waiting
            if isinstance(one, Member) and (one.family, one.text) == key
        ]


def _text(service: Service) -> tuple[int, str]:
    return service.family, member_text(service.address, service.protocol, service.port)
