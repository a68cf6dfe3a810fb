"""The echo server of the lab's pods: over HTTP, TCP and UDP it says its name and whom it saw.

Lives here: the protocols and the start of one process for each pod. Only the standard library and
the namespace calls are imported, once, before the processes are forked: starting is what it must
be quick at. Must not: know the lab's topology.

    python -m vipd.bench.pod NAME                    serve in this namespace until killed
    python -m vipd.bench.pod --detach NAME=PATH …    one process in each namespace, then return

HTTP (8080, any method, any path; bodies are read and counted) answers one JSON object:
    {"pod": "web-1", "source": "10.244.1.11", "port": 41234,
     "local": "10.244.1.21", "local_port": 8080, "received": 0}
    ?bytes=N makes the answer at least N bytes long, ?delay=S waits S seconds before it.
TCP (9000) answers every line with `web-1 10.244.1.11:41234`, IPv6 in brackets, and keeps the
    connection until the client closes. `bytes N` adds N bytes in a second line, `delay S` waits
    first, `close` closes after the answer, `reset` resets at once, `hold` never answers.
UDP (5300) answers every datagram with the same text; `bytes N` pads it to N bytes with dots.
--reply N and --delay S are the N and S of requests that do not say.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import parse_qsl, urlsplit

from vipd.bench import lab_netns

HTTP_PORT, TCP_PORT, UDP_PORT = 8080, 9000, 5300
BACKLOG = 4096
LONGEST_LINE_BYTES = 1 << 20
_CHUNK_BYTES = 65536


@dataclass(frozen=True)
class Replies:
    """Who answers, and how a request is answered that does not say."""

    pod: str
    reply_bytes: int = 0
    delay_seconds: float = 0.0


def spelled(address: str, port: int) -> str:
    """Address and port as in a URL."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


async def _write_many(writer: asyncio.StreamWriter, byte: bytes, count: int) -> None:
    while count > 0:
        writer.write(byte * min(count, _CHUNK_BYTES))
        count -= _CHUNK_BYTES
        await writer.drain()


async def _answer_http(
    replies: Replies, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    """Answer one request; return whether the connection stays open."""
    request_line = await reader.readline()
    if not request_line.strip():
        return False
    _, target, version = request_line.decode("latin-1").split()
    headers: dict[str, str] = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    received = 0
    wanted = int(headers.get("content-length", "0"))
    while received < wanted and (chunk := await reader.read(min(_CHUNK_BYTES, wanted - received))):
        received += len(chunk)
    query = dict(parse_qsl(urlsplit(target).query))
    await asyncio.sleep(float(query.get("delay", replies.delay_seconds)))

    source, local = writer.get_extra_info("peername"), writer.get_extra_info("sockname")
    body = json.dumps(
        {
            "pod": replies.pod,
            "source": source[0],
            "port": source[1],
            "local": local[0],
            "local_port": local[1],
            "received": received,
        }
    ).encode()
    # White space may follow a JSON value, so a long answer is still one JSON document.
    padding = max(1, int(query.get("bytes", replies.reply_bytes)) - len(body))
    stays = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    writer.write(
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) + padding}\r\n"
        f"Connection: {'keep-alive' if stays else 'close'}\r\n\r\n".encode()
        + body
    )
    await _write_many(writer, b"\n", padding)
    return stays


