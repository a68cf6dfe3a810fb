"""What the elements of our maps have counted, asked of the kernel itself.

Lives here: the listing of a map, read as it comes, and whose each element is. Must not: add up, or
change anything.

`nft --json` of 50,000 elements takes seconds and 100s of MB; this is one netlink dump, of which no
more than one datagram is held. The kernel walks the map from its beginning for each datagram of
32 kB (nf_tables_dump_set() in net/netfilter/nf_tables_api.c, Linux 6.18), so the time grows with
the square of the size: hence the limit. A dump holds no lock that a commit waits for.
"""

import struct
import time
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from socket import AF_INET, AF_INET6, inet_ntop
from typing import NamedTuple

from vipd.backends import netlink
from vipd.backends.counts import Count, Outcome, Take
from vipd.backends.netlink import ADDRESS_FAMILY, attributes
from vipd.backends.nftables import raw
from vipd.backends.nftables.objects import TABLE
from vipd.proxy.errors import OutOfStep
from vipd.proxy.names import Family
from vipd.proxy.virtualserver import Refusal, VirtualServer

_EXPRESSION_NAME, _EXPRESSION_DATA = 1, 2
_PACKETS = 2  # NFTA_COUNTER_PACKETS
_COUNTER = b"counter\0"


class Counted(NamedTuple):
    """An element: its key, what it maps to (empty where that is a verdict), packets met."""

    key: bytes
    value: bytes
    packets: int


class _Layout(NamedTuple):
    """Where in an element of some length its parts are; `form` takes one apart."""

    form: struct.Struct
    has_value: bool


def read(servers: Collection[VirtualServer], take: Take, seconds: float) -> None:
    """Read what the maps have counted of these virtual servers (see Tallying)."""
    until = time.monotonic() + seconds
    for family in Family:
        of_family = [one for one in servers if one.key.family is family]
        for prefix, owned in (
            ("", {raw.place(one.key): one for one in of_family if one.key.address is not None}),
            (
                "node-port-",
                {raw.place(one.key): one for one in of_family if one.key.address is None},
            ),
        ):
            if not owned:
                continue
            listing = _Listing(family, owned, until)
            take(listing.endpoints(f"{prefix}endpoints"))
            take(listing.refused(f"{prefix}no-endpoints"))
            if any(one.allowed_sources is not None for one in owned.values()):
                take(listing.asked("services" if not prefix else "node-ports", Outcome.ASKED))
                take(listing.asked("admitted", Outcome.ADMITTED))


class _Listing:
    """Lists maps of a family's table; `owned` are virtual servers by their key as maps have it."""

    def __init__(self, family: Family, owned: Mapping[bytes, VirtualServer], until: float) -> None:
        self._family = family
        self._owned = owned
        self._until = until
        self._length = len(next(iter(owned)))

    def endpoints(self, name: str) -> Iterator[Count]:
        six = self._family is Family.IPV6
        size, kind = (16, AF_INET6) if six else (4, AF_INET)
        for key, value, packets in self._elements(name):
            server = self._owned.get(key[: self._length])
            if server is None or not packets:
                continue
            host, port = inet_ntop(kind, value[:size]), int.from_bytes(value[size : size + 2])
            endpoint = f"[{host}]:{port}" if six else f"{host}:{port}"
            # Another endpoint in the same slot is another counter.
            yield Count((name, key, value), server.owner, endpoint, Outcome.GIVEN, packets)

    def refused(self, name: str) -> Iterator[Count]:
        for key, _, packets in self._elements(name):
            server = self._owned.get(key)
            if server is not None and packets:
                dropped = server.when_empty is Refusal.DROP
                outcome = Outcome.DROPPED if dropped else Outcome.REJECTED
                yield Count((name, key, self._family), server.owner, "", outcome, packets)

    def asked(self, name: str, outcome: Outcome) -> Iterator[Count]:
        for key, _, packets in self._elements(name):
            server = self._owned.get(key)
            if server is not None and server.allowed_sources is not None and packets:
                yield Count((name, key, self._family), server.owner, "", outcome, packets)

    def _elements(self, name: str) -> Iterator[Counted]:
        number = ADDRESS_FAMILY[self._family]
        left = max(0.001, self._until - time.monotonic())
        with netlink.netfilter() as socket:
            try:
                for message in socket.stream(raw.listing(number, TABLE, name), left):
                    yield from elements(message)
            except OutOfStep:
                return  # there is no such map: nothing is programmed


def elements(message: bytes) -> Iterator[Counted]:
    """Yield the elements of a message that have a counter."""
    start, end = _list_of(message)
    while start < end:
        length = int.from_bytes(message[start : start + 2], "little")
        if length < 4:
            return
        layout = _layout(message[start : start + length])
        if layout is None:
            start += (length + 3) & ~3
            continue
        # As a rule all elements of a map are built alike, and are taken apart in one go.
        form, has_value = layout
        whole = (end - start) // form.size * form.size
        taken = 0
        for found, key, *rest in form.iter_unpack(message[start : start + whole]):
            value, name, packets = rest if has_value else (b"", *rest)
            if found != length or name != _COUNTER:
                break
            taken += form.size
            yield Counted(key, value, int.from_bytes(packets))
        start += taken or (length + 3) & ~3


def _list_of(message: bytes) -> tuple[int, int]:
    """Return where the list of elements begins and ends."""
    for kind, start, end in raw.spans(message, raw.GENERAL, len(message)):
        if kind == raw.LIST_ELEMENTS:
            return start, end
    return 0, 0


@lru_cache(maxsize=256)
def _layout(element: bytes) -> _Layout | None:
    """Return where the parts of an element are; None where it has no counter."""
    parts = {kind: (at, value) for kind, at, value in _nested(element, 4)}
    if raw.KEY not in parts or raw.EXPRESSION not in parts:
        return None
    at, expression = parts[raw.EXPRESSION]
    inside = {kind: (at + 4 + place, value) for kind, place, value in _nested(expression, 0)}
    if inside.get(_EXPRESSION_NAME, (0, b""))[1] != _COUNTER:
        return None
    name_at = inside[_EXPRESSION_NAME][0] + 4
    data_at, data = inside.get(_EXPRESSION_DATA, (0, b""))
    places = {kind: (data_at + 4 + place, value) for kind, place, value in _nested(data, 0)}
    key = _value(parts[raw.KEY])
    value = _value(parts[raw.DATA]) if raw.DATA in parts else None
    if key is None or _PACKETS not in places:
        return None
    wanted = [key, *([] if value is None else [value])]
    wanted += [(name_at, len(_COUNTER)), (places[_PACKETS][0] + 4, 8)]
    form, reached = "=H", 2
    for place, size in wanted:
        if place < reached:
            return None
        form += f"{place - reached}x{size}s"
        reached = place + size
    length = (len(element) + 3) & ~3
    return _Layout(struct.Struct(f"{form}{length - reached}x"), value is not None)


def _value(data: tuple[int, bytes]) -> tuple[int, int] | None:
    """Return where the value of NFTA_SET_ELEM_KEY or DATA is and its length; None: a verdict."""
    at, inside = data
    return next(
        (
            (at + 4 + place + 4, len(value))
            for kind, place, value in _nested(inside, 0)
            if kind == raw.VALUE
        ),
        None,
    )


def _nested(data: bytes, start: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield type, place and value of attributes."""
    at = start
    for kind, value in attributes(data, start):
        yield kind, at, value
        at += (len(value) + 4 + 3) & ~3
