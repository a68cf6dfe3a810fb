"""How an upstream does: how fast it answers, whether it does at all, and what it understands.

Lives here: what is learned of one upstream from the questions it was asked. Pure. Must not: choose
between upstreams (group.py), or ask anything.

Time-outs follow RFC 6298 (smoothed round-trip time + 4 × deviation), without its rule of Karn: each
attempt has an id and a socket of its own, so a late reply is known to be its own.
"""

from vipd.dns.forward.settings import ForwardSettings
from vipd.dns.forward.upstream import Upstream

FIRST_DOWN_SECONDS = 1.0
MOST_DOWN_SECONDS = 10.0
FOLDED_BEFORE_PLAIN = 3
"""Replies in a row whose name came back in another spelling, until names are sent in lower case."""
PLAIN_SECONDS = 3600.0
"""How long an upstream is taken for one that does not know EDNS, or spelling, or cookies."""
CLIENT_COOKIE_BYTES = 8


class Standing:
    """One upstream. Times are seconds on one clock, passed in."""

    def __init__(self, upstream: Upstream, settings: ForwardSettings, client_cookie: bytes) -> None:
        self.upstream = upstream
        self.settings = settings
        self.in_flight = 0
        """Questions under way with it, each in one or a few attempts."""
        self.looping = False
        """Whether what is sent there comes back here."""
        self.smoothed: float | None = None
        """Seconds, the smoothed round-trip time; None before the first reply."""
        self.failures = 0
        """In a row."""
        self.went_down = 0
        """How often it went down, trials that failed included."""
        self.client_cookie = client_cookie
        self.server_cookie = b""
        """What it sent last; empty: it has sent none."""
        self._deviation = 0.0
        self._backoff = 1
        self._down_seconds = 0.0
        self._down_until: float | None = None
        self._on_trial_until = 0.0
        self._folded = 0
        self._lower_case_until = 0.0
        self._no_edns_until = 0.0

    @property
    def timeout(self) -> float:
        """Seconds after which it is late and somebody else is asked."""
        known = self.smoothed
        seconds = (
            self.settings.first_timeout_seconds if known is None else known + 4 * self._deviation
        )
        least, most = self.settings.least_timeout_seconds, self.settings.most_timeout_seconds
        return min(max(seconds, least) * self._backoff, most)

    @property
    def is_down(self) -> bool:
        """Whether it failed so often that others are asked first."""
        return self._down_until is not None

    @property
    def is_full(self) -> bool:
        """Whether it has as many questions under way as it may."""
        return self.in_flight >= self.settings.questions_of_upstream

    def trial_is_due(self, now: float) -> bool:
        """Whether it is down and it is time to see whether it still is."""
        down = self._down_until
        return down is not None and now >= down and now >= self._on_trial_until

    def on_trial(self, now: float) -> None:
        """Note that a question is sent there to see; until it is late there is no second one."""
        self._on_trial_until = now + self.settings.most_timeout_seconds

    # What was seen of it

    def answered(self, seconds: float) -> None:
        """Note a reply that came after so many seconds and is of use."""
        self.alive()
        if self.smoothed is None:
            self.smoothed, self._deviation = seconds, seconds / 2
        else:
            self._deviation += (abs(seconds - self.smoothed) - self._deviation) / 4
            self.smoothed += (seconds - self.smoothed) / 8

    def alive(self) -> None:
        """Note a sign of life that says nothing of its speed: over TCP, or an error of its own."""
        self.failures = 0
        self._backoff = 1
        self._down_until = None
        self._down_seconds = 0.0

    def late(self, now: float) -> None:
        """Note that it did not answer within its time. It may still."""
        most = self.settings.most_timeout_seconds
        if self.timeout < most:
            self._backoff = min(self._backoff * 2, 64)
        self.failed(now)

    def failed(self, now: float) -> None:
        """Note that it did not answer, or nothing of use."""
        self.failures += 1
        if self._down_until is not None:
            if now < self._on_trial_until or now >= self._down_until:
                self._go_down(now)
        elif self.failures >= self.settings.failures_before_down:
            self._go_down(now)

    def _go_down(self, now: float) -> None:
        self._down_seconds = min(max(2 * self._down_seconds, FIRST_DOWN_SECONDS), MOST_DOWN_SECONDS)
        self._down_until = now + self._down_seconds
        self._on_trial_until = 0.0
        self.went_down += 1

    # What it understands

    def gives_back_spelling(self, now: float) -> bool:
        """Whether names are worth spelling at random."""
        return now >= self._lower_case_until

    def spelling_kept(self) -> None:
        """Note that a name came back as it was sent."""
        self._folded = 0

    def spelling_lost(self, now: float) -> None:
        """Note that a name came back in another spelling."""
        self._folded += 1
        if self._folded >= FOLDED_BEFORE_PLAIN:
            self.lower_case(now)

    def lower_case(self, now: float) -> None:
        """Have names sent there in lower case for a while."""
        self._folded = 0
        self._lower_case_until = now + PLAIN_SECONDS

    def knows_edns(self, now: float) -> bool:
        """Whether an OPT record is sent."""
        return now >= self._no_edns_until

    def without_edns(self, now: float) -> None:
        """Note that it answers without an OPT record and does not with one."""
        self._no_edns_until = now + PLAIN_SECONDS
