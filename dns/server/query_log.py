"""The query log: a line for each question, or for one in so many.

Lives here: which questions are told, and the lines until somebody takes them. Must not: change what
is answered. Without a query log nothing here is called.

Text is as CoreDNS's plugin `log` writes it, so that what reads that reads this; JSON has the same
fields by name. Lines wait in memory, LONGEST_WAITING bytes of them, and are written a few times a
second: where nobody takes them fast enough the next ones are dropped and counted, as questions
must not wait for a log.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from vipd.backends import log
from vipd.dns.message import Edns, Malformed, Query, parse
from vipd.dns.names import text_of
from vipd.dns.server.counters import RCODES, TYPES
from vipd.dns.settings import DnsSettings

LONGEST_WAITING = 1 << 20
"""Bytes of lines: those of about 6,000 questions."""
FLUSH_SECONDS = 0.1
_RCODES = (*RCODES, *map(str, range(len(RCODES), 16)))
_CLASSES = {1: "IN", 3: "CH", 4: "HS", 255: "ANY"}
_FLAGS = ((0x8000, "qr"), (0x0400, "aa"), (0x0200, "tc"), (0x0100, "rd"), (0x0080, "ra"))
_LATER_FLAGS = ((0x0020, "ad"), (0x0010, "cd"))
Receive = Callable[[int], tuple[bytes, Any]]
Send = Callable[[bytes, Any], int]


class QueryLog:
    """Tells one question in `every`."""

    def __init__(self, every: int, clock: Callable[[], float] | None = None) -> None:
        self.every = every
        self.dropped = 0
        """Lines that nobody took in time."""
        self.written = 0
        self._clock = clock or asyncio.get_running_loop().time
        self._left = 1
        """Questions until the next that is told."""
        self._lines: list[bytes] = []
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def take(self, every: int) -> None:
        """Tell one question in so many from now on."""
        self.every, self._left = every, 1

    def watched(self, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Return what receives and sends a row of datagrams, one after the other, and tells them.

        So a socket that is read without a log does nothing for one.
        """
        asked, began = b"", 0.0

        def receive_and_note(size: int) -> tuple[bytes, Any]:
            nonlocal asked, began
            asked, client = receive(size)
            if self._left == 1:
                began = self._clock()
            return asked, client

        def send_and_tell(reply: bytes, client: Any) -> int:
            sent = send(reply, client)
            if self._left == 1:
                self.note(asked, reply, client, self._clock() - began, protocol="udp")
            else:
                self._left -= 1
            return sent

        return receive_and_note, send_and_tell

    def note(
        self, data: bytes, reply: bytes, client: tuple[Any, ...], seconds: float, *, protocol: str
    ) -> None:
        """Tell a question and its reply, if it is its turn."""
        if self._is_due():
            try:
                query = parse(data)
            except Malformed:
                query = None
            self._tell(query, len(data), reply, client, seconds, protocol)

    def forwarded(
        self, query: Query, reply: bytes, client: tuple[Any, ...], seconds: float, *, protocol: str
    ) -> None:
        """Tell the same of a question that was read before; its length is not known any more."""
        if self._is_due():
            size = 12 + len(query.question) + (11 if query.edns is not None else 0)
            self._tell(query, size, reply, client, seconds, protocol)

    def _is_due(self) -> bool:
        self._left -= 1
        if self._left:
            return False
        self._left = self.every
        return True

    def _tell(
        self,
        query: Query | None,
        size: int,
        reply: bytes,
        client: tuple[Any, ...],
        seconds: float,
        protocol: str,
    ) -> None:
        if self._bytes >= LONGEST_WAITING:
            self.dropped += 1
            return
        line = line_of(query, size, reply, client, seconds, protocol).encode() + b"\n"
        self._lines.append(line)
        self._bytes += len(line)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        """Write what waits, as far as somebody takes it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = 0
        while at < len(self._lines):
            end = at + 1
            size = len(self._lines[at])
            while end < len(self._lines) and size + len(self._lines[end]) <= log.AT_ONCE:
                size += len(self._lines[end])
                end += 1
            if not log.write_bytes(b"".join(self._lines[at:end])):
                break
            at = end
        self.written += at
        self._bytes -= sum(map(len, self._lines[:at]))
        del self._lines[:at]
        if self._lines:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)

    def close(self) -> None:
        """Write what can be written, and no more."""
        self.flush()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def logging_of(before: QueryLog | None, settings: DnsSettings) -> QueryLog | None:
    """Return the log that settings want: the one there is, another, or none."""
    if settings.query_log == "off":
        if before is not None:
            before.close()
        return None
    every = settings.query_log_every if settings.query_log == "sampled" else 1
    if before is None:
        return QueryLog(every)
    before.take(every)
    return before


def line_of(
    query: Query | None,
    size: int,
    reply: bytes,
    client: tuple[Any, ...],
    seconds: float,
    protocol: str,
) -> str:
    """Return the line of a question, without its end; None: one that cannot be read."""
    host = f"[{client[0]}]" if ":" in str(client[0]) else str(client[0])
    edns = query.edns if query is not None and query.edns is not None else Edns(512, 0, False)
    flags = int.from_bytes(reply[2:4])
    facts: dict[str, object] = {
        "client": f"{host}:{client[1]}",
        "id": int.from_bytes(reply[:2]),
        "type": "-" if query is None else TYPES.get(query.type, f"TYPE{query.type}"),
        "class": "-" if query is None else _CLASSES.get(query.class_, f"CLASS{query.class_}"),
        "name": "-" if query is None else text_of(query.name),
        "proto": protocol,
        "size": size,
        "do": edns.dnssec_ok,
        "bufsize": edns.size if protocol == "udp" else 65535,
        "rcode": "BADVERS" if edns.version and not flags & 15 else _RCODES[flags & 15],
        "flags": ",".join(name for bit, name in (*_FLAGS, *_LATER_FLAGS) if flags & bit),
        "rsize": len(reply),
        "seconds": round(seconds, 9),
    }
    if log.is_json():
        return log.line("info", "query", facts)
    f = facts
    asked = f"{f['type']} {f['class']} {f['name']} {f['proto']} {size}"
    asked = f"{asked} {str(edns.dnssec_ok).lower()} {f['bufsize']}"
    told = f"{f['rcode']} {f['flags']} {len(reply)} {seconds:.9f}s"
    return f'[INFO] {f["client"]} - {f["id"]} "{asked}" {told}'
