"""Sets of ipset: made, filled, listed and removed over netlink.

Lives here: the one file that speaks to ipset, for the iptables and IPVS backends. Must not: touch a
set that it was not told the name of, or know what sets are for.

A thousand entries go into a message (the ADT attribute, what `ipset restore` uses): 50,000 take
0.2 s. Not through pyroute2, which puts one into a message (11 s), and whose import is 9 MB of the
daemon. Commands, attributes and error numbers: include/uapi/linux/netfilter/ipset/ip_set.h.

An entry is text, as `ipset list` prints it: parts that are joined by commas, each an address, a
network, or ``protocol:port``; such as ``10.0.0.1,tcp:80,10.0.0.0/8``.
"""

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from ipaddress import IPv6Address

from msgspec import Struct

from vipd.backends.netlink import ADDRESS_FAMILY, attribute, attributes
from vipd.proxy.errors import (
    Busy,
    DataplaneError,
    OutOfStep,
    Rejected,
    UnknownResult,
    Unsupported,
)
from vipd.proxy.names import Family

AT_ONCE = 500
"""Entries in one message, which can have 64 kB; the longest entry takes 84 bytes."""
LONGEST_NAME = 31

_NETFILTER = 12
_SUBSYSTEM = 6
_CREATE, _DESTROY, _SWAP, _LIST, _ADD, _DELETE, _TYPE = 2, 3, 6, 7, 9, 10, 13
_REQUEST, _ACK, _EXCLUSIVE, _DUMP = 1, 4, 0x200, 0x300
_ERROR, _DONE = 2, 3
_PROTOCOL, _SETNAME, _TYPENAME, _REVISION, _FAMILY, _FLAGS, _DATA, _ADT, _LINENO = range(1, 10)
_OTHER_NAME = 3
"""The same number as TYPENAME, for the second name of SWAP."""
_IP, _CIDR, _PORT, _PORT_TO, _TIMEOUT, _PROTO = 1, 3, 4, 5, 6, 7
_MOST_ENTRIES, _IP2, _CIDR2 = 19, 20, 21
_NESTED, _NETWORK_ORDER = 0x8000, 0x4000
_NAMES_ONLY = 2
_VERSION = 6
_PROTOCOLS = {"tcp": 6, "udp": 17, "udplite": 136, "sctp": 132, "icmp": 1, "icmpv6": 58}
_PROTOCOL_NAMES = {number: name for name, number in _PROTOCOLS.items()}
_FULL = 4352
_ERRORS = {
    4097: "an entry of another form than the set holds",
    4099: "no room for another set",
    4102: "the sets are of different types",
    4103: "the entry is there already, or is not there",
    4104: "not a prefix length",
    4106: "not a family for this type",
    4107: "the set has no time-outs",
    4108: "the set is used by a rule",
    4111: "not an IPv4 address",
    4112: "not an IPv6 address",
    _FULL: "Set is full, more elements cannot be added",
    4353: "an entry that the type cannot hold",
    4354: "not a protocol that has ports",
}
_FIND_TYPE, _BUSY, _NO_OTHER = 4098, 4100, 4101


class SetSpec(Struct, frozen=True):
    """A set: `type` as in ``ipset create``, such as ``hash:ip,port``.

    `timeout` are the seconds that an entry lives unless told otherwise; None: for ever.
    """

    name: str
    type: str
    family: Family = Family.IPV4
    size: int = 65536
    """How many entries it can have at most (ipset's maxelem)."""
    timeout: int | None = None

    @property
    def command(self) -> str:
        """Return the command that makes it, as ipset would be told."""
        family = "" if self.type.startswith("bitmap:") else f" family inet{self._six}"
        options = f" maxelem {self.size}" if self.type.startswith("hash:") else ""
        options += f" timeout {self.timeout}" if self.timeout is not None else ""
        return f"create {self.name} {self.type}{family}{options}"

    @property
    def _six(self) -> str:
        return "6" if self.family is Family.IPV6 else ""


