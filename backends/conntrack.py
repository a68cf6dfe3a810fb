"""Connection tracking: which flows there are, forgetting those that lead nowhere, ending others.

Lives here: the questions that the daemon and the dataplanes that translate addresses have, each
answered in a thread. Must not: decide which endpoints live, or when flows are to go
(proxy/stale.py and proxy/departures.py do), or know the form of messages (conntrack_messages.py).
"""

import asyncio
import errno
import functools
import socket
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from ipaddress import ip_address
from typing import ParamSpec, TypeVar

from msgspec import Struct

from vipd.backends import conntrack_messages as messages
from vipd.backends.conntrack_messages import NUMBERS, SEEN_REPLY, Entry, Place
from vipd.backends.netlink import ADDRESS_FAMILY
from vipd.backends.protocol import Departed, Flows
from vipd.proxy.errors import Busy, DataplaneError, UnknownResult, Unsupported
from vipd.proxy.names import Address, Protocol, family_of
from vipd.proxy.virtualserver import Key

REMEDY = "`modprobe nf_conntrack_netlink` (Debian's package linux-image-amd64)"

P = ParamSpec("P")
T = TypeVar("T")
Spot = tuple[Address, int]
"""Address and port of an endpoint."""


class Flow(Struct, frozen=True):
    """A flow as a person is told of it; `state` is that of TCP (enum tcp_conntrack)."""

    client_port: int
    answering: str
    replied: bool
    state: int | None
    seconds: int
    mark: int


async def flows(mark: int, mask: int) -> Flows:
    """Return the live flows of a generation, by original destination, printed as a key is.

    A TCP connection that has ended (TIME_WAIT, CLOSE) is not live.
    """
    return await _in_thread(_flows, mark, mask)


async def entries(source: Address, key: Key) -> Sequence[Flow]:
    """Return the flows from a source to what was a virtual server's address when they began."""
    return await _in_thread(_entries, source, _place(key))


async def forget_stale(
    keys: Collection[Key],
    alive: Callable[[Key], Collection[Spot]],
    own_addresses: Collection[Address] = (),
    left: Collection[Spot] | None = None,
) -> int:
    """Delete the flows of virtual servers that lead nowhere; return how many there were.

    To be asked once they are programmed: NAT looks only at the first packet of an entry. What goes:

    - entries without an answer that are not translated: the client sent before the address was
      served, and would wait until its entry expires, or for ever where it goes on sending. Not
      asked for where `left` is given;
    - what is translated to somebody who is not alive, `left` or, where it is None, whoever. Of TCP
      only what waits for its first answer (SYN_SENT).

    `alive` is called in another thread. `own_addresses` are those that node ports are answered on.
    """
    return await _in_thread(_forget_stale, keys, alive, own_addresses, left)


async def cut(departed: Sequence[Departed]) -> int:
    """Delete the live flows from a virtual server to an endpoint, for each pair; return the number.

    A node port is met at every address: that the flow is translated to the endpoint is enough.
    """
    pairs = {
        (_place(one.key), _place_of(one.address, one.port, one.key.protocol)) for one in departed
    }
    return await _in_thread(_cut, pairs) if pairs else 0


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except OSError as error:
        raise _error(error) from error


def _flows(mark: int, mask: int) -> Flows:
    found: Counter[Place] = Counter()
    for entry in messages.dump(socket.AF_UNSPEC, messages.marked(mark, mask)):
        if _alive(entry):
            found[entry.destination] += 1
    return Flows({_printed(place): count for place, count in found.items()})


def _entries(source: Address, place: Place) -> Sequence[Flow]:
    found = []
    for one in messages.dump(place[0], messages.shared([place])):
        _, client, _, _, port, _ = messages.TUPLE[place[0]].unpack_from(
            one.data, one.start + messages.FIRST
        )
        if one.destination != place or client != source.packed:
            continue
        numbers = {
            kind: _number(one.data[at + 4 : at + 8])
            for kind, at, _ in messages.attributes(one.data, one.start + messages.FIRST, one.end)
        }
        replied = bool(one.status & SEEN_REPLY)
        left, mark = numbers.get(messages.TIMEOUT, 0), numbers.get(messages.MARK, 0)
        found.append(Flow(_number(port), _printed(one.answering), replied, one.state, left, mark))
    return found


