"""Records of one message, moved to another place in another: names keep their meaning.

Lives here: that, byte by byte. Pure. Must not: know why (tails.py), or which records are wanted.
What is moved was written by this program, so it is well-formed; if it is not, ValueError or
IndexError is raised, and nothing takes longer for it: no name is longer than a name can be, and
nothing is read behind what there is room for.

A name in a message may point to names before it (RFC 1035 4.1.4), by their place. All that were
written are remembered by their place in the old message, so each pointer leads to the same name in
the new one; where that is too far to point to, the name is written out.
"""

from vipd.dns.message import HEADER, record_ends
from vipd.dns.names import LONGEST_LABEL, LONGEST_NAME, starts
from vipd.dns.records import Type
from vipd.dns.replies import FARTHEST

_POINTER = 0xC0
_FIXED_BYTES = 10
"""Type, class, TTL and length of the data, behind the owner."""
_POINTER_BYTES = 2
_SAME_BYTES = 4
"""A pointer as owner, and the type: the same in all records of a set."""
_SHORTEST = _POINTER_BYTES + _FIXED_BYTES
"""Bytes of a record whose owner is a pointer, without its data."""
_NAMES_IN_DATA: dict[int, tuple[int, int]] = {
    Type.NS: (0, 1),
    Type.CNAME: (0, 1),
    Type.SOA: (0, 2),
    Type.PTR: (0, 1),
    Type.MX: (2, 1),
}
"""By type: bytes before the names in the data, and how many names follow. No others are ever
compressed (RFC 3597 4); elsewhere they are bytes as any."""
_WITH_NAMES = frozenset(one.to_bytes(2) for one in _NAMES_IN_DATA)


class Moving:
    """A message that grows. Moves from one other message at a time (`turn_to`)."""

    def __init__(self, key: bytes, first: bytes, room: int) -> None:
        """Begin with a question for `key`, and the records `first`: `room` bytes are behind it."""
        self._begin = HEADER + len(key) + 4
        self._whole = bytearray(HEADER) + key + bytes(4) + first
        self._most = self._begin + room
        self._message = b""
        self._places: dict[int, int] = {}
        """Where names begin: in the other message, and in this one."""
        self.target = HEADER
        """Where the target of the last CNAME stands, or the name of the question."""

    @property
    def sections(self) -> bytes:
        """All behind the question."""
        return bytes(self._whole[self._begin :])

    def turn_to(self, message: bytes, name: bytes) -> int:
        """Go on with a message whose question is for what stands at `target`: `name`.

        Return where its first record is.
        """
        self._message = message
        self._places = {}
        whole, at = self._whole, self.target
        for start in starts(name):
            while whole[at] >= _POINTER:
                at = _pointed(whole, at)
            if at <= FARTHEST:
                self._places[HEADER + start] = at
            after = at + whole[at] + 1
            if whole[at:after].lower() != name[start : start + after - at].lower():
                raise ValueError("a message about another name")
            at = after
        return HEADER + len(name) + 4

    def take(self, at: int, left: int) -> tuple[int, int]:
        """Move the record there, or several of the `left` from there on.

        Return how many, 0 where there is no room for one, and where the next begins.
        """
        message = self._message
        room = self._most - len(self._whole)
        if message[at] >= _POINTER and message[at + 2 : at + 4] not in _WITH_NAMES:
            owner = self._name(at, len(self._whole))
            if len(owner) == _POINTER_BYTES:
                return self._take_set(at, left, owner)
        owner_end, end = record_ends(message, at)
        begin = len(self._whole)
        owner = self._name(at, begin)
        kind = int.from_bytes(message[owner_end : owner_end + 2])
        in_data = _NAMES_IN_DATA.get(kind)
        fixed = message[owner_end : owner_end + _FIXED_BYTES]
        data = message[owner_end + _FIXED_BYTES : end]
        data_begin = begin + len(owner) + _FIXED_BYTES
        if in_data is not None:
            data = self._data(owner_end + _FIXED_BYTES, *in_data, data_begin, end)
            fixed = fixed[:-2] + len(data).to_bytes(2)
        if len(owner) + _FIXED_BYTES + len(data) > room:
            return 0, at
        if kind == Type.CNAME:
            self.target = data_begin
        self._whole += owner + fixed + data
        return 1, end

    def _take_set(self, at: int, left: int, owner: bytes) -> tuple[int, int]:
        """Do as `take` with records whose owner is a pointer, as long as it is the same one.

        What else is in them does not change. Thousands of them are what long replies are made of.
        """
        message, moved = self._message, bytearray()
        room, length = self._most - len(self._whole), len(message)
        theirs, number = message[at : at + _SAME_BYTES], 0
        while number < left and message[at : at + _SAME_BYTES] == theirs:
            end = at + _SHORTEST + (message[at + 10] << 8 | message[at + 11])
            if end > length:
                raise ValueError("cut off")
            if len(moved) + end - at > room:
                break
            moved += owner
            moved += message[at + _POINTER_BYTES : end]
            at = end
            number += 1
        self._whole += moved
        return number, at

    def _data(self, at: int, before: int, names: int, begin: int, end: int) -> bytes:
        data = bytearray(self._message[at : at + before])
        at += before
        for _ in range(names):
            data += self._name(at, begin + len(data))
            at = _name_end(self._message, at)
        return bytes(data) + self._message[at:end]

    def _name(self, at: int, place: int) -> bytes:
        """Return the name that stands at `at`, to stand at `place` of this message."""
        message, places, name = self._message, self._places, bytearray()
        begin = at
        while True:
            while message[at] >= _POINTER:
                at = _pointed(message, at)
                if at >= begin:  # or it could go in circles
                    raise ValueError("a pointer does not lead back")
                begin = at
            known = places.get(at)
            if known is not None:
                return bytes(name) + (_POINTER << 8 | known).to_bytes(2)
            length = message[at]
            if length > LONGEST_LABEL or len(name) + length >= LONGEST_NAME:
                raise ValueError("no name")
            if not length:
                return bytes(name) + b"\x00"
            if place + len(name) <= FARTHEST:
                places[at] = place + len(name)
            name += message[at : at + length + 1]
            at += length + 1


def _pointed(message: bytes | bytearray, at: int) -> int:
    """Return where a pointer leads to."""
    return (message[at] << 8 | message[at + 1]) & FARTHEST


def _name_end(message: bytes, at: int) -> int:
    while length := message[at]:
        if length >= _POINTER:
            return at + 2
        at += length + 1
    return at + 1
