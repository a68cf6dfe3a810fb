"""How many notices are written: so many for each object, so many in all, and the same one once.

Lives here: the bounds, and what was written before. Pure: clocks are passed in. Must not: know how
a notice is written (notice_wire.py) or sent (notice_writer.py).
Source: client-go tools/record/events_cache.go (25 at once, then one in five minutes, for each
object) and tools/events/event_broadcaster.go (a series of one event), v1.36.
"""

from collections import OrderedDict

from msgspec import Struct

from vipd.proxy.notice import Notice, Subject

SUBJECT_BURST, SUBJECT_SECONDS = 25.0, 300.0
"""Notices on one object at once, and seconds until there may be one more."""
TOTAL_BURST, TOTAL_SECONDS = 50.0, 30.0
"""The same for all of this process: 5,000 nodes with the same trouble are 170 requests a second."""
SERIES_SECONDS = 3600.0
"""What is told again within this time is the same event, with a count; the API server forgets it
after as long (--event-ttl)."""
SERIES_WRITE_SECONDS = 300.0
"""A count of a series is written at the second time, and then at most so often."""
MOST_KEPT = 1024
"""Objects, and series, that are remembered."""


class Bucket(Struct):
    """Tokens, at a time in seconds."""

    tokens: float
    at: float

    def take(self, burst: float, seconds: float, now: float) -> bool:
        """Take a token, of which there is one more each `seconds`, `burst` at most; False: none."""
        self.tokens = min(burst, self.tokens + max(0.0, now - self.at) / seconds)
        self.at = now
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


class Series(Struct):
    """One event that was written, and how often it was told."""

    name: str
    first: float
    """Seconds since the epoch."""
    count: int = 1
    written: int = 1
    """The count that the API server was told last."""
    written_at: float = 0.0


class Rates:
    """Admits notices. Times are seconds since the epoch; nothing breaks where that clock jumps."""

    def __init__(self) -> None:
        self._subjects: OrderedDict[Subject, Bucket] = OrderedDict()
        self._total = Bucket(TOTAL_BURST, 0.0)
        self._series: OrderedDict[Notice, Series] = OrderedDict()

    def series(self, notice: Notice, now: float) -> Series | None:
        """Count a notice that was written before, and return its series; None: it was not."""
        found = self._series.get(notice)
        if found is None:
            return None
        if notice.shared or not 0.0 <= now - found.written_at < SERIES_SECONDS:
            del self._series[notice]
            return None
        self._series.move_to_end(notice)
        found.count += 1
        return found

    def admits(self, notice: Notice, now: float) -> bool:
        """Return whether it may be written now; if so, that is counted."""
        found = self._series.get(notice)
        is_series = found is not None and found.written > 1
        if found and is_series and 0.0 <= now - found.written_at < SERIES_WRITE_SECONDS:
            return False
        bucket = self._subjects.setdefault(notice.subject, Bucket(SUBJECT_BURST, now))
        self._subjects.move_to_end(notice.subject)
        while len(self._subjects) > MOST_KEPT:
            self._subjects.popitem(last=False)
        if not bucket.take(SUBJECT_BURST, SUBJECT_SECONDS, now):
            return False
        if not self._total.take(TOTAL_BURST, TOTAL_SECONDS, now):
            bucket.tokens += 1.0
            return False
        return True

    def wrote(self, notice: Notice, name: str, now: float) -> None:
        """Note that a notice is an event of this name now, or that its count was written."""
        found = self._series.get(notice)
        if found is None or found.name != name:
            self._series[notice] = Series(name, now, written_at=now)
            while len(self._series) > MOST_KEPT:
                self._series.popitem(last=False)
            return
        found.written, found.written_at = found.count, now

    def count(self, notice: Notice) -> int:
        """Return how often a notice was told that was written."""
        found = self._series.get(notice)
        return found.count if found is not None else 1

    def forget(self, notice: Notice) -> None:
        """Note that the API server does not have it any more."""
        self._series.pop(notice, None)