def _forget_stale(
    keys: Collection[Key],
    alive: Callable[[Key], Collection[Spot]],
    own_addresses: Collection[Address],
    left: Collection[Spot] | None,
) -> int:
    met_at = {place: key for key in keys for place in _places(key, own_addresses)}

    @functools.cache
    def places_alive(key: Key) -> Collection[Place]:
        return {_place_of(*spot, key.protocol) for spot in alive(key)}

    def stale(entry: Entry) -> bool:
        key = met_at.get(entry.destination)
        if key is None:
            return False
        if entry.answering == entry.destination:
            return left is None and not entry.status & SEEN_REPLY
        opening = entry.state in (None, messages.SYN_SENT)
        return opening and entry.answering not in places_alive(key)

    deleted = 0
    for family in {family for family, *_ in met_at}:
        places = [one for one in met_at if one[0] == family]
        for wanted in _everybody(places) if left is None else _of_those(left, places):
            deleted += messages.delete(family, wanted, stale)
    return deleted


def _everybody(places: Collection[Place]) -> Iterator[bytes]:
    """Yield the filters for all that may be stale of one family."""
    yield messages.shared(places) + messages.unanswered()
    for protocol in (Protocol.UDP, Protocol.SCTP):
        theirs = [one for one in places if one[2] == NUMBERS[protocol]]
        if theirs:
            yield messages.shared(theirs) + messages.answered()


def _of_those(left: Collection[Spot], places: Collection[Place]) -> Iterator[bytes]:
    """Yield the filters for what is answered by those who left, of one family."""
    for number, protocol in messages.PROTOCOLS.items():
        theirs = [one for one in places if one[2] == number]
        spots = [_place_of(*spot, protocol) for spot in left]
        answering = [one for one in spots for place in theirs[:1] if one[0] == place[0]]
        if answering:
            opening = messages.unanswered() if protocol is Protocol.TCP else b""
            yield messages.shared(theirs, answering) + opening


def _cut(pairs: Collection[tuple[Place, Place]]) -> int:
    def departed(entry: Entry) -> bool:
        family, _, number, port = entry.destination
        places = (entry.destination, (family, b"", number, port))
        return any((one, entry.answering) in pairs for one in places) and _alive(entry)

    deleted = 0
    for family in {place[0] for place, _ in pairs}:
        places = [place for place, _ in pairs if place[0] == family]
        answering = [endpoint for place, endpoint in pairs if place[0] == family]
        deleted += messages.delete(family, messages.shared(places, answering), departed)
    return deleted


def _alive(entry: Entry) -> bool:
    return entry.state not in (messages.TIME_WAIT, messages.CLOSE)


def _places(key: Key, own_addresses: Iterable[Address]) -> Iterator[Place]:
    """Yield where a virtual server is met: a node port at each own address."""
    if key.address is not None:
        yield _place(key)
        return
    for address in own_addresses:
        if family_of(address) is key.family:
            yield _place_of(address, key.port, key.protocol)


def _place(key: Key) -> Place:
    """Return a key as the kernel has it; the address of a node port is empty."""
    packed = b"" if key.address is None else key.address.packed
    number = NUMBERS[key.protocol]
    return (ADDRESS_FAMILY[key.family], packed, number, struct.pack(">H", key.port))


def _place_of(address: Address, port: int, protocol: Protocol) -> Place:
    return _place(Key(family_of(address), address, protocol, port))


def _printed(place: Place) -> str:
    family, address, number, port = place
    protocol = messages.PROTOCOLS[number]
    return str(Key(messages.FAMILIES[family], ip_address(address), protocol, _number(port)))


def _number(data: bytes | bytearray) -> int:
    return int.from_bytes(data, "big")


def _error(error: OSError) -> DataplaneError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return Unsupported("CAP_NET_ADMIN", "run as root, or inside `unshare -Urnm`")
    if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT):
        # nfnetlink says EINVAL where it does not know the subsystem and cannot load its module.
        return Unsupported("nf_conntrack_netlink", REMEDY)
    if error.errno in (errno.ENOBUFS, errno.ENOMEM, errno.EBUSY, errno.EAGAIN, errno.EINTR):
        return Busy(f"connection tracking: {error.strerror}")
    return UnknownResult(f"connection tracking: {error.strerror}")
