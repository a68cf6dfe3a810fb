"""One TCP connection of a client: questions as they come, replies as they are ready (RFC 7766).

Lives here: framing, pipelining, and every bound of a single connection. Must not: know the others
(tcp.py) or what becomes of a question (asked.py).

What a client can hold here is bounded: READ bytes of questions it has sent, one reply beyond
UNREAD bytes of those it does not read, IN_FLIGHT questions that wait for upstreams.
"""

import asyncio
import contextlib
import socket
from collections import deque
from typing import Protocol

from vipd.dns.server.asked import Asked
from vipd.dns.server.counters import Traffic
from vipd.dns.server.serving import Serving

READ = 16 << 10
"""Bytes read at once."""
UNREAD = 64 << 10
"""Bytes of replies that may wait for the client before its questions do."""
IN_FLIGHT = 64
"""Questions of one connection that wait for upstreams; the next ones are not read meanwhile."""
AT_ONCE = 32
"""Questions that are answered before others have their turn: at most about 1 ms."""
MOMENT_SECONDS = 1.0
"""For a client that has connected, and asks only now that everything ends here."""

_buffer = bytearray(READ)  # there is one thread, and what is read is taken out at once


class Others(Protocol):
    """The connections that this one is among."""

    def used(self, one: "Connection") -> None:
        """Note that it is used now."""

    def remove(self, one: "Connection") -> None:
        """Forget one that has ended."""


