"""What the daemon and its workers say to each other, as bytes.

Lives here: the messages, and how values of objects.py are written. Pure. Must not: send.
A message is msgpack. Addresses are text in it: a union of address types cannot be decoded.
"""

import msgspec
from msgspec import Struct

from vipd.backends.userspace.objects import Forwarding, Place, Surroundings
from vipd.proxy.model import Algorithm
from vipd.proxy.names import Family, Protocol, parse_address, parse_network
from vipd.proxy.virtualserver import Endpoint

MOST_LISTENERS = 200
"""Listeners in one batch: the kernel passes at most 253 descriptors at once (SCM_MAX_FD)."""

MOST_OF_CLIENT = 10
"""Connections of one client that a report lists."""

WirePlace = tuple[Family, Protocol, str, int]
WireEndpoint = tuple[str, int, int]
"""Address, port, weight."""


class WireForwarding(Struct, array_like=True, frozen=True):
    """A Forwarding; `outside` is None where it is the same as `inside`."""

    owner: str
    inside: tuple[WireEndpoint, ...]
    outside: tuple[WireEndpoint, ...] | None
    algorithm: Algorithm
    affinity_seconds: int | None
    allowed_sources: tuple[str, ...] | None
    sets_aside: bool
    proxy_protocol: bool
    transparent: tuple[str, ...] = ()
    transparent_for_pods: bool = False


class WireSurroundings(Struct, array_like=True, frozen=True):
    """A Surroundings."""

    pods: tuple[str, ...]
    own: tuple[str, ...]
    interface: str = ""


# From the daemon


class Listen(Struct, tag=True, array_like=True):
    """Accept at this place, on the next descriptor that came with the batch."""

    place: WirePlace
    forwarding: WireForwarding


class Change(Struct, tag=True, array_like=True):
    """Serve a place in another way from now on."""

    place: WirePlace
    forwarding: WireForwarding


class Stop(Struct, tag=True, array_like=True):
    """Take nothing new at this place; what is open goes on.

    `at_once`: sessions of UDP end as well, for another worker to take their clients. As long as a
    socket is open for them, the kernel sends it datagrams of new clients too.
    """

    place: WirePlace
    at_once: bool = False


class Cut(Struct, tag=True, array_like=True):
    """End what is open at this place to an endpoint."""

    place: WirePlace
    endpoint: WireEndpoint


Instruction = Listen | Change | Stop | Cut


class Batch(Struct, tag=True, array_like=True):
    """Do these in order, and say `Done` with the same number."""

    number: int
    instructions: list[Instruction]
    surroundings: WireSurroundings | None = None


class Tell(Struct, tag=True, array_like=True):
    """Say `Told`."""


class HandOver(Struct, tag=True, array_like=True):
    """Give away the listeners of these places, open: say `HandedOver`, with descriptors."""

    places: list[WirePlace]


class Count(Struct, tag=True, array_like=True):
    """Say `Counted`."""


class Report(Struct, tag=True, array_like=True):
    """Say `Reported`: of these places, and what is known there of a client, if one is named."""

    places: list[WirePlace]
    client: str = ""


class Retire(Struct, tag=True, array_like=True):
    """Take nothing new anywhere, and end when nothing is open any more."""


class Pause(Struct, tag=True, array_like=True):
    """Accept no connection, and stay. Places of UDP stay as they are.

    The kernel spreads datagrams over the sockets of a place by their number and order, so none may
    go as long as one has a session. Clients that another dataplane serves do not come here anyway.
    """


class Resume(Struct, tag=True, array_like=True):
    """Go on after a pause: say `Told`."""


class Quit(Struct, tag=True, array_like=True):
    """End, with everything that is open."""


Request = Batch | Tell | Count | Report | HandOver | Retire | Pause | Resume | Quit


# From a worker


class Done(Struct, tag=True, array_like=True):
    """A batch is done, but for these."""

    number: int
    failed: list[tuple[WirePlace, str]]
    cut: int = 0
    """How many connections and sessions were ended by it."""
    short: list[tuple[WirePlace, str]] = []
    """What failed for want of a descriptor: it may be given again soon."""


class ServedPlace(Struct, array_like=True, frozen=True):
    """How a worker serves a place."""

    place: WirePlace
    forwarding: WireForwarding


class Told(Struct, tag=True, array_like=True):
    """What a worker is and serves; `retired`: it only ends what is open."""

    version: str
    pid: int
    number: int
    retired: bool
    surroundings: WireSurroundings
    places: list[ServedPlace]
    transparent: bool = False
    """Whether it may show clients' addresses to endpoints."""
    files: int = 0
    """How many files it may have open."""


