"""A netlink socket that sends many messages at once and reads the answers later.

Lives here: the transport for IPVS (generic netlink), local routes (rtnetlink) and the tables of
nftables (nfnetlink), and how messages are framed. Must not: know what they say. The calls block,
but only for as long as the kernel works.

Each message's acknowledgement is matched to it by its sequence number. The kernel handles a message
while it is sent, so a batch is limited by the receive buffer: one that overflows (ENOBUFS) has lost
acknowledgements, not messages.
"""

import contextlib
import ctypes
import errno
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
from types import TracebackType

from vipd.backends.runs import RUNS
from vipd.proxy.errors import Busy, DataplaneError, OutOfStep, UnknownResult, Unsupported
from vipd.proxy.names import Address, Family

HEADER = struct.Struct("=IHHII")
REQUEST, ACK, EXCLUSIVE, CREATE, REPLACE, DUMP = 0x1, 0x4, 0x200, 0x400, 0x100, 0x300
ERROR, DONE, MULTI = 2, 3, 0x2
AT_ONCE = 64
"""Messages in one sendmsg. Their acknowledgements have to fit the receive buffer."""
_BUFFER = 1 << 20
_SEND_BUFFER = 1 << 20
_SO_SNDBUFFORCE = 32
_LARGEST = 1 << 16
"""Bytes of one answer; the kernel makes none larger than 32 kB for a listing."""
ADDRESS_FAMILY = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_GENERIC, _NETFILTER, _ROUTE = 16, 12, 0
_STRICT_CHECK = 12
_NO_PROCESS = 1 << 31
"""Process ids are less than 2**22 (PID_MAX_LIMIT)."""
_PORTS_TRIED = 16
_SOL_NETLINK = 270

# Instructions of a socket's filter (linux/filter.h), and where a message has its type.
_ATTACH_FILTER = 26
LOAD_HALF, LOAD_BYTE, IS_EQUAL, RETURN = 0x28, 0x30, 0x15, 0x06
DROP, KEEP = (RETURN, 0, 0, 0), (RETURN, 0, 0, 0xFFFFFFFF)
TYPE_AT = 4


class Netlink:
    """One socket of a netlink protocol, in the network namespace of this thread."""

    def __init__(self, protocol: int) -> None:
        """Open it. Raise the DataplaneError that a failure means."""
        try:
            self._socket = _opened(protocol)
        except OSError as error:
            raise _failed(error) from error
        RUNS.note_port(self._socket.getsockname()[0])
        self._number = 0
        self._answers = bytearray(_LARGEST)

    def __enter__(self) -> "Netlink":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def request(self, batch: Sequence[bytes]) -> list[int]:
        """Send messages that ask for an acknowledgement; return the errno of each, 0 for success.

        Raise UnknownResult where acknowledgements were lost.
        """
        results: list[int] = []
        for first in range(0, len(batch), AT_ONCE):
            part = batch[first : first + AT_ONCE]
            start = self._number + 1
            self._number += len(part)
            text = b"".join(
                numbered(start + index, _aligned(one)) for index, one in enumerate(part)
            )
            answers = self._acknowledged(text, start, len(part))
            results += [answers[number] for number in range(start, start + len(part))]
        return results

    def ask(self, message: bytes) -> list[bytes]:
        """Send one message that asks for a listing or an answer; return the messages of it."""
        self._number += 1
        try:
            self._socket.send(numbered(self._number, message))
            return self._listing(self._number)
        except OSError as error:
            raise _failed(error) from error

    def stream(self, message: bytes, seconds: float) -> Iterator[bytes]:
        """Send one message that asks for a listing; yield the messages of it as they come.

        Where what is listed is changed meanwhile, something may be left out, or come twice. Raise
        Busy where it takes longer than `seconds`.
        """
        self._number += 1
        try:
            self._socket.settimeout(seconds)
            self._socket.send(numbered(self._number, message))
            yield from self._streamed(self._number, time.monotonic() + seconds)
        except TimeoutError as error:
            raise Busy(f"netlink: not listed within {seconds:g} s") from error
        except OSError as error:
            raise _failed(error) from error

    def transact(self, messages: Iterable[bytes], begin: bytes, end: bytes) -> None:
        """Send messages in transactions, as many in each as the send buffer takes.

        Raise the DataplaneError of the first that is refused; those before its transaction are
        done then.
        """
        with contextlib.suppress(PermissionError):  # without privileges in the first namespace
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
        most = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
        part: list[bytes] = []
        size = 0
        for one in messages:
            if part and size + len(one) > most:
                self._transact([begin, *part, end])
                part, size = [], 0
            part.append(one)
            size += len(one)
        if part:
            self._transact([begin, *part, end])

    def _transact(self, messages: Sequence[bytes]) -> None:
        first = self._number + 1
        self._number += len(messages)
        text = b"".join(numbered(first + at, _aligned(one)) for at, one in enumerate(messages))
        answers = self._acknowledged(text, first, len(messages) - 2)
        for code in filter(None, answers.values()):
            error = OSError(code, os.strerror(code))
            raise _failed(error) from error

    def strict(self) -> None:
        """Let the kernel honour what a listing asks for (Linux 4.20 and newer)."""
        self._socket.setsockopt(_SOL_NETLINK, _STRICT_CHECK, 1)

    def _acknowledged(self, text: bytes, start: int, count: int) -> dict[int, int]:
        answers: dict[int, int] = {}
        try:
            self._socket.send(text)
            while len(answers) < count:
                for kind, _, number, message in split(self._receive()):
                    if kind == ERROR and number >= start:
                        answers[number] = error_of(message)
        except OSError as error:
            raise _failed(error) from error
        return answers

    def _receive(self) -> bytes:
        size = self._socket.recv_into(self._answers)
        return bytes(self._answers[:size])

    def _streamed(self, wanted: int, until: float) -> Iterator[bytes]:
        while True:
            for kind, _, number, message in split(self._receive()):
                if number != wanted:
                    continue
                if kind in (ERROR, DONE):  # the end of a listing says, too, whether it failed
                    code = error_of(message)
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                yield message
            if time.monotonic() > until:
                raise TimeoutError

    def _listing(self, wanted: int) -> list[bytes]:
        found: list[bytes] = []
        while True:
            for kind, _, number, message in split(self._receive()):
                if number != wanted:
                    continue
                if kind == ERROR:
                    code = error_of(message)
                    if code:
                        raise OSError(code, os.strerror(code))
                    return found
                if kind == DONE:
                    return found
                found.append(message)


