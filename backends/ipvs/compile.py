"""From virtual servers to what IPVS mode keeps in the kernel.

Lives here: the program and the pure function from one virtual server to its things. Must not:
compare programs (plan.py) or know the fixed rules (rules.py).
"""

from collections.abc import Iterable, Iterator

from vipd.backends.answering import answered, source, with_address
from vipd.backends.ipvs.objects import (
    CLUSTER,
    DROPPED,
    FROM_NODE,
    GUARDED,
    HAIRPIN,
    INSIDE,
    MASQUERADED,
    REJECTED,
    RESTRICTED,
    SERVED,
    SOURCES,
    Destination,
    Manner,
    Member,
    Route,
    Service,
    Thing,
    Value,
    member_text,
)
from vipd.backends.ipvs.schedulers import choose
from vipd.backends.things import Entries
from vipd.proxy.names import Address
from vipd.proxy.virtualserver import (
    Endpoint,
    Key,
    Masquerade,
    Refusal,
    Use,
    VirtualServer,
)


class Program(Entries, frozen=True):
    """What should be in the kernel. Immutable: a change shares the rest.

    Shared are the route to an address, its guard, and a hairpin pair.
    """

    default_scheduler: str


def things(program: Program, key: Key) -> dict[Thing, Value]:
    """Return everything that a key of the program needs in the kernel, in the order of adding.

    A node port stands aside where a service has the same port on the node's own address.
    """
    server = program.entries.get(key)
    if server is None:
        return {}
    made: dict[Thing, Value] = {}
    for address in answered(server.key, program.network):
        if key.address is None and with_address(key, address) in program.entries:
            continue
        made |= _things_at(server, address, program)
    return made


def is_shared(thing: Thing) -> bool:
    """Return whether several virtual servers can need the thing."""
    return isinstance(thing, Route) or (isinstance(thing, Member) and thing.set in _SHARED_SETS)


_SHARED_SETS = (GUARDED, HAIRPIN)


def endpoints(server: VirtualServer) -> tuple[Endpoint, ...]:
    """Return the endpoints that IPVS chooses among.

    It has one list for every source, so external policy Local uses the local endpoints for all, and
    only where there is none the cluster list, which then rules keep from outsiders (INSIDE).
    """
    match server.use:
        case Use.CLUSTER:
            return server.cluster
        case Use.LOCAL:
            return server.local
        case Use.LOCAL_FROM_OUTSIDE:
            return server.local or server.cluster


def _things_at(server: VirtualServer, address: Address, program: Program) -> dict[Thing, Value]:
    key, family = server.key, server.key.family
    service = Service(family, key.protocol, address, key.port)
    chosen = endpoints(server)
    scheduler = choose(server.scheduler, server.algorithm, chosen, program.default_scheduler)
    made: dict[Thing, Value] = {}
    own = key.address is None or address in program.network.own_addresses
    for member in _members(server, address, chosen):
        made[member] = ""
    if not own:
        made[Member(family, GUARDED, str(address))] = ""
    made[service] = Manner(scheduler, server.affinity_seconds or 0)
    for one in chosen:
        made[Destination(service, one.address, one.port)] = one.weight
    if not own:
        # Last: from here on the node takes what is sent to the address.
        made[Route(family, address)] = source(family, program.network)
    return made


def _members(
    server: VirtualServer, address: Address, chosen: Iterable[Endpoint]
) -> Iterator[Member]:
    key, family = server.key, server.key.family
    here = member_text(address, key.protocol, key.port)
    for allowed in server.allowed_sources or ():
        # hash:ip,port,net prints a single address without its prefix.
        text = str(allowed.network_address if allowed.num_addresses == 1 else allowed)
        yield Member(family, SOURCES, member_text(address, key.protocol, key.port, text))
    if server.allowed_sources is not None:
        yield Member(family, RESTRICTED, here)
    if server.masquerade is Masquerade.ALWAYS:
        yield Member(family, MASQUERADED, here)
    elif server.masquerade is Masquerade.OFF_CLUSTER:
        yield Member(family, CLUSTER, here)
    if server.use is Use.LOCAL_FROM_OUTSIDE:
        yield Member(family, FROM_NODE, here)
    refused = REJECTED if server.when_empty is Refusal.REJECT else DROPPED
    if not chosen:
        yield Member(family, refused, here)
    elif server.use is Use.LOCAL_FROM_OUTSIDE and not server.local:
        yield Member(family, INSIDE, here)
    for one in chosen:
        if one.local:
            text = member_text(one.address, key.protocol, one.port, one.address)
            yield Member(family, HAIRPIN, text)
    yield Member(family, SERVED, here)