class EndpointReport(Struct, array_like=True, frozen=True):
    """What a worker has counted of an endpoint since it began to serve the place."""

    address: str
    port: int
    connections: int
    """Open now; sessions for UDP."""
    so_far: int
    failures: int
    """Refused or timed out."""
    set_aside_seconds: float | None
    """For how long yet; 0: it gets the next connection, as a trial. None: it is in use."""
    departed: bool
    """No endpoint of the place any more; its connections go on."""


class ClientReport(Struct, array_like=True, frozen=True):
    """What a worker knows of one client at a place."""

    remembered: tuple[str, int] | None
    """Where affinity sends it."""
    seconds: float
    """For how long yet."""
    connections: list[tuple[int, str, int]]
    """Source port and endpoint of each that is open, at most MOST_OF_CLIENT."""
    open: int


class PlaceReport(Struct, array_like=True, frozen=True):
    """What a worker does at a place; counted since it began to serve it."""

    place: WirePlace
    listens: bool
    """False: it only ends what is open."""
    connections: int
    so_far: int
    denied: int
    """Connections of sources that are not allowed."""
    unserved: int
    """Connections for which no endpoint was left."""
    endpoints: list[EndpointReport]
    """Those of which there is anything to say."""
    of_client: ClientReport | None = None
    remembered: int = 0
    """Clients that are remembered for affinity."""
    forgotten: int = 0
    """Clients that were forgotten before their time, for lack of room."""


class Reported(Struct, tag=True, array_like=True):
    """What a worker does in all, and at places."""

    number: int
    pid: int
    retired: bool
    seconds: float
    """Since it began."""
    listeners: int
    connections: int
    counters: dict[str, int]
    places: list[PlaceReport]
    files: int = 0
    """How many it may have open."""
    full: bool = False
    """It accepts no connection now, for lack of room."""


class Counted(Struct, tag=True, array_like=True):
    """Connections and sessions that are open, where there are any."""

    open: list[tuple[WirePlace, int]]


class HandedOver(Struct, tag=True, array_like=True):
    """These listeners come as descriptors beside, in this order."""

    places: list[WirePlace]


Answer = Done | Told | Counted | Reported | HandedOver

_REQUEST: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_ANSWER: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
encode = msgspec.msgpack.Encoder().encode
"""Return the bytes of a message."""


def request_of(data: bytes) -> Request:
    """Return the request that bytes are."""
    return _REQUEST.decode(data)


def answer_of(data: bytes) -> Answer:
    """Return the answer that bytes are."""
    return _ANSWER.decode(data)


def wire_place(place: Place) -> WirePlace:
    """Return a place as it is sent."""
    return (place.family, place.protocol, str(place.address), place.port)


def place_of(told: WirePlace) -> Place:
    """Return the place that was sent."""
    return Place(told[0], told[1], parse_address(told[2]), told[3])


def wire_endpoint(one: Endpoint) -> WireEndpoint:
    """Return an endpoint as it is sent."""
    return (str(one.address), one.port, one.weight)


def endpoint_of(told: WireEndpoint) -> Endpoint:
    """Return the endpoint that was sent."""
    return Endpoint(parse_address(told[0]), told[1], told[2])


def wire_forwarding(one: Forwarding) -> WireForwarding:
    """Return a forwarding as it is sent."""
    sources = one.allowed_sources
    return WireForwarding(
        one.owner,
        tuple(map(wire_endpoint, one.inside)),
        None if one.outside == one.inside else tuple(map(wire_endpoint, one.outside)),
        one.algorithm,
        one.affinity_seconds,
        None if sources is None else tuple(map(str, sources)),
        one.sets_aside,
        one.proxy_protocol,
        tuple(map(str, one.transparent)),
        one.transparent_for_pods,
    )


def forwarding_of(told: WireForwarding) -> Forwarding:
    """Return the forwarding that was sent."""
    inside = tuple(map(endpoint_of, told.inside))
    sources = told.allowed_sources
    return Forwarding(
        owner=told.owner,
        inside=inside,
        outside=inside if told.outside is None else tuple(map(endpoint_of, told.outside)),
        algorithm=told.algorithm,
        affinity_seconds=told.affinity_seconds,
        allowed_sources=None if sources is None else tuple(map(parse_network, sources)),
        sets_aside=told.sets_aside,
        proxy_protocol=told.proxy_protocol,
        transparent=tuple(map(parse_address, told.transparent)),
        transparent_for_pods=told.transparent_for_pods,
    )


def wire_surroundings(one: Surroundings) -> WireSurroundings:
    """Return surroundings as they are sent."""
    return WireSurroundings(tuple(map(str, one.pods)), tuple(map(str, one.own)), one.interface)


def surroundings_of(told: WireSurroundings) -> Surroundings:
    """Return the surroundings that were sent."""
    pods, own = map(parse_network, told.pods), map(parse_address, told.own)
    return Surroundings(tuple(pods), tuple(own), told.interface)
