"""Elements of our maps and sets as the kernel has them: bytes, and the messages that carry them.

Lives here: the encoding of elements, the reading of listings, and the messages that add and delete.
Pure. Must not: send anything (mending.py). `nft --json` takes 2 s of a processor to list 70,000
elements and Python another to read that; this is a fifth of a second, as bytes are compared only.
Source: include/uapi/linux/netfilter/nf_tables.h, net/netfilter/nf_tables_api.c, Linux 6.1.
"""

import socket
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from ipaddress import ip_network
from typing import NamedTuple

from vipd.backends.netlink import DUMP, HEADER, REQUEST, attribute
from vipd.backends.nftables.objects import Container, Element
from vipd.proxy.virtualserver import Endpoint, Key

GENERAL = 20
"""Where attributes begin: after the headers of netlink and of nfnetlink."""
NEW_ELEMENT, GET_ELEMENT, DEL_ELEMENT = 12, 13, 14
_SUBSYSTEM = 10 << 8
_CREATE, _ACK = 0x400, 4
_LIST_TABLE, _LIST_SET, LIST_ELEMENTS = 1, 2, 3  # NFTA_SET_ELEM_LIST_*
KEY, DATA, EXPRESSION, _KEY_END = 1, 2, 7, 10  # NFTA_SET_ELEM_*
VALUE, _VERDICT, _CODE, _CHAIN = 1, 2, 1, 2
_VERDICTS = {"accept": 1, "drop": 0, "jump": -3, "goto": -4}
_PROTOCOLS = {"tcp": b"\x06\0\0\0", "udp": b"\x11\0\0\0", "sctp": b"\x84\0\0\0"}
_MOST_BYTES = 60_000
"""Of elements in one message: the list of them is one attribute, which can have 64 kB."""
_PAIR = struct.Struct("=HH")
_PORT, _SLOT = struct.Struct(">H2x"), struct.Struct("=I")

Held = dict[bytes, bytes]
"""Elements: key (of an interval: its start and its end) to the value, empty in a set."""


class Layout(NamedTuple):
    """How the elements of a container are laid out."""

    key: tuple[str, ...]
    value: tuple[str, ...]
    """Types; a verdict is one of its own."""
    is_interval: bool


def layout(container: Container) -> Layout:
    """Return the layout of a container's elements, from its declaration."""
    said = container.spec.partition(";")[0].removeprefix("type ")
    key, _, value = said.partition(" : ")
    types = tuple(value.split(" . ")) if value else ()
    return Layout(tuple(key.split(" . ")), types, "flags interval" in container.spec)


def encoded(of: Layout, element: Element) -> tuple[bytes, bytes]:
    """Return key and value of an element, as in `Held`."""
    parts = element.key.split(" . ")
    if of.is_interval:
        network = ip_network(parts.pop())
        fields = b"".join(map(_field, of.key, parts))
        end = network.broadcast_address.packed
        return fields + network.network_address.packed + fields + end, b""
    key = b"".join(map(_field, of.key, parts))
    if not of.value:
        return key, b""
    if of.value == ("verdict",):
        return key, _verdict(element.value)
    return key, _value(b"".join(map(_field, of.value, element.value.split(" . "))))


def targets(key: Key, numbered: Iterable[tuple[int, Endpoint]]) -> Iterator[tuple[bytes, bytes]]:
    """Yield what leads from each slot of a virtual server to its endpoint.

    The same as `encoded` of the elements, which are most of all there are, without their text.
    """
    head = place(key)
    for slot, endpoint in numbered:
        target = endpoint.address.packed + _PORT.pack(endpoint.port)
        yield head + _SLOT.pack(slot), _value(target)


def place(key: Key) -> bytes:
    """Return what the keys of all elements of a virtual server begin with."""
    address = b"" if key.address is None else key.address.packed
    return address + _PROTOCOLS[key.protocol.lower()] + _PORT.pack(key.port)


