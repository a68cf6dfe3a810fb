"""The program: virtual servers by key, and the indexes that tell which of them meet.

Lives here: the value, its indexes, and who is concerned by whom. Pure. Must not: know what a
virtual server needs (compile.py).
"""

from collections.abc import Hashable, Iterable
from typing import TypeVar

from immutables import Map, MapMutation
from msgspec import structs

from vipd.backends import answering
from vipd.backends.answering import answered
from vipd.backends.things import Entries
from vipd.proxy.names import Address, Protocol
from vipd.proxy.virtualserver import Endpoint, Key, VirtualServer

Target = tuple[Address, Protocol, int]
"""Where an endpoint is."""
KT = TypeVar("KT", bound=Hashable)


class Program(Entries, frozen=True):
    """What should be there. Immutable: a change shares the rest.

    Shared are the route to an address, its guard, and the return path of transparent connections.
    """

    targets: Map[Target, int] = Map()
    """How many virtual servers have an endpoint there: whether anything depends on a place of this
    node that comes or goes."""
    addresses: Map[Address, int] = Map()
    """How many virtual servers have each address."""
    mark: int = 0
    """Packet mark of the transparent mode; 0: no endpoint sees its clients' addresses."""


def indexed(
    program: Program, gone: Iterable[VirtualServer], new: Iterable[VirtualServer]
) -> Program:
    """Return the program with its `targets` and `addresses` without `gone` and with `new`."""
    targets, addresses = program.targets.mutate(), program.addresses.mutate()
    for servers, step in ((gone, -1), (new, +1)):
        for server in servers:
            key = server.key
            for one in everyone(server):
                _count(targets, (one.address, key.protocol, one.port), step)
            if key.address is not None:
                _count(addresses, key.address, step)
    return structs.replace(program, targets=targets.finish(), addresses=addresses.finish())


def _count(counts: MapMutation[KT, int], what: KT, step: int) -> None:
    count = counts.get(what, 0) + step
    if count:
        counts[what] = count
    else:
        del counts[what]


def beside(program: Program, key: Key) -> list[Key]:
    """Return the keys whose things change when `key` comes or goes.

    These are the same port of the node, and whoever has an endpoint at a place of the key; hardly
    anybody has, so that it need not be known who.
    """
    found = answering.beside(program, key)
    places = {
        (address, key.protocol, key.port)
        for address in answered(key, program.network)
        if (address, key.protocol, key.port) in program.targets
    }
    if places:
        found += [
            server.key
            for server in program.entries.values()
            if server.key.protocol is key.protocol
            and any((one.address, key.protocol, one.port) in places for one in everyone(server))
        ]
    return found


def everyone(server: VirtualServer) -> tuple[Endpoint, ...]:
    """Return the endpoints of a virtual server, for whichever sources."""
    return (*server.cluster, *server.local) if server.local else server.cluster
