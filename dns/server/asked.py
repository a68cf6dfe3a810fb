"""The questions of one TCP connection: answered at once, or when others have answered.

Lives here: what becomes of a question, and which of them wait. Must not: read or write
(connection.py).
"""

import asyncio
from typing import Protocol

from vipd.dns.answer import Forward
from vipd.dns.server.serving import Serving


class Asker(Protocol):
    """The connection that questions come by."""

    def reply(self, reply: bytes) -> None:
        """Send a reply."""

    def reply_late(self, reply: bytes) -> bool:
        """Send a reply that had to be waited for; return whether anybody is there to take it."""

    def waits_no_more(self) -> None:
        """Note that one question less waits."""

    def abort(self) -> None:
        """End now."""


class Asked:
    """Questions of a `peer`, which counts as one of `client`."""

    __slots__ = ("_asker", "_client", "_loop", "_peer", "_serving", "_tasks", "waiting")

    def __init__(self, asker: Asker, serving: Serving, peer: tuple[str, int], client: str) -> None:
        self._asker, self._serving, self._peer, self._client = asker, serving, peer, client
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.waiting = 0
        """How many wait for upstreams."""

    def refuse(self, data: bytes) -> None:
        """Tell one who may not ask."""
        refusal = self._serving.refusal(data, self._peer[0])
        if refusal is not None:
            self._asker.reply(refusal)
            self._log(data, refusal, 0.0)

    def answer(self, data: bytes) -> bool:
        """Answer a question, now or later; return False where it is none."""
        serving = self._serving
        began = self._loop.time()
        outcome = serving.outcome(serving.answers.tcp, data)
        if isinstance(outcome, bytes):
            self._asker.reply(outcome)
            seconds = self._loop.time() - began
            serving.counters.took(seconds)
            self._log(data, outcome, seconds)
        elif isinstance(outcome, Forward):
            self._forward(outcome, began)
        else:
            return False
        return True

    def _forward(self, forward: Forward, began: float) -> None:
        serving = self._serving
        try:
            reply = serving.waiting.at_once(forward, serving.answers, serving.asks, udp=False)
        except Exception:  # no question may end the process
            serving.failed_inside(forward.query.name)
            self._asker.abort()
            return
        if reply is None and not serving.waiting.admit(self._client):
            reply = serving.answers.fail(forward, udp=False)
        if reply is not None:
            self._asker.reply(reply)
            self._forwarded(forward, reply, began)
            return
        task = self._loop.create_task(self._wait(forward, began))
        self.waiting += 1
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _wait(self, forward: Forward, began: float) -> None:
        serving = self._serving
        try:
            reply = await serving.waiting.reply(
                forward, serving.answers, serving.asks, self._client, udp=False
            )
        except Exception:  # one question must not end the process
            serving.failed_inside(forward.query.name)
            reply = serving.answers.fail(forward, udp=False)
        if self._asker.reply_late(reply):
            self._forwarded(forward, reply, began)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.waiting -= 1
        self._serving.waiting.release(self._client)
        self._asker.waits_no_more()

    def cancel(self) -> None:
        """Wait for nobody any more."""
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    def _forwarded(self, forward: Forward, reply: bytes, began: float) -> None:
        """Count and log a question that was forwarded."""
        serving = self._serving
        seconds = self._loop.time() - began
        serving.counters.took(seconds)
        serving.counters.forwarded_rcodes[reply[3] & 15] += 1
        if serving.log is not None:
            serving.log.forwarded(forward.query, reply, self._peer, seconds, protocol="tcp")

    def _log(self, data: bytes, reply: bytes, seconds: float) -> None:
        if self._serving.log is not None:
            self._serving.log.note(data, reply, self._peer, seconds, protocol="tcp")
