"""A netlink socket that sends many messages at once and reads the answers later.

Lives here: the transport for IPVS (generic netlink) and local routes (rtnetlink). Must not: know
what the messages say (messages.py). The calls block, but only for as long as the kernel works.

Each message's acknowledgement is matched to it by its sequence number. The kernel handles a message
while it is sent, so a batch is limited by the receive buffer: one that overflows (ENOBUFS) has lost
acknowledgements, not messages.
"""

import errno
import os
import socket
from collections.abc import Sequence
from types import TracebackType

from vipd.backends.ipvs import messages
from vipd.proxy.errors import Busy, DataplaneError, OutOfStep, UnknownResult, Unsupported

AT_ONCE = 64
"""Messages in one sendmsg. Their acknowledgements have to fit the receive buffer."""
_BUFFER = 1 << 20
_LARGEST = 1 << 16
"""Bytes of one answer; the kernel makes none larger than 32 kB for a listing."""
_GENERIC, _ROUTE = 16, 0
_STRICT_CHECK = 12
_SOL_NETLINK = 270


class Netlink:
    """One socket of a netlink protocol, in the network namespace of this thread."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        self._socket.bind((0, 0))
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
                messages.numbered(start + index, _aligned(one)) for index, one in enumerate(part)
            )
            answers = self._acknowledged(text, start, len(part))
            results += [answers[number] for number in range(start, start + len(part))]
        return results

    def ask(self, message: bytes) -> list[bytes]:
        """Send one message that asks for a listing or an answer; return the messages of it."""
        self._number += 1
        try:
            self._socket.send(messages.numbered(self._number, message))
            return self._listing(self._number)
        except OSError as error:
            raise _failed(error) from error

    def strict(self) -> None:
        """Let the kernel honour what a listing asks for (Linux 4.20 and newer)."""
        self._socket.setsockopt(_SOL_NETLINK, _STRICT_CHECK, 1)

    def _acknowledged(self, text: bytes, start: int, count: int) -> dict[int, int]:
        answers: dict[int, int] = {}
        try:
            self._socket.send(text)
            while len(answers) < count:
                for kind, _, number, message in messages.split(self._receive()):
                    if kind == messages.ERROR and number >= start:
                        answers[number] = messages.error_of(message)
        except OSError as error:
            raise _failed(error) from error
        return answers

    def _receive(self) -> bytes:
        size = self._socket.recv_into(self._answers)
        return bytes(self._answers[:size])

    def _listing(self, wanted: int) -> list[bytes]:
        found: list[bytes] = []
        while True:
            for kind, _, number, message in messages.split(self._receive()):
                if number != wanted:
                    continue
                if kind == messages.ERROR:
                    code = messages.error_of(message)
                    if code:
                        raise OSError(code, os.strerror(code))
                    return found
                if kind == messages.DONE:
                    return found
                found.append(message)


def routes() -> Netlink:
    """Return a socket of rtnetlink."""
    return Netlink(_ROUTE)


def generic() -> Netlink:
    """Return a socket of generic netlink."""
    return Netlink(_GENERIC)


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
    if error.errno in (errno.EBUSY, errno.EAGAIN, errno.EINTR):
        return Busy(f"netlink: {text}")
    return UnknownResult(f"netlink: {text}")
