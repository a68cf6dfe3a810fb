"""From virtual servers to what userspace mode keeps: places, elements of sets, local routes.

Lives here: the program and the pure function from one virtual server to its things. Must not:
compare programs (plan.py) or know the fixed rules (rules.py).
"""

from collections.abc import Iterator

from vipd.backends.answering import answered, source, with_address
from vipd.backends.things import Entries
from vipd.backends.userspace.objects import (
    ADDRESSES,
    ALLOWED,
    DROPPED,
    INSIDE,
    REFUSED,
    RESTRICTED,
    SERVED,
    Element,
    Forwarding,
    Place,
    Route,
    Surroundings,
    Thing,
    Value,
)
from vipd.proxy.names import Address, Protocol
from vipd.proxy.virtualserver import (
    Endpoint,
    Key,
    NodeNetwork,
    Refusal,
    Use,
    VirtualServer,
)


class Program(Entries, frozen=True):
    """What should be there. Immutable: a change shares the rest.

    Shared are the route to an address and its guard.
    """


def things(program: Program, key: Key) -> dict[Thing, Value]:
    """Return everything that a key of the program needs, in the order of adding.

    A node port stands aside where a service has the same port on the node's own address.
    """
    server = program.entries.get(key)
    if server is None or refusal(program, key):
        return {}
    made: dict[Thing, Value] = {}
    for address in answered(server.key, program.network):
        if key.address is None and with_address(key, address) in program.entries:
            continue
        made |= _things_at(server, address, program.network)
    return made


def refusal(program: Program, key: Key) -> str:
    """Return why a virtual server cannot be served at all, or an empty text."""
    server = program.entries.get(key)
    if server is None:
        return ""
    if key.protocol is Protocol.SCTP:
        return "userspace mode forwards TCP and UDP only"
    for one in (*server.cluster, *server.local):
        if with_address(key, one.address, one.port) in program.entries:
            return f"endpoint {one} is a service address of this node"
    return ""


def is_shared(thing: Thing) -> bool:
    """Return whether several virtual servers can need the thing."""
    return isinstance(thing, Route) or (isinstance(thing, Element) and thing.set == ADDRESSES)


def surroundings(network: NodeNetwork) -> Surroundings:
    """Return what workers have to know of the node to tell its sources apart."""
    return Surroundings(network.pod_sources.cidrs, network.own_addresses)


def _things_at(server: VirtualServer, address: Address, network: NodeNetwork) -> dict[Thing, Value]:
    key = server.key
    place = Place(key.family, key.protocol, address, key.port)
    own = key.address is None or address in network.own_addresses
    inside, outside = endpoints(server)
    made: dict[Thing, Value] = {}
    if inside or outside:
        made[place] = forwarding(server, inside, outside)
    made |= dict.fromkeys(_elements(server, place), "")
    if not own:
        made[Element(key.family, ADDRESSES, str(address))] = ""
        # Last: from here on the node takes what is sent to the address.
        made[Route(key.family, address)] = source(key.family, network)
    return made


def endpoints(server: VirtualServer) -> tuple[tuple[Endpoint, ...], tuple[Endpoint, ...]]:
    """Return the endpoints for sources inside, and for all others."""
    match server.use:
        case Use.CLUSTER:
            return server.cluster, server.cluster
        case Use.LOCAL:
            return server.local, server.local
        case Use.LOCAL_FROM_OUTSIDE:
            return server.cluster, server.local


def forwarding(
    server: VirtualServer, inside: tuple[Endpoint, ...], outside: tuple[Endpoint, ...]
) -> Forwarding:
    """Return how workers serve the places of a virtual server."""
    bare_inside = _bare(inside)
    return Forwarding(
        owner=str(server.owner),
        inside=bare_inside,
        outside=bare_inside if outside is inside else _bare(outside),
        algorithm=server.algorithm,
        affinity_seconds=server.affinity_seconds,
        allowed_sources=server.allowed_sources,
    )


def _bare(found: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(one.address, one.port, one.weight) for one in found)


def _elements(server: VirtualServer, place: Place) -> Iterator[Element]:
    family, here = place.family, place.key
    if server.allowed_sources is not None:
        for allowed in server.allowed_sources:
            # As nft prints it: a single address without its prefix.
            text = allowed.network_address if allowed.num_addresses == 1 else allowed
            yield Element(family, ALLOWED, f"{here} . {text}")
        yield Element(family, RESTRICTED, here)
    inside, outside = endpoints(server)
    if not inside and not outside:
        yield Element(family, REFUSED if server.when_empty is Refusal.REJECT else DROPPED, here)
        return
    if not outside:
        yield Element(family, INSIDE, here)
    yield Element(family, SERVED, here)