async def _answer_line(
    replies: Replies, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    """Answer one line of the raw TCP protocol; return whether the connection stays open."""
    line = await reader.readline()
    if not line:
        return False
    command, _, argument = line.decode("latin-1").strip().partition(" ")
    if command == "reset":
        reset = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        return False
    if command == "hold":
        return True
    delay = float(argument) if command == "delay" else replies.delay_seconds
    extra = int(argument) if command == "bytes" else replies.reply_bytes
    await asyncio.sleep(delay)
    source = writer.get_extra_info("peername")
    writer.write(f"{replies.pod} {spelled(source[0], source[1])}\n".encode())
    if extra > 0:
        await _write_many(writer, b".", extra - 1)
        writer.write(b"\n")
    await writer.drain()
    return command != "close"


class _Datagrams(asyncio.DatagramProtocol):
    """Answers each datagram, late ones too, from the port it came to."""

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast: Python 3.11's selector transport does not inherit from DatagramTransport.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        command, _, argument = data[:64].decode("latin-1").strip().partition(" ")
        text = f"{self._replies.pod} {spelled(addr[0], addr[1])}\n".encode()
        length = int(argument) if command == "bytes" else self._replies.reply_bytes
        delay = float(argument) if command == "delay" else self._replies.delay_seconds
        assert self._transport is not None
        reply = text + b"." * (length - len(text))
        asyncio.get_running_loop().call_later(delay, self._transport.sendto, reply, addr)


_Answer = Callable[[Replies, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bool]]


class _Rounds:
    """Serves one kind of stream connection: rounds of `answer` until it says that was the last."""

    def __init__(self, replies: Replies, answer: _Answer) -> None:
        self._replies = replies
        self._answer = answer

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A client that goes away or talks nonsense loses its connection, and the others nothing.
        with contextlib.suppress(OSError, ValueError, EOFError):
            while await self._answer(self._replies, reader, writer):
                pass
        writer.close()


def _open_socket(family: int, kind: int, port: int) -> socket.socket:
    opened = socket.socket(family, kind)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    opened.bind(("", port))
    if kind == socket.SOCK_STREAM:
        opened.listen(BACKLOG)
    opened.setblocking(False)
    return opened


class Sockets:
    """The six sockets of a pod, open from the start on: from then on nobody is refused."""

    def __init__(self) -> None:
        families = (socket.AF_INET, socket.AF_INET6)
        self.http = [_open_socket(family, socket.SOCK_STREAM, HTTP_PORT) for family in families]
        self.tcp = [_open_socket(family, socket.SOCK_STREAM, TCP_PORT) for family in families]
        self.udp = [_open_socket(family, socket.SOCK_DGRAM, UDP_PORT) for family in families]


async def serve(sockets: Sockets, replies: Replies) -> None:
    """Answer on the sockets until cancelled."""
    http, tcp = _Rounds(replies, _answer_http), _Rounds(replies, _answer_line)
    loop = asyncio.get_running_loop()
    for opened in sockets.udp:
        await loop.create_datagram_endpoint(lambda: _Datagrams(replies), sock=opened)
    for rounds, group in ((http, sockets.http), (tcp, sockets.tcp)):
        for opened in group:
            await asyncio.start_server(
                rounds, sock=opened, limit=LONGEST_LINE_BYTES, backlog=BACKLOG
            )
    await asyncio.Event().wait()


def _detach(path: Path, replies: Replies) -> None:
    """Fork a process that serves in the namespace at `path`; return once its sockets are open.

    Raise ChildProcessError where it could not open them; it has printed why.
    """
    reading, writing = os.pipe()
    if os.fork() > 0:
        os.close(writing)
        ready = os.read(reading, 1)
        os.close(reading)
        if not ready:
            raise ChildProcessError(f"no echo server in {path}")
        return
    os.close(reading)
    os.setsid()
    lab_netns.enter(path)
    sockets = Sockets()
    Path("/proc/self/comm").write_text(f"vipd-{replies.pod}")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.write(writing, b"1")
    os.close(writing)
    asyncio.run(serve(sockets, replies))


def main() -> None:
    """Serve as the arguments say; exit 1 where a namespace or a port is not to be had."""
    parser = argparse.ArgumentParser(prog="python -m vipd.bench.pod", description=__doc__)
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--reply", type=int, default=0, metavar="BYTES")
    parser.add_argument("--delay", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("pods", nargs="+", metavar="NAME[=PATH]")
    options = parser.parse_args()
    pods = [tuple(pod.partition("=")[::2]) for pod in options.pods]
    try:
        if options.detach:
            for name, path in pods:
                _detach(Path(path), Replies(name, options.reply, options.delay))
            return
        replies = Replies(pods[0][0], options.reply, options.delay)
        asyncio.run(serve(Sockets(), replies))
    except OSError as failure:
        sys.exit(f"pod {' '.join(options.pods)}: {failure}")
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
