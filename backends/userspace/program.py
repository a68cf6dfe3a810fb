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
Keys = Key | Map[Key, None]
"""One key, as nearly every address has, or several: a map for each would double the index."""
KT = TypeVar("KT", bound=Hashable)


class Program(Entries, frozen=True):
    """What should be there. Immutable: a change shares the rest.

    Shared are the route to an address, its guard, and the return path of transparent connections.
    """

    targets: Map[Target, int] = Map()
    """How many virtual servers have an endpoint there: whether anything depends on a place of this
    node that comes or goes."""
    addresses: Map[Address, Keys] = Map()
    """The virtual servers that have each address."""
    reached: Map[Address, Keys] = Map()
    """The virtual servers that have an endpoint at each address."""
    mark: int = 0
    """Packet mark of the transparent mode; 0: no endpoint sees its clients' addresses."""


def indexed(
    program: Program, gone: Iterable[VirtualServer], new: Iterable[VirtualServer]
) -> Program:
    """Return the program with its indexes without `gone` and with `new`."""
    targets, addresses = program.targets.mutate(), program.addresses.mutate()
    reached = program.reached.mutate()
    for servers, step in ((gone, -1), (new, +1)):
        for server in servers:
            key = server.key
            found = everyone(server)
            for one in found:
                _count(targets, (one.address, key.protocol, one.port), step)
            for address in {one.address for one in found}:
                _note(reached, address, key, step)
            if key.address is not None:
                _note(addresses, key.address, key, step)
    return structs.replace(
        program, targets=targets.finish(), addresses=addresses.finish(), reached=reached.finish()
    )


def _note(index: MapMutation[Address, Keys], address: Address, key: Key, step: int) -> None:
    keys = index.get(address)
    if step > 0:
        if keys is None:
            index[address] = key
        elif isinstance(keys, Map):
            index[address] = keys.set(key, None)
        elif keys != key:
            index[address] = Map({keys: None, key: None})
    elif isinstance(keys, Map):
        left = keys.delete(key)
        index[address] = left if len(left) > 1 else next(iter(left))
    else:
        del index[address]


def keys_at(index: Map[Address, Keys], address: Address) -> Iterable[Key]:
    """Return the keys that an index has for an address."""
    keys = index.get(address)
    if keys is None:
        return ()
    return keys if isinstance(keys, Map) else (keys,)


def owner_of(program: Program, address: Address) -> str:
    """Return the name of the service that has an address, the first by key; empty: none has."""
    first = min(keys_at(program.addresses, address), key=Key.sort_key, default=None)
    return "" if first is None else str(program.entries[first].owner.service)


def _count(counts: MapMutation[KT, int], what: KT, step: int) -> None:
    count = counts.get(what, 0) + step
    if count:
        counts[what] = count
    else:
        del counts[what]


def beside(program: Program, key: Key) -> list[Key]:
    """Return the keys whose things change when `key` comes or goes.

    These are the same port of the node, and whoever has an endpoint at a place of the key.
    """
    found = answering.beside(program, key)
    places = {
        (address, key.protocol, key.port)
        for address in answered(key, program.network)
        if (address, key.protocol, key.port) in program.targets
    }
    there = dict.fromkeys(one for place in places for one in keys_at(program.reached, place[0]))
    found += [
        other
        for other in there
        if other.protocol is key.protocol
        and other in program.entries  # the indexes may be ahead by one change, which names it
        and any(
            (one.address, key.protocol, one.port) in places
            for one in everyone(program.entries[other])
        )
    ]
    return found


def everyone(server: VirtualServer) -> tuple[Endpoint, ...]:
    """Return the endpoints of a virtual server, for whichever sources."""
    return (*server.cluster, *server.local) if server.local else server.cluster
