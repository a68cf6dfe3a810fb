"""What every socket of a process answers with, exchanged as a whole when settings change.

Lives here: that one object, and how a source that may not ask is treated. Must not: know sockets.
"""

import asyncio
import traceback
from collections.abc import Callable

from vipd.backends import log
from vipd.dns.answer import Answers, Outcome
from vipd.dns.server.access import Access, Refusals
from vipd.dns.server.counters import Counters
from vipd.dns.server.query_log import QueryLog
from vipd.dns.server.waiting import Asks, Waiting

MOST_TOLD_ERRORS = 10
"""Errors of this program that are logged; the others are counted."""


class Serving:
    """Answers, who gets them, and what is counted. Sockets look here at each question."""

    def __init__(
        self,
        answers: Answers,
        access: Access,
        refusals: Refusals,
        waiting: Waiting,
        counters: Counters,
    ) -> None:
        self.answers, self.access, self.refusals = answers, access, refusals
        self.waiting, self.counters = waiting, counters
        self.asks: Asks | None = None
        """Whoever asks upstreams; None: nobody."""
        self.tcp_seconds = (3.0, 10.0, 5.0)
        """Until the first question, without a question, and without a byte of a reply taken."""
        self.log: QueryLog | None = None
        """Tells questions; None: nobody does."""
        self._told = 0

    def outcome(self, answer: Callable[[bytes], Outcome], data: bytes) -> Outcome:
        """Return what `answer` makes of data.

        No question may end the process: one that is not coped with is logged and counted.
        """
        try:
            return answer(data)
        except Exception:  # see above
            self.failed_inside(data)
            return None

    def failed_inside(self, data: bytes) -> None:
        """Count and log an error of this program, in an except clause."""
        self.counters.by_name["inside_errors"] += 1
        self._told += 1
        if self._told <= MOST_TOLD_ERRORS:
            where = traceback.format_exc().rstrip()[-1500:]
            log.warning("a question is not coped with", data=data[:300].hex(), exception=where)

    def refusal(self, data: bytes, source: str) -> bytes | None:
        """Return what is said to a source that may not ask; None: nothing."""
        counters = self.counters.by_name
        counters["sources_refused"] += 1
        if not self.refusals.may(source, asyncio.get_running_loop().time()):
            counters["refusals_unsaid"] += 1
            return None
        return self.answers.refuse(data)