class IpSets:
    """ipset in the network namespace of this process; every call names the sets it is about."""

    async def create(self, spec: SetSpec) -> None:
        """Make a set, or do nothing where it is there just so.

        Raise Rejected where a set of that name has another type or other options.
        """
        try:
            with _netlink() as connection:
                code = _ask(connection, _CREATE, _creation(spec, _revision(connection, spec)))
        except OSError as error:
            code = error.errno or 0
        if code == errno.EEXIST:
            why = "a set of this name is there with another type or other options"
            raise Rejected(spec.command, why)
        if code:
            raise _error(code, spec.command, spec.type)

    async def destroy(self, name: str) -> bool:
        """Remove a set; return False where there is none. Raise Busy while a rule uses it."""
        # Not exclusively, it would be no error where there is none (net/netfilter/ipset).
        code = _alone(_DESTROY, _named(name), _EXCLUSIVE)
        if code == errno.ENOENT:
            return False
        if code:
            raise _error(code, f"destroy {name}")
        return True

    async def swap(self, one: str, other: str) -> None:
        """Exchange the content of two sets of one type; rules that name them see it at once."""
        both = _named(one) + attribute(_OTHER_NAME, other.encode() + b"\0")
        if code := _alone(_SWAP, both):
            raise _error(code, f"swap {one} {other}")

    async def add(self, name: str, entries: Iterable[str]) -> dict[str, DataplaneError]:
        """Add entries; return those that the set did not take, each with the reason.

        What is there already stays. Everything that is not returned is in the set.
        """
        return await self._change(_ADD, "add", name, list(entries))

    async def delete(self, name: str, entries: Iterable[str]) -> dict[str, DataplaneError]:
        """Delete entries; return those that could not be. What is not there is no error."""
        return await self._change(_DELETE, "del", name, list(entries))

    async def entries(self, name: str) -> set[str] | None:
        """Return the entries of a set, or None where there is no such set."""
        found: set[str] = set()
        request = attribute(_SETNAME, name.encode() + b"\0")
        try:
            async for message in _listing(request):
                data = dict(attributes(message, 20)).get(_ADT, b"")
                found.update(
                    _entry_text(dict(attributes(one, 0))) for _, one in attributes(data, 0)
                )
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise _error(error.errno or 0, f"list {name}") from error
        return found

    async def names(self) -> set[str]:
        """Return the names of all sets there are. Needs CAP_NET_ADMIN, as everything here."""
        found: set[str] = set()
        request = attribute(_FLAGS | _NETWORK_ORDER, struct.pack(">I", _NAMES_ONLY))
        try:
            async for message in _listing(request):
                name = dict(attributes(message, 20)).get(_SETNAME, b"")
                found.add(name.rstrip(b"\0").decode(errors="replace"))
        except OSError as error:
            raise _error(error.errno or 0, "list -name") from error
        return found

    async def _change(
        self, command: int, verb: str, name: str, entries: Sequence[str]
    ) -> dict[str, DataplaneError]:
        rejected: dict[str, DataplaneError] = {}
        try:
            with _netlink() as connection:
                start = 0
                while start < len(entries):
                    part = entries[start : start + AT_ONCE]
                    code, done = _send(connection, command, name, part)
                    start += done
                    if code == _FULL:
                        error = _error(code, f"{verb} {name}")
                        rejected.update(dict.fromkeys(entries[start:], error))
                        break
                    if code and not done < len(part):
                        raise _error(code, f"{verb} {name}")
                    if code in (errno.ENOENT, errno.EPERM, errno.ENOMEM, errno.EOPNOTSUPP):
                        raise _error(code, f"{verb} {name}")
                    if code:
                        operation = f"{verb} {name} {entries[start]}"
                        rejected[entries[start]] = _error(code, operation)
                        start += 1
                    await asyncio.sleep(0)
        except OSError as error:
            raise _error(error.errno or 0, f"{verb} {name}") from error
        return rejected


def _netlink() -> socket.socket:
    connection = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER)
    connection.bind((0, 0))
    return connection


def _message(command: int, flags: int, said: bytes) -> bytes:
    return (
        struct.pack("=IHHIIBBH", 20 + len(said), _SUBSYSTEM << 8 | command, flags, 1, 0, 2, 0, 0)
        + said
    )


