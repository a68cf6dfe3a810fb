"""What the kernel has that concerns IPVS mode, as values, and as JSON for another process.

Lives here: the observed state and its dump. Must not: read the kernel (driver.py), nor decide what
should be there (plan.py).
"""

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from vipd.backends.ipvs.objects import (
    SERVED,
    Destination,
    Manner,
    Member,
    Route,
    Service,
    Thing,
    Value,
    member_text,
)
from vipd.backends.ipvs.schedulers import Scheduler
from vipd.proxy.names import Address, Family, Protocol, parse_address

Place = tuple[Family, str, str]
"""Family, iptables table and chain."""


class Observed(Struct, frozen=True):
    """Everything with our mark, and the services of others, which are never touched.

    `rules` holds for each chain of ours, and for each built-in chain that has a rule of ours, the
    comments of those rules. `strange` are addresses whose local route is another owner's.
    """

    things: Mapping[Thing, Value] = {}
    foreign: frozenset[Service] = frozenset()
    strange: frozenset[Address] = frozenset()
    rules: Mapping[Place, tuple[str, ...]] = {}
    sets: frozenset[tuple[Family, str]] = frozenset()
    """Sets that are there with the type they should have."""


def record(service: Service) -> Member:
    """Return the element that says that a service is ours."""
    text = member_text(service.address, service.protocol, service.port)
    return Member(service.family, SERVED, text)


class _Dump(Struct, array_like=True):
    """An Observed as JSON can hold it."""

    routes: list[tuple[Family, str, str]]
    members: list[tuple[Family, str, str]]
    services: list[tuple[Family, Protocol, str, int, str, int, int]]
    destinations: list[tuple[int, str, int, int]]
    """Index of the service, address, port, weight."""
    rules: list[tuple[Family, str, str, tuple[str, ...]]]
    sets: list[tuple[Family, str]]


def dump(seen: Observed) -> bytes:
    """Return the state as JSON, for a plan that is made in another process."""
    told = _Dump([], [], [], [], [(*place, told) for place, told in seen.rules.items()], [])
    told.sets += sorted(seen.sets)
    numbers: dict[Service, int] = {}
    for thing, value in seen.things.items():
        if isinstance(thing, Service) and isinstance(value, Manner):
            numbers[thing] = len(told.services)
            told.services.append(
                (
                    thing.family,
                    thing.protocol,
                    str(thing.address),
                    thing.port,
                    *value.scheduler,
                    value.persistence,
                )
            )
        elif isinstance(thing, Route):
            told.routes.append((thing.family, str(thing.address), str(value)))
        elif isinstance(thing, Member):
            told.members.append((thing.family, thing.set, thing.text))
    for thing, value in seen.things.items():
        if isinstance(thing, Destination) and isinstance(value, int):
            number = numbers[thing.service]
            told.destinations.append((number, str(thing.address), thing.port, value))
    return msgspec.json.encode(told)


def load(text: bytes) -> Observed:
    """Return the state that `dump` wrote."""
    told = msgspec.json.decode(text, type=_Dump)
    things: dict[Thing, Value] = {}
    for family, address, source in told.routes:
        things[Route(family, parse_address(address))] = source
    for family, name, member in told.members:
        things[Member(family, name, member)] = ""
    services = []
    for family, protocol, address, port, name, flags, persistence in told.services:
        service = Service(family, protocol, parse_address(address), port)
        services.append(service)
        things[service] = Manner(Scheduler(name, flags), persistence)
    for number, address, port, weight in told.destinations:
        things[Destination(services[number], parse_address(address), port)] = weight
    return Observed(
        things,
        rules={(family, table, chain): rules for family, table, chain, rules in told.rules},
        sets=frozenset(told.sets),
    )