def held(answers: Iterable[bytes]) -> Held:
    """Return the elements that a listing (GET_ELEMENT) tells of."""
    found: Held = {}
    for answer in answers:
        for kind, start, end in spans(answer, GENERAL, len(answer)):
            if kind == LIST_ELEMENTS:
                for _, first, last in spans(answer, start, end):
                    key = value = key_end = b""
                    for what, at, to in spans(answer, first, last):
                        if what == KEY:
                            key = answer[at + 4 : to]  # in an attribute of its own
                        elif what == DATA:
                            value = answer[at:to]
                        elif what == _KEY_END:
                            key_end = answer[at + 4 : to]
                    found[key + key_end] = value
    return found


def listing(family: int, table: str, container: str) -> bytes:
    """Return the message that asks for the elements of a container."""
    return _message(GET_ELEMENT, family, _where(table, container), DUMP)


def changes(
    kind: int, family: int, table: str, container: str, of: Layout, elements: Held
) -> Iterator[bytes]:
    """Yield messages that add (NEW_ELEMENT) or delete (DEL_ELEMENT) elements."""
    part: list[bytes] = []
    size = 0
    for key, value in elements.items():
        one = _element(of, key, value if kind == NEW_ELEMENT else b"")
        if size + len(one) > _MOST_BYTES:
            yield _listed(kind, family, table, container, part)
            part, size = [], 0
        part.append(one)
        size += len(one)
    if part:
        yield _listed(kind, family, table, container, part)


def edge(kind: int) -> bytes:
    """Return the message that begins (16) or ends (17) a transaction."""
    return HEADER.pack(20, kind, REQUEST, 0, 0) + struct.pack(">BBH", 0, 0, 10)


def _listed(kind: int, family: int, table: str, container: str, part: list[bytes]) -> bytes:
    elements = attribute(LIST_ELEMENTS | 0x8000, b"".join(part))
    flags = _ACK | (_CREATE if kind == NEW_ELEMENT else 0)
    return _message(kind, family, _where(table, container) + elements, flags)


def _message(kind: int, family: int, said: bytes, flags: int) -> bytes:
    head = HEADER.pack(GENERAL + len(said), _SUBSYSTEM | kind, REQUEST | flags, 0, 0)
    return head + struct.pack(">BBH", family, 0, 0) + said


def _where(table: str, container: str) -> bytes:
    return attribute(_LIST_TABLE, f"{table}\0".encode()) + attribute(
        _LIST_SET, f"{container}\0".encode()
    )


def _element(of: Layout, key: bytes, value: bytes) -> bytes:
    end = b""
    if of.is_interval:
        middle = len(key) // 2
        key, end = key[:middle], _nested(_KEY_END, _value(key[middle:]))
    said = _nested(KEY, _value(key)) + end + (_nested(DATA, value) if value else b"")
    return _PAIR.pack(len(said) + 4, 1 | 0x8000) + said


def _nested(kind: int, said: bytes) -> bytes:
    return _PAIR.pack(len(said) + 4, kind | 0x8000) + said


def _value(data: bytes) -> bytes:
    """Return data as an attribute; all our fields are multiples of four bytes."""
    return _PAIR.pack(len(data) + 4, VALUE) + data


@lru_cache(maxsize=1024)
def _verdict(text: str) -> bytes:
    word, _, chain = text.partition(" ")
    said = attribute(_CODE, struct.pack(">i", _VERDICTS[word]))
    if chain:
        said += attribute(_CHAIN, f"{chain}\0".encode())
    return attribute(_VERDICT, said)


def _field(kind: str, text: str) -> bytes:
    """Return a field as a register has it: in the kernel's order, filled up to four bytes."""
    if kind == "ipv4_addr":
        return socket.inet_aton(text)
    if kind == "ipv6_addr":
        return socket.inet_pton(socket.AF_INET6, text)
    return _number(kind, text)


@lru_cache(maxsize=4096)
def _number(kind: str, text: str) -> bytes:
    if kind == "inet_proto":
        return _PROTOCOLS[text]
    if kind == "inet_service":
        return _PORT.pack(int(text))
    if kind == "classid":
        high, _, low = text.partition(":")
        return _SLOT.pack(int(high, 16) << 16 | int(low, 16))
    raise ValueError(kind)


def spans(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield type, begin and end of the value of each attribute."""
    unpack = _PAIR.unpack_from
    while start + 4 <= end:
        length, kind = unpack(data, start)
        if length < 4:
            return
        yield kind & 0x3FFF, start + 4, start + length
        start += (length + 3) & ~3
