"""From virtual servers to what userspace mode keeps: places, elements of sets, local routes.

Lives here: the pure function from one virtual server to its things. Must not: compare programs
(plan.py) or know the fixed rules (rules.py).
"""

from collections.abc import Iterable, Iterator, Sequence

from vipd.backends.answering import answered, source, with_address
from vipd.backends.protocol import Serving
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
    ReturnPath,
    Route,
    Surroundings,
    Thing,
    Value,
)
from vipd.backends.userspace.program import Program, everyone, owner_of
from vipd.proxy.names import Address, Protocol
from vipd.proxy.virtualserver import (
    Endpoint,
    Key,
    Masquerade,
    NodeNetwork,
    Refusal,
    Use,
    VirtualServer,
)


def things(program: Program, key: Key) -> dict[Thing, Value]:
    """Return everything that a key of the program needs, in the order of adding.

    A node port stands aside where a service has the same port on the node's own address; it is not
    answered on link-local addresses of IPv6. Endpoints that this node would reach through itself
    are left out.
    """
    server = program.entries.get(key)
    if server is None or _never(key):
        return {}
    made: dict[Thing, Value] = {}
    inside, outside = endpoints(server)
    if any(_is_here(program, server, one) for one in everyone(server)):
        inside, outside = (
            tuple(one for one in some if not _is_here(program, server, one))
            for some in (inside, outside)
        )
    transparent = _transparent(program, server, (*inside, *outside)) if program.mark else ()
    for address in answered(key, program.network):
        if key.address is None and (
            with_address(key, address) in program.entries or _needs_interface(address)
        ):
            continue
        if transparent:  # first: no answer may be lost
            made[ReturnPath(key.family)] = hex(program.mark)
        made |= _things_at(server, address, program.network, inside, outside, transparent)
    return made


def _transparent(
    program: Program, server: VirtualServer, endpoints: Iterable[Endpoint]
) -> tuple[Address, ...]:
    """Return the endpoints that see their clients' addresses: those whose answers come by here.

    So only pods of this node. What has an address of the node itself answers without passing it.
    """
    if server.masquerade is Masquerade.ALWAYS:
        return ()
    own = program.network.own_addresses
    found = {one.address for one in endpoints if one.local and one.address not in own}
    return tuple(sorted(found, key=int))


def refusal(program: Program, key: Key) -> str:
    """Return why a virtual server cannot be served, or not as it should be, or an empty text."""
    server = program.entries.get(key)
    if server is None:
        return ""
    return _never(key) or "; ".join(_wrong_endpoints(program, server))


def serving(program: Program, key: Key) -> Serving | None:
    """Return how a virtual server is served; None where the program does not have it.

    Workers connect to every endpoint, so that it sees an address of the node, unless it is one of
    those that see their clients.
    """
    server = program.entries.get(key)
    if server is None:
        return None
    endpoints = tuple(dict.fromkeys(everyone(server)))
    here = [one for one in endpoints if _is_here(program, server, one)]
    transparent = _transparent(program, server, endpoints) if program.mark else ()
    return Serving(
        refusal=refusal(program, key),
        served=not _never(key),
        passed_over=tuple(
            (one, "this node serves it itself, and may not ask itself") for one in here
        ),
        connected=tuple(one for one in endpoints if one.address not in transparent),
    )


def _wrong_endpoints(program: Program, server: VirtualServer) -> Iterator[str]:
    found = dict.fromkeys(everyone(server))
    served = [one for one in found if _is_here(program, server, one)]
    if served:
        yield f"left out, as this node serves them itself: {_listed(served)}"
    own = program.network.own_addresses
    deaf = [
        one
        for one in found
        if one.address in program.addresses and one not in served and one.address not in own
    ]
    addresses = list(dict.fromkeys(one.address for one in deaf))
    for address in addresses[:_MOST_NAMED]:
        whose = owner_of(program, address)
        yield f"{address} is a service address ({whose}), so the pod there cannot be reached"
    if len(addresses) > _MOST_NAMED:
        yield f"and {len(addresses) - _MOST_NAMED} more such addresses"


def _listed(endpoints: Sequence[Endpoint]) -> str:
    more = len(endpoints) - _MOST_NAMED
    return " ".join(map(str, endpoints[:_MOST_NAMED])) + (f" and {more} more" if more > 0 else "")


_MOST_NAMED = 4


def _never(key: Key) -> str:
    """Return why the key cannot be served, whatever its endpoints are."""
    if key.protocol is Protocol.SCTP:
        return "userspace mode forwards TCP and UDP only"
    if key.address is not None and _needs_interface(key.address):
        return "a link-local address is listened at on one interface only, and none is known"
    return ""


def _is_here(program: Program, server: VirtualServer, one: Endpoint) -> bool:
    """Return whether workers of this node listen where the endpoint is.

    Connections to it could come back to the virtual server, and again, without an end: nothing
    counts hops here. So no worker is the endpoint of a worker, not even where it would end.
    """
    key = server.key
    if with_address(key, one.address, one.port) in program.entries:
        return True
    return (
        with_address(key, None, one.port) in program.entries
        and one.address in answered(with_address(key, None, one.port), program.network)
        and not _needs_interface(one.address)
    )


def is_shared(thing: Thing) -> bool:
    """Return whether several virtual servers can need the thing."""
    if isinstance(thing, Element):
        return thing.set == ADDRESSES
    return isinstance(thing, Route | ReturnPath)


def _needs_interface(address: Address) -> bool:
    """Return whether nobody can listen at the address alone: several interfaces can have it."""
    return address.version == 6 and address.is_link_local


def surroundings(network: NodeNetwork) -> Surroundings:
    """Return what workers have to know of the node to tell its sources apart."""
    pods = network.pod_sources
    return Surroundings(pods.cidrs, network.own_addresses, pods.interface)


def _things_at(
    server: VirtualServer,
    address: Address,
    network: NodeNetwork,
    inside: tuple[Endpoint, ...],
    outside: tuple[Endpoint, ...],
    transparent: tuple[Address, ...],
) -> dict[Thing, Value]:
    key = server.key
    place = Place(key.family, key.protocol, address, key.port)
    own = key.address is None or address in network.own_addresses
    made: dict[Thing, Value] = {}
    if inside or outside:
        made[place] = forwarding(server, inside, outside, transparent)
    made |= dict.fromkeys(_elements(server, place, inside, outside), "")
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
    server: VirtualServer,
    inside: tuple[Endpoint, ...],
    outside: tuple[Endpoint, ...],
    transparent: tuple[Address, ...] = (),
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
        sets_aside=not server.keeps_failing,
        proxy_protocol=server.proxy_protocol,
        transparent=transparent,
        transparent_for_pods=bool(transparent) and server.masquerade is Masquerade.OFF_CLUSTER,
    )


def _bare(found: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    return tuple(Endpoint(one.address, one.port, one.weight) for one in found)


def _elements(
    server: VirtualServer,
    place: Place,
    inside: tuple[Endpoint, ...],
    outside: tuple[Endpoint, ...],
) -> Iterator[Element]:
    family, here = place.family, place.key
    if server.allowed_sources is not None:
        for allowed in server.allowed_sources:
            # As nft prints it: a single address without its prefix.
            text = allowed.network_address if allowed.num_addresses == 1 else allowed
            yield Element(family, ALLOWED, f"{here} . {text}")
        yield Element(family, RESTRICTED, here)
    if not inside and not outside:
        yield Element(family, REFUSED if server.when_empty is Refusal.REJECT else DROPPED, here)
        return
    if not outside:
        yield Element(family, INSIDE, here)
    yield Element(family, SERVED, here)