def _opened(protocol: int) -> socket.socket:
    """Return a socket with a port that is nobody's process id. Raise OSError.

    Left to itself, the kernel gives the process id as its own PID namespace has it: 1 in many a
    container, so that the port would not tell us from another agent on the node (runs.py).
    """
    made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        for left in reversed(range(_PORTS_TRIED)):
            try:
                made.bind((_NO_PROCESS | int.from_bytes(os.urandom(4)), 0))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not left:
                    raise
    except OSError:
        made.close()
        raise
    return made


def routes() -> Netlink:
    """Return a socket of rtnetlink."""
    return Netlink(_ROUTE)


def netfilter() -> Netlink:
    """Return a socket of nfnetlink."""
    return Netlink(_NETFILTER)


def generic() -> Netlink:
    """Return a socket of generic netlink."""
    return Netlink(_GENERIC)


def let_through(receiving: socket.socket, *program: tuple[int, int, int, int]) -> None:
    """Let the kernel pass only those datagrams to a socket that the filter keeps."""
    text = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    kept = ctypes.create_string_buffer(text, len(text))
    receiving.setsockopt(
        socket.SOL_SOCKET,
        _ATTACH_FILTER,
        struct.pack("@HP", len(program), ctypes.addressof(kept)),
    )


def as_loaded(number: int) -> int:
    """Return a number of 16 bits as a filter loads it: filters think in network order."""
    return socket.htons(number)


def _aligned(message: bytes) -> bytes:
    return message + bytes(-len(message) % 4)


def _failed(error: OSError) -> DataplaneError:
    text = os.strerror(error.errno or 0)
    if error.errno in (errno.EPERM, errno.EACCES):
        return Unsupported("CAP_NET_ADMIN", "run as root, or inside `unshare -Urnm`")
    if error.errno in (errno.ENOENT, errno.ESRCH):
        return OutOfStep(f"netlink: {text}")
    if error.errno in (errno.ENOBUFS, errno.ENOMEM):
        return UnknownResult(f"netlink: {text}")
    if error.errno in (errno.EBUSY, errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENFILE):
        return Busy(f"netlink: {text}")
    return UnknownResult(f"netlink: {text}")


# Framing


def numbered(number: int, message: bytes) -> bytes:
    """Return the message with its sequence number."""
    return message[:8] + number.to_bytes(4, "little") + message[12:]


def attributes(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of netlink attributes from an offset on."""
    while start + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, start)
        if length < 4:
            return
        yield kind & 0x3FFF, data[start + 4 : start + length]
        start += (length + 3) & ~3


def split(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield type, flags, sequence number and all bytes of each message of a datagram."""
    start = 0
    while start + HEADER.size <= len(data):
        length, kind, flags, number, _ = HEADER.unpack_from(data, start)
        if length < HEADER.size:
            return
        yield kind, flags, number, data[start : start + length]
        start += (length + 3) & ~3


def error_of(message: bytes) -> int:
    """Return the errno of an NLMSG_ERROR; 0 for success."""
    return -int(struct.unpack_from("=i", message, HEADER.size)[0])


def attribute(kind: int, value: bytes) -> bytes:
    """Return an attribute."""
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def u16(kind: int, value: int) -> bytes:
    """Return an attribute that is a number of 16 bits."""
    return struct.pack("=HHHxx", 6, kind, value)


def u32(kind: int, value: int) -> bytes:
    """Return an attribute that is a number of 32 bits."""
    return struct.pack("=HHI", 8, kind, value)


def packed(text: str) -> bytes:
    """Return the bytes of an IP address."""
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def address(data: bytes) -> Address:
    """Return the IP address of 4 or 16 bytes."""
    return IPv4Address(data) if len(data) == 4 else IPv6Address(data)
