"""Thin clients for the echo server: one question from inside a namespace, one typed answer.

Lives here: how the three protocols of pod.py are asked on a socket that is already in the right
namespace. Must not: know names of hosts, or start processes.
Refused and unanswered are different exceptions, because they are different verdicts of a proxy:
ConnectionRefusedError (RST or ICMP port unreachable) and TimeoutError (dropped). Others are
OSError (no route, administratively prohibited) and ConnectionResetError.
"""

import json
import socket
import time
from contextlib import suppress
from typing import Literal

from msgspec import Struct

from vipd.proxy.names import Address, parse_address

Way = Literal["http", "tcp", "udp"]


class Answer(Struct, frozen=True, kw_only=True):
    """What a pod said: its name and the source it saw. `seconds` is from connect to the answer.

    `size_bytes` is the length of the answer's body, `local` and `local_port` are the address the
    pod was asked at (HTTP only).
    """

    pod: str
    source: Address
    source_port: int
    seconds: float
    size_bytes: int
    local: Address | None = None
    local_port: int = 0


def kind_of(way: Way) -> socket.SocketKind:
    """The socket type that a way of asking needs."""
    return socket.SOCK_DGRAM if way == "udp" else socket.SOCK_STREAM


def ask(
    opened: socket.socket,
    way: Way,
    address: Address,
    port: int,
    timeout: float,
    payload: bytes = b"",
) -> Answer:
    """Connect `opened`, ask once, close it. `timeout` in seconds bounds the whole of it.

    `payload` is the body of an HTTP POST, or the line or datagram to send (see pod.py).
    UDP sockets are connected too: only those get to know of an ICMP refusal.
    """
    start = time.monotonic()
    with opened:
        opened.settimeout(timeout)
        opened.connect((str(address), port))
        opened.sendall(_question(way, address, port, payload))
        whole = _read(opened, way, start + timeout)
    seconds = time.monotonic() - start
    return _http_answer(whole, seconds) if way == "http" else _text_answer(whole, seconds)


def _question(way: Way, address: Address, port: int, payload: bytes) -> bytes:
    match way:
        case "http":
            host = f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
            method = "POST" if payload else "GET"
            return (
                f"{method} / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
                f"Content-Length: {len(payload)}\r\n\r\n"
            ).encode() + payload
        case "tcp":
            # The half-close tells the pod that this was the last line, so it closes in turn.
            return (payload or b"who") + b"\n"
        case "udp":
            return payload or b"who"


def _read(opened: socket.socket, way: Way, deadline: float) -> bytes:
    """Everything that the pod sends: one datagram, or all until it closes."""
    if way == "udp":
        return opened.recv(65536)
    if way == "tcp":
        # ENOTCONN: it was reset already, which the first recv will say.
        with suppress(OSError):
            opened.shutdown(socket.SHUT_WR)
    parts = []
    while part := opened.recv(65536):
        parts.append(part)
        opened.settimeout(max(0.001, deadline - time.monotonic()))
    if not parts:
        raise ConnectionResetError("the pod closed the connection without an answer")
    return b"".join(parts)


def _http_answer(whole: bytes, seconds: float) -> Answer:
    head, _, body = whole.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise ConnectionResetError(f"unexpected answer: {head[:80].decode('latin-1')}")
    said = json.loads(body)
    return Answer(
        pod=said["pod"],
        source=parse_address(said["source"]),
        source_port=said["port"],
        seconds=seconds,
        size_bytes=len(body),
        local=parse_address(said["local"]),
        local_port=said["local_port"],
    )


def _text_answer(whole: bytes, seconds: float) -> Answer:
    pod, _, source = whole.partition(b"\n")[0].decode().partition(" ")
    address, _, port = source.rpartition(":")
    return Answer(
        pod=pod,
        source=parse_address(address.strip("[]")),
        source_port=int(port),
        seconds=seconds,
        size_bytes=len(whole),
    )
