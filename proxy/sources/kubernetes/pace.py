"""How long to wait before the API server is asked again after a failure.

Lives here: the time, which doubles and is spread by chance so that nodes do not come at once.
"""

from collections.abc import Callable

FIRST_SECONDS = 0.25
LONGEST_SECONDS = 30.0
"""As client-go's reflector (backoff manager: up to 30 s); it begins with 0.8 s."""
LONGEST_ASKED_SECONDS = 300.0
"""A Retry-After beyond this is cut: no server may silence a node for good."""


class Pace:
    """The waits between one success and the next. `lots` returns a number in [0, 1)."""

    def __init__(self, lots: Callable[[], float]) -> None:
        self._lots = lots
        self._next = FIRST_SECONDS

    def failed(self, asked: float | None = None) -> float:
        """Return for how many seconds to wait; `asked` is the server's Retry-After in seconds."""
        span = self._next
        self._next = min(2 * span, LONGEST_SECONDS)
        wait = span * (0.5 + 0.5 * self._lots())
        if asked is None:
            return wait
        # Not all at the very moment that was named.
        return max(wait, min(asked, LONGEST_ASKED_SECONDS) * (1 + 0.1 * self._lots()))

    def worked(self) -> None:
        """Begin anew with the shortest wait."""
        self._next = FIRST_SECONDS