class Connection:
    """Reads and writes the socket itself: a stream of asyncio's takes five times the memory.

    `source` is the client's address, `client` that or what all who may not ask are called.
    """

    __slots__ = (
        "_asked",
        "_eof",
        "_finishing",
        "_loop",
        "_others",
        "_out",
        "_out_bytes",
        "_read",
        "_reading",
        "_served",
        "_serving",
        "_since",
        "_socket",
        "_timer",
        "_traffic",
        "_turn",
        "_unread_since",
        "client",
        "source",
    )

    def __init__(
        self,
        accepted: socket.socket,
        peer: tuple[str, int],
        client: str,
        serving: Serving,
        others: Others,
        traffic: Traffic,
    ) -> None:
        self.source, self.client = peer[0], client
        self._asked = Asked(self, serving, peer, client)
        self._socket: socket.socket | None = accepted
        self._serving, self._others, self._traffic = serving, others, traffic
        self._loop = asyncio.get_running_loop()
        self._read = bytearray()
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._reading = False
        self._eof = self._finishing = False
        self._served = 0
        self._since = self._loop.time()
        """When the last whole question came, or the last reply left."""
        self._unread_since: float | None = None
        """Since when replies wait without any byte being taken."""
        self._timer: asyncio.TimerHandle | None = None
        self._turn: asyncio.Handle | None = None

    @property
    def _limits(self) -> tuple[float, float, float]:
        return self._serving.tcp_seconds

    def start(self) -> None:
        """Read from now on."""
        self._arm(self._limits[0])
        self._resume_reading()

    def finish(self) -> None:
        """Answer what has arrived, take no more, and end.

        Who has just connected may still ask once, for a moment.
        """
        if self._reading:
            self._readable()
        self._finishing = True
        if self._served or self._eof:
            self._pause_reading()
            self._look()
        elif self._socket is not None:
            self._arm(MOMENT_SECONDS)

    def abort(self) -> None:
        """End now; a reset tells the client that not everything was answered."""
        if self._socket is None:
            return
        fileno = self._socket.fileno()
        if self._reading:
            self._loop.remove_reader(fileno)
        if self._out:
            self._loop.remove_writer(fileno)
        if self._timer is not None:
            self._timer.cancel()
        if self._turn is not None:
            self._turn.cancel()
        self._asked.cancel()
        self._out.clear()
        self._read.clear()
        with contextlib.suppress(OSError):
            self._socket.close()
        self._socket = None
        self._others.remove(self)

    # Reading

    def _pause_reading(self) -> None:
        if self._reading and self._socket is not None:
            self._reading = False
            self._loop.remove_reader(self._socket.fileno())

    def _resume_reading(self) -> None:
        ended = self._eof or self._finishing or self._socket is None
        if not self._reading and not ended and self._socket is not None:
            self._reading = True
            self._loop.add_reader(self._socket.fileno(), self._readable)

    def _readable(self) -> None:
        if self._socket is None:
            return
        try:
            size = self._socket.recv_into(_buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        if not size:
            self._eof = True
            self._pause_reading()
            self._look()
            return
        self._read += memoryview(_buffer)[:size]
        self._answer()

    def _answer(self) -> None:
        """Answer what was read, a few at once, unless the client has to take replies first."""
        self._turn = None
        at, done, read = 0, 0, self._read
        while self._socket is not None and len(read) - at >= 2:
            if done >= AT_ONCE or not self._may_go_on():
                break
            length = read[at] << 8 | read[at + 1]
            if not length:
                self._broken()
                return
            if len(read) - at - 2 < length:
                break
            data = bytes(memoryview(read)[at + 2 : at + 2 + length])
            at += 2 + length
            done += 1
            if not self._question(data):
                return
        if self._socket is None:
            return
        del read[:at]
        if done:
            self._since = self._loop.time()
            self._served += done
            self._others.used(self)
        waits = self._has_question()
        if waits or not self._may_go_on():
            self._pause_reading()
            if waits and self._may_go_on():
                self._turn = self._loop.call_soon(self._answer)
        else:
            self._resume_reading()
        self._look()

    def _has_question(self) -> bool:
        read = self._read
        return len(read) >= 2 and len(read) - 2 >= (read[0] << 8 | read[1])

    def _may_go_on(self) -> bool:
        return self._out_bytes < UNREAD and self._asked.waiting < IN_FLIGHT

    def _question(self, data: bytes) -> bool:
        """Answer a question, now or later; return False where the connection has ended with it."""
        self._traffic.question(data)
        if self.client != self.source:
            self._asked.refuse(data)
            self._finishing = True
            self._served += 1
            self._pause_reading()
            self._read.clear()
            self._look()
            return False
        if not self._asked.answer(data):
            self._broken()
        return self._socket is not None

    def waits_no_more(self) -> None:
        """Note that one question less waits for upstreams."""
        if self._socket is not None:
            self._more()

    def _more(self) -> None:
        """Go on with what was held back."""
        if self._turn is None and self._may_go_on():
            self._turn = self._loop.call_soon(self._answer)

    # Writing

    def reply_late(self, reply: bytes) -> bool:
        """Send a reply that had to be waited for; return whether anybody is there to take it."""
        if self._socket is None:
            return False
        if self._out_bytes >= 2 * UNREAD:
            self._slow()
            return False
        self._since = self._loop.time()
        self.reply(reply)
        return True

    def reply(self, reply: bytes) -> None:
        """Send a reply, or keep it until the client takes it."""
        serving = self._serving
        serving.counters.rcodes[reply[3] & 15] += 1
        self._traffic.responses.add(len(reply))
        whole = b"%b%b" % (len(reply).to_bytes(2), reply)
        if self._socket is None:
            return
        sent = 0
        if not self._out:
            try:
                sent = self._socket.send(whole)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self.abort()
                return
            if sent == len(whole):
                return
            self._unread_since = self._loop.time()
            self._arm(self._limits[2])
            self._loop.add_writer(self._socket.fileno(), self._writable)
        self._out.append(memoryview(whole)[sent:])
        self._out_bytes += len(whole) - sent

    def _writable(self) -> None:
        if self._socket is None:
            return
        try:
            sent = self._socket.sendmsg(list(self._out)[:AT_ONCE])
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        self._out_bytes -= sent
        while self._out and sent >= len(self._out[0]):
            sent -= len(self._out.popleft())
        if sent:
            self._out[0] = self._out[0][sent:]
        self._since = self._loop.time()
        self._unread_since = self._since if self._out else None
        if not self._out:
            self._loop.remove_writer(self._socket.fileno())
        self._more()
        self._look()

    # The end

    def _broken(self) -> None:
        """End where the client does not speak DNS, and drop what it waits for."""
        self._serving.counters.by_name["tcp_broken"] += 1
        self.abort()

    def _slow(self) -> None:
        self._serving.counters.by_name["tcp_slow"] += 1
        self.abort()

    def _look(self) -> None:
        """End in order if nothing is left to do."""
        over = ((self._finishing and self._served) or self._eof) and not self._has_question()
        if over and not self._asked.waiting and not self._out and self._socket is not None:
            # The client gets what was sent: closing with unread questions would be a reset.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
            self.abort()

    def _arm(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._due)

    def _due(self) -> None:
        """End if nothing has come for too long, or too little was taken; else look again later."""
        first, idle, unread = self._limits
        now = self._loop.time()
        if self._finishing and not self._served:
            self.abort()
            return
        if self._unread_since is not None:
            left = self._unread_since + unread - now
            if left <= 0:
                self._slow()
                return
        elif self._asked.waiting:
            left = idle
        else:
            left = self._since + (idle if self._served else first) - now
            if left <= 0:
                self._serving.counters.by_name["tcp_idle"] += 1
                self.abort()
                return
        self._timer = self._loop.call_later(left, self._due)
