"""Questions over UDP: one socket, read until it is empty or others have to have their turn.

Lives here: the hot loop. Must not: know what a question means (answer.py).

Each address has a socket of its own, so a reply leaves from the address that was asked. Measured
against asyncio's own datagram endpoints, reading the socket directly is four times as fast: they
take one datagram a turn of the loop.
"""

import asyncio
import errno
import socket
import struct

from vipd.dns.answer import Forward
from vipd.dns.server.query_log import Receive, Send
from vipd.dns.server.serving import Serving

AT_ONCE = 64
"""Datagrams of one socket before the others, TCP and the daemon have their turn: about 1 ms."""
MOST_ROUNDS = 1000
"""Of so many datagrams, when no more are to come; a flood must not go on with it for ever."""
LONGEST = 4096
"""Bytes that are read of a datagram: a question padded to a block (RFC 8467) has 128 or 256, and
what is longer is cut off, which makes it malformed."""
_SO_MEMINFO = 55
_DROPS = struct.Struct("32xI")
"""Where sk_drops stands in it: SK_MEMINFO_DROPS, include/uapi/linux/sock_diag.h."""
_NEVERMIND = (errno.EAGAIN, errno.ENOBUFS)


class UdpServer:
    """Answers what arrives at one socket, which is the caller's to close."""

    def __init__(self, listener: socket.socket, serving: Serving) -> None:
        listener.setblocking(False)
        self.listener = listener
        self._serving = serving
        six = listener.family == socket.AF_INET6
        self._traffic = serving.counters.traffic("udp", 2 if six else 1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._reads = False

    def start(self) -> None:
        """Answer from now on."""
        if not self._reads:
            self._reads = True
            asyncio.get_running_loop().add_reader(self.listener.fileno(), self._read)

    def stop(self) -> None:
        """Read no more; what waits for upstreams is still answered."""
        if self._reads:
            self._reads = False
            asyncio.get_running_loop().remove_reader(self.listener.fileno())

    def drain(self) -> None:
        """Answer what has arrived."""
        for _ in range(MOST_ROUNDS):
            if not self._read():
                return

    async def finish(self) -> None:
        """Return when nothing waits any more."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def drops(self) -> int:
        """Return how many datagrams the kernel had no room for, since the socket was made.

        What SO_RXQ_OVFL tells with each datagram, without a slower way to read them.
        """
        try:
            told = self.listener.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _DROPS.size)
            return int(_DROPS.unpack(told)[0])
        except (OSError, struct.error):
            return 0

    def _read(self) -> int:
        """Answer what has arrived, up to AT_ONCE; return how many datagrams that were."""
        serving = self._serving
        answer, verdicts = serving.answers.udp, serving.access.verdicts
        receive: Receive = self.listener.recvfrom
        send: Send = self.listener.sendto
        if serving.log is not None:
            receive, send = serving.log.watched(receive, send)
        traffic, rcodes = self._traffic, serving.counters.rcodes
        types = traffic.types
        asked, given = traffic.requests.exact, traffic.responses.exact
        clock = asyncio.get_running_loop().time
        began = clock()
        replies = taken = 0
        for taken in range(AT_ONCE):  # noqa: B007 - told at the end
            try:
                data, client = receive(LONGEST)
            except OSError as error:
                if error.errno != errno.EAGAIN:
                    serving.counters.by_name["udp_failed"] += 1
                break
            asked[len(data)] += 1
            end = data.find(0, 12) + 1
            kind = data[end : end + 2]
            types[kind if kind in types else b""] += 1
            if not verdicts.get(client[0]) and not self._admitted(data, client):
                continue
            try:
                outcome = answer(data)
            except Exception:  # no question may end the process
                serving.failed_inside(data)
                continue
            if outcome.__class__ is bytes:
                try:
                    send(outcome, client)
                except OSError as error:
                    self._not_sent(error)
                    continue
                replies += 1
                rcodes[outcome[3] & 15] += 1
                given[len(outcome)] += 1
            elif isinstance(outcome, Forward):
                self._forward(outcome, client)
            else:
                serving.counters.by_name["silent"] += 1
        else:
            taken = AT_ONCE
        if replies:
            serving.counters.took((clock() - began) / replies, replies)
        return taken

    def _admitted(self, data: bytes, client: tuple[str, int]) -> bool:
        """Return whether a client that was not met lately may ask; say so where it may not."""
        serving = self._serving
        if serving.access.admits(client[0]):
            return True
        refusal = serving.refusal(data, client[0])
        if refusal is not None:
            self._send(refusal, client)
            if serving.log is not None:
                serving.log.note(data, refusal, client, 0.0, protocol="udp")
        return False

    def _forward(self, forward: Forward, client: tuple[str, int]) -> None:
        serving = self._serving
        began = asyncio.get_running_loop().time()
        try:
            reply = serving.waiting.at_once(forward, serving.answers, serving.asks, udp=True)
        except Exception:  # as in _read
            serving.failed_inside(forward.query.name)
            return
        if reply is None and not serving.waiting.admit(client[0]):
            reply = serving.answers.fail(forward)
        if reply is not None:
            self._forwarded_reply(forward, reply, client, began)
            return
        task = asyncio.get_running_loop().create_task(self._forwarded(forward, client, began))
        self._tasks.add(task)

        def over(ended: asyncio.Task[None]) -> None:
            self._tasks.discard(ended)
            serving.waiting.release(client[0])

        task.add_done_callback(over)

    async def _forwarded(self, forward: Forward, client: tuple[str, int], began: float) -> None:
        serving = self._serving
        try:
            reply = await serving.waiting.reply(
                forward, serving.answers, serving.asks, client[0], udp=True
            )
        except Exception:  # one question must not end the process
            serving.failed_inside(forward.query.name)
            reply = serving.answers.fail(forward)
        self._forwarded_reply(forward, reply, client, began)

    def _forwarded_reply(
        self, forward: Forward, reply: bytes, client: tuple[str, int], began: float
    ) -> None:
        serving = self._serving
        seconds = asyncio.get_running_loop().time() - began
        serving.counters.took(seconds)
        serving.counters.forwarded_rcodes[reply[3] & 15] += 1
        if serving.log is not None:
            serving.log.forwarded(forward.query, reply, client, seconds, protocol="udp")
        self._send(reply, client)

    def _send(self, reply: bytes, client: tuple[str, int]) -> None:
        try:
            self.listener.sendto(reply, client)
        except OSError as error:
            self._not_sent(error)
            return
        self._serving.counters.rcodes[reply[3] & 15] += 1
        self._traffic.responses.add(len(reply))

    def _not_sent(self, error: OSError) -> None:
        """Count it: no room in the socket, or a client that cannot be reached (also: port 0)."""
        name = "udp_dropped_unsent" if error.errno in _NEVERMIND else "udp_failed"
        self._serving.counters.by_name[name] += 1
