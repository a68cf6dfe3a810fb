"""A question under way: its course, with sockets and time.

Lives here: what a course wants done, done. Must not: decide anything (course.py).
"""

import asyncio
import errno
from collections.abc import Callable, Mapping
from typing import NamedTuple

from vipd.dns.forward import wire
from vipd.dns.forward.attempt import Attempt, Steps
from vipd.dns.forward.counters import Counters
from vipd.dns.forward.course import Course
from vipd.dns.forward.excerpt import Rules
from vipd.dns.forward.query import Query, make_query
from vipd.dns.forward.question import Question, Reply, failure
from vipd.dns.forward.reading import Unwanted, mismatch, read
from vipd.dns.forward.tcp import TcpLinks, TcpWay
from vipd.dns.forward.udp import NOT_ITS_FAULT, UdpWay
from vipd.dns.forward.upstream import Upstream

READ_ASIDE_BYTES = 4096
"""Longer replies are read in a thread, one at a time: 64 KB take dnspython a fifth of a second."""


class Surroundings(NamedTuple):
    """What all fetches share."""

    clock: Callable[[], float]
    bits: wire.RandomBits
    counters: Counters
    links: Mapping[Upstream, TcpLinks]
    reading_aside: asyncio.Lock
    tasks: set[asyncio.Task[None]]


class Fetch:
    """One question. `over` is called once, when all of its sockets are closed."""

    def __init__(
        self,
        question: Question,
        course: Course,
        rules: Rules,
        surroundings: Surroundings,
        over: "Callable[[Fetch], None]",
    ) -> None:
        self.question = question
        self.reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.waiters = 0
        self._course = course
        self._rules = rules
        self._around = surroundings
        self._over = over
        self._ways: dict[Attempt, UdpWay | TcpWay] = {}
        self._aside: set[Attempt] = set()
        self._sent = 0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Ask. `reply` may be there at once."""
        self._do(self._course.begin(self._around.clock()))

    def close(self) -> None:
        """Give up; `reply` is a failure if it is not there."""
        if self._timer is not None:
            self._timer.cancel()
        for way in self._ways.values():
            way.close()
        self._ways.clear()
        if not self.reply.done():
            self.reply.set_result(failure(self.question, wire.EDE_OTHER))

    def _do(self, steps: Steps) -> None:
        for attempt in steps.close:
            way = self._ways.pop(attempt, None)
            if way is not None:
                way.close()
        for attempt in steps.begin:
            if attempt.is_open:  # one before it may have ended everything
                self._send(attempt)
        if self._course.result is not None and not self.reply.done():
            self.reply.set_result(self._course.result)
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._course.is_over:
            self._over(self)
        else:
            seconds = max(0.0, self._course.due - self._around.clock())
            self._timer = asyncio.get_running_loop().call_later(seconds, self._wake)

    def _wake(self) -> None:
        self._do(self._course.wake(self._around.clock()))

    def _send(self, attempt: Attempt) -> None:
        around, now = self._around, self._around.clock()
        query = make_query(
            self.question,
            attempt.standing,
            around.bits,
            now,
            tcp=attempt.tcp,
            edns=attempt.edns,
            trust_ad=self._rules.trust_ad,
        )

        def heard(data: bytes) -> None:
            self._heard(attempt, query, data)

        def lost(error: OSError) -> None:
            its_fault = error.errno not in NOT_ITS_FAULT
            self._do(self._course.broken(attempt, around.clock(), its_fault=its_fault))

        attempt.edns = query.has_edns
        self._sent += 1
        around.counters.hedged += self._sent > 1
        try:
            if attempt.tcp:
                way = TcpWay(query.message, heard, lost)
                self._ways[attempt] = way
                self._links(attempt).ask(way)
            else:
                self._ways[attempt] = UdpWay(attempt.standing.upstream, query.message, heard, lost)
        except OSError as error:
            lost(error)

    def _links(self, attempt: Attempt) -> TcpLinks:
        links = self._around.links.get(attempt.standing.upstream)
        if links is None:
            raise OSError(errno.ECANCELED, "the upstream is configured no more")
        return links

    def _heard(self, attempt: Attempt, query: Query, data: bytes) -> None:
        if len(data) <= READ_ASIDE_BYTES or mismatch(data, query) is not None:
            self._take(attempt, read(data, query, self.question, self._rules))
        elif attempt not in self._aside:
            self._aside.add(attempt)
            self._do(self._course.came(attempt))
            task = asyncio.get_running_loop().create_task(self._read_aside(attempt, query, data))
            self._around.tasks.add(task)
            task.add_done_callback(self._around.tasks.discard)

    async def _read_aside(self, attempt: Attempt, query: Query, data: bytes) -> None:
        async with self._around.reading_aside:
            if attempt.is_open:
                found = await asyncio.to_thread(read, data, query, self.question, self._rules)
                self._aside.discard(attempt)
                self._take(attempt, found)

    def _take(self, attempt: Attempt, found: Reply | Unwanted) -> None:
        now, counters = self._around.clock(), self._around.counters
        if not attempt.is_open:
            return
        if isinstance(found, Unwanted):
            counters.unwanted[found.value] = counters.unwanted.get(found.value, 0) + 1
            counters.malformed += found is Unwanted.MALFORMED
            self._do(self._course.unwanted(attempt, found, now))
            return
        upstream = str(attempt.standing.upstream)
        counters.replied(upstream, found.rcode, now - attempt.started)
        counters.truncated += found.is_truncated
        self._do(self._course.heard(attempt, found, now))
