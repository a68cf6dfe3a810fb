"""What workers have counted and remember for one packet.

Lives here: the words for it. Must not: ask workers itself (the driver does), or change anything.
"""

from collections.abc import Iterator, Sequence
from math import ceil

from msgspec import structs

from vipd.backends.protocol import Known, Packet
from vipd.backends.usage import ClientUsage, Counting, EndpointUsage, ServerUsage
from vipd.backends.userspace.compile import things
from vipd.backends.userspace.objects import Forwarding, Place
from vipd.backends.userspace.program import Program
from vipd.proxy.errors import DataplaneError
from vipd.proxy.names import Protocol, family_of
from vipd.proxy.virtualserver import Endpoint, Key, VirtualServer
from vipd.proxy.words import counted

MOST_ENDPOINTS = 10


async def counters(program: Program, packet: Packet, driver: object) -> Known:
    """Return what the workers that the packet reaches know of it.

    `driver` is that of the dataplane that serves; without one nobody can be asked, as workers
    belong to a daemon.
    """
    family = family_of(packet.destination)
    place = Place(family, packet.protocol, packet.destination, packet.port)
    server = _server(program, place)
    if server is None:
        return Known((f"no worker listens at {place}",))
    if not isinstance(driver, Counting):
        return Known(("what workers know is not asked: they are the daemon's, in its mode",))
    # Of a node port, at this address alone.
    there = structs.replace(server, key=Key(family, place.address, place.protocol, place.port))
    try:
        usage = await driver.usage([there], str(packet.source))
    except DataplaneError as error:
        return Known((f"counters are not known: {error}",))
    told = usage.by_server.get(there.key)
    if told is None:
        return Known((f"no worker listens at {place}",))
    client = told.of_client or ClientUsage()
    lines = (*_counted(place, told), *_of_client(server, packet, client))
    return Known(lines, client.remembered, tuple(_passed_over(told)))


def _server(program: Program, place: Place) -> VirtualServer | None:
    """Return the virtual server that workers listen for at a place."""
    for address in (place.address, None):
        key = Key(place.family, address, place.protocol, place.port)
        if isinstance(things(program, key).get(place), Forwarding):
            return program.entries[key]
    return None


def _counted(place: Place, told: ServerUsage) -> Iterator[str]:
    what = _what(place.protocol)
    said = [f"{counted(told.open or 0, what)} open", f"{told.so_far} so far"]
    said += [f"{told.denied} denied, for their source"] if told.denied else []
    said += [f"{told.unserved} without an endpoint"] if told.unserved else []
    yield f"{_workers(told.workers)} at {place}: {', '.join(said)}"
    for one in told.endpoints[:MOST_ENDPOINTS]:
        yield f"endpoint {one.endpoint}: {', '.join(_endpoint(one))}"
    if len(told.endpoints) > MOST_ENDPOINTS:
        yield f"and {counted(len(told.endpoints) - MOST_ENDPOINTS, 'endpoint')} more"


def _workers(numbers: Sequence[int]) -> str:
    if not numbers:
        return "no worker listens any more"
    one = len(numbers) == 1
    listed = ", ".join(map(str, numbers))
    return f"worker {listed} listens" if one else f"workers {listed} listen"


def _endpoint(one: EndpointUsage) -> Iterator[str]:
    yield f"{one.open} open"
    yield f"{one.so_far} so far"
    if one.failures:
        yield f"{one.failures} failed"
    for aside in one.set_aside:
        when = f"for {ceil(aside.seconds)} s yet" if aside.seconds else "until the next connection"
        yield f"set aside by worker {aside.worker} {when}"
    if one.departed:
        yield "left, and gets no new connection"


def _passed_over(told: ServerUsage) -> Iterator[tuple[Endpoint, str]]:
    """Yield whom every worker has set aside; of the others, some worker's clients get to them."""
    for one in told.endpoints:
        seconds = [aside.seconds for aside in one.set_aside if aside.seconds]
        if seconds and len(seconds) == len(told.workers):
            yield (
                one.endpoint,
                f"set aside for {ceil(max(seconds))} s yet: {one.failures} failed",
            )


def _of_client(server: VirtualServer, packet: Packet, told: ClientUsage) -> Iterator[str]:
    if told.remembered is not None:
        yield f"affinity remembers the client: to {told.remembered}, for {told.seconds:.0f} s yet"
    elif server.affinity_seconds is not None:
        yield f"{packet.source} is not remembered by affinity"
    what = _what(packet.protocol)
    for one in told.flows:
        yield f"{what}, source port {one.source_port}: to {one.endpoint}"
    if told.open > len(told.flows):
        yield f"and {counted(told.open - len(told.flows), what)} more"
    if not told.open:
        yield f"no {what} of {packet.source} is open here"


def _what(protocol: Protocol) -> str:
    return "session" if protocol is Protocol.UDP else "connection"
