"""Both ends of what a service forwards, as sockets of the test itself.

Lives here: sockets on hosts of the lab, a service whose endpoints they are, and what goes over
them. Must not: know what should become of it.
"""

import contextlib
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tests.netns.cluster import DEADLINE_SECONDS, Cluster, Flavour, Manifest, Served
from tests.netns.streams import Arrived, Way, piece

from vipd.bench.lab_ask import kind_of
from vipd.proxy.names import Address, Family

PORT = 7100
_RESETS = struct.pack("ii", 1, 0)
_CHUNK = 1 << 16
R = TypeVar("R")
S = TypeVar("S")


class ServedAt(Served):
    """A service whose endpoints listen at PORT of their pods."""

    def port(self, **more: Any) -> Manifest:
        return {**super().port(), "targetPort": PORT, **more}

    def slice(self) -> Manifest:
        made = super().slice()
        made["ports"] = [{**one, "port": PORT} for one in made["ports"]]
        return made


class Ends:
    """Sockets of one test, closed at its end."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Ends":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def serve(self, flavour: Flavour, *pods: str, **spec: Any) -> ServedAt:
        """A service with these pods as endpoints, programmed."""
        served = ServedAt(self.cluster, flavour, spec)
        self.cluster.apply(served.manifest())
        served.endpoints(*pods)
        return served

    def made(self, host: str, flavour: Flavour, **options: int) -> socket.socket:
        """A socket of a host, with options of SOL_SOCKET set by their names."""
        family = socket.AF_INET6 if flavour.family is Family.IPV6 else socket.AF_INET
        made = self.cluster.lab.socket(host, family, kind_of(flavour.way))
        self._stack.enter_context(made)
        made.settimeout(DEADLINE_SECONDS)
        for name, value in options.items():
            made.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        return made

    def endpoint(self, pod: str, flavour: Flavour, **options: int) -> socket.socket:
        """A socket at PORT of a pod; for TCP it listens."""
        made = self.made(pod, flavour, SO_REUSEADDR=1, **options)
        made.bind(("", PORT))
        if flavour.way != "udp":
            made.listen(256)
        return made

    def connected(
        self, served: Served, host: str = "client-1", to: Address | None = None, **options: int
    ) -> socket.socket:
        """A client's socket that is connected to the service."""
        made = self.made(host, served.flavour, **options)
        made.connect((str(to or served.address), 80))
        return made

    def accepted(self, endpoint: socket.socket) -> socket.socket:
        """The next connection of an endpoint."""
        made, _ = endpoint.accept()
        self._stack.enter_context(made)
        made.settimeout(DEADLINE_SECONDS)
        return made


def at_once(one: Callable[[], R], other: Callable[[], S]) -> tuple[R, S]:
    """Do both at the same time; return what they return, raise what they raise."""
    with ThreadPoolExecutor(2) as pool:
        begun, also = pool.submit(one), pool.submit(other)
        return begun.result(), also.result()


def send(opened: socket.socket, number: int, way: Way, size: int, first: int = 0) -> None:
    """Send a stream of streams.py up to `size`, from an offset on."""
    for at in range(first, size, _CHUNK):
        opened.sendall(piece(number, way, at, min(_CHUNK, size - at)))


def receive(opened: socket.socket, number: int, way: Way, size: int) -> Arrived:
    """Receive a stream until its end, or as much as there is before a reset."""
    arrived = Arrived(number, way, size)
    while data := opened.recv(_CHUNK):
        arrived.take(data)
    return arrived


def exactly(opened: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer at the end of the data."""
    data = b""
    while len(data) < count and (part := opened.recv(count - len(data))):
        data += part
    return data


def reset(opened: socket.socket) -> None:
    """Close it with a reset, whatever is under way."""
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESETS)
    opened.close()