def _named(name: str) -> bytes:
    return attribute(_PROTOCOL, bytes([_VERSION])) + attribute(_SETNAME, name.encode() + b"\0")


def _alone(command: int, said: bytes, flags: int = 0) -> int:
    """Give one command on a socket of its own; return an error number or 0."""
    try:
        with _netlink() as connection:
            return _ask(connection, command, said, flags)
    except OSError as error:
        return error.errno or errno.EIO


def _ask(connection: socket.socket, command: int, said: bytes, flags: int = 0) -> int:
    """Give one command; return an error number or 0."""
    connection.send(_message(command, _REQUEST | _ACK | flags, said))
    answer = connection.recv(1 << 17)
    if struct.unpack_from("=H", answer, 4)[0] != _ERROR:
        raise UnknownResult("ipset answers with something else than a result")
    return -int(struct.unpack_from("=i", answer, 16)[0])


def _revision(connection: socket.socket, spec: SetSpec) -> int:
    """Return the newest revision that the kernel knows of the type: CREATE has to name it."""
    said = (
        attribute(_PROTOCOL, bytes([_VERSION]))
        + attribute(_TYPENAME, spec.type.encode() + b"\0")
        + attribute(_FAMILY, bytes([_family(spec)]))
    )
    connection.send(_message(_TYPE, _REQUEST, said))
    answer = connection.recv(1 << 17)
    if struct.unpack_from("=H", answer, 4)[0] == _ERROR:
        raise OSError(-struct.unpack_from("=i", answer, 16)[0], "")
    revision = dict(attributes(answer, 20)).get(_REVISION)
    if not revision:
        raise UnknownResult(f"ipset does not tell its revision of {spec.type}")
    return revision[0]


def _creation(spec: SetSpec, revision: int) -> bytes:
    data = b""
    if spec.type.startswith("hash:"):
        data += _number(_MOST_ENTRIES, spec.size)
    if spec.timeout is not None:
        data += _number(_TIMEOUT, spec.timeout)
    if spec.type == "bitmap:port":
        data += attribute(_PORT | _NETWORK_ORDER, struct.pack(">H", 0))
        data += attribute(_PORT_TO | _NETWORK_ORDER, struct.pack(">H", 65535))
    return (
        _named(spec.name)
        + attribute(_TYPENAME, spec.type.encode() + b"\0")
        + attribute(_REVISION, bytes([revision]))
        + attribute(_FAMILY, bytes([_family(spec)]))
        + attribute(_DATA | _NESTED, data)
    )


def _family(spec: SetSpec) -> int:
    return ADDRESS_FAMILY[spec.family] if spec.type.startswith("hash:") else socket.AF_UNSPEC


def _number(kind: int, value: int) -> bytes:
    return attribute(kind | _NETWORK_ORDER, struct.pack(">I", value))


def _send(
    connection: socket.socket, command: int, name: str, entries: Sequence[str]
) -> tuple[int, int]:
    """Send entries in one message; return an error number or 0, and how many were done before it.

    Raise ValueError for a text that is no entry.
    """
    # The kernel writes the number of the entry at fault into the first LINENO of its answer.
    head = _named(name) + attribute(_LINENO, bytes(4))
    data = b"".join(_entry(text, number) for number, text in enumerate(entries, 1))
    connection.send(_message(command, _REQUEST | _ACK, head + attribute(_ADT | _NESTED, data)))
    answer = connection.recv(1 << 17)
    kind = struct.unpack_from("=H", answer, 4)[0]
    if kind != _ERROR:
        raise UnknownResult(f"ipset answers with a message of type {kind}")
    code = -struct.unpack_from("=i", answer, 16)[0]
    if not code:
        return 0, len(entries)
    # header, error, then our message: its header and attributes
    line = 0
    if len(answer) >= 20 + 20 + len(head):
        line = struct.unpack_from("=I", answer, 20 + 20 + len(head) - 4)[0]
    return code, line - 1 if line else len(entries)


async def _listing(request: bytes) -> AsyncIterator[bytes]:
    """Yield each message of a listing."""
    with _netlink() as connection:
        version = attribute(_PROTOCOL, bytes([_VERSION]))
        connection.send(_message(_LIST, _REQUEST | _ACK | _DUMP, version + request))
        while True:
            answer = connection.recv(1 << 17)
            at = 0
            while at < len(answer):
                length, kind = struct.unpack_from("=IH", answer, at)
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    code = -struct.unpack_from("=i", answer, at + 16)[0]
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                yield answer[at : at + length]
                at += length + 3 & ~3
            await asyncio.sleep(0)


def _entry(text: str, number: int) -> bytes:
    data = b""
    where, prefix = _IP, _CIDR
    for part in text.split(","):
        protocol, colon, port = part.partition(":")
        if colon and protocol in _PROTOCOLS:
            data += struct.pack(
                "=HHB3xHH", 5, _PROTO, _PROTOCOLS[protocol], 6, _PORT | _NETWORK_ORDER
            ) + struct.pack(">H2x", int(port))
        elif part.isdecimal():
            data += struct.pack("=HH", 6, _PORT | _NETWORK_ORDER) + struct.pack(">H2x", int(part))
        else:
            address, _, length = part.partition("/")
            data += _address(where, address)
            if length:
                data += struct.pack("=HHB3x", 5, prefix, int(length))
            where, prefix = _IP2, _CIDR2
    data += struct.pack("=HHI", 8, _LINENO, number)
    return struct.pack("=HH", 4 + len(data), _DATA | _NESTED) + data


def _address(where: int, text: str) -> bytes:
    try:
        if ":" in text:
            raw = socket.inet_pton(socket.AF_INET6, text)
            return struct.pack("=HHHH", 24, where | _NESTED, 20, 2 | _NETWORK_ORDER) + raw
        raw = socket.inet_pton(socket.AF_INET, text)
    except OSError:
        raise ValueError(f"{text!r} is no address") from None
    return struct.pack("=HHHH", 12, where | _NESTED, 8, 1 | _NETWORK_ORDER) + raw


def _entry_text(told: dict[int, bytes]) -> str:
    """Return an entry as `ipset list` prints it, without its options."""
    parts = []
    if _IP in told:
        parts.append(_address_text(told[_IP], told.get(_CIDR)))
    if _PORT in told:
        port = str(struct.unpack_from(">H", told[_PORT])[0])
        if _PROTO in told:
            number = told[_PROTO][0]
            port = f"{_PROTOCOL_NAMES.get(number, number)}:{port}"
        parts.append(port)
    if _IP2 in told:
        parts.append(_address_text(told[_IP2], told.get(_CIDR2)))
    return ",".join(parts)


def _address_text(data: bytes, prefix: bytes | None) -> str:
    raw = data[4:]
    family, whole = (socket.AF_INET6, 128) if len(raw) == 16 else (socket.AF_INET, 32)
    text = socket.inet_ntop(family, raw)
    if len(raw) == 16 and "." in text:
        text = str(IPv6Address(raw))  # inet_ntop and Python differ on IPv4-mapped addresses
    return text if prefix is None or prefix[0] == whole else f"{text}/{prefix[0]}"


def _error(code: int, operation: str, kind: str = "") -> DataplaneError:
    why = _ERRORS.get(code) or (os.strerror(code) if code < 4096 else f"ipset's error {code}")
    if code == _FIND_TYPE:
        module = "ip_set_" + kind.replace(":", "_").replace(",", "")
        return Unsupported(
            f"ipset type {kind}", f"`modprobe {module}` (Debian's package linux-image-amd64)"
        )
    if code in (errno.EPERM, errno.EACCES):
        return Unsupported("CAP_NET_ADMIN", "run as root, or inside `unshare -Urnm`")
    if code in (errno.EOPNOTSUPP, errno.EINVAL) and operation.startswith("list -name"):
        return Unsupported("ipset", "`modprobe ip_set` (Debian's package linux-image-amd64)")
    if code in (_BUSY, errno.EBUSY, errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EINTR):
        return Busy(f"ipset {operation}: {why if code < 4096 else 'it is in use'}")
    if code in (errno.ENOENT, _NO_OTHER):
        return OutOfStep(f"ipset {operation}: there is no such set")
    return Rejected(f"ipset {operation}", why)
