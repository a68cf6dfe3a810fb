"""The loop of a load worker: sockets that are ready, and calls that are due.

Lives here: one epoll and one heap. Not asyncio: at a thousand connections a second its streams
cost more than the connections. Must not: know what a connection is for.
"""

import heapq
import itertools
import select
import time
from collections.abc import Callable

_LONGEST_WAIT_SECONDS = 0.5


class Loop:
    """Calls back when a descriptor is ready or a moment has come. One thread, no locks."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._calls: dict[int, Callable[[], None]] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._stopped = False

    def watch(self, descriptor: int, call: Callable[[], None]) -> None:
        """Call whenever something changed (edge-triggered): it must read or write until EAGAIN."""
        self._calls[descriptor] = call
        # Errors and hang-ups are always told.
        self._poll.register(descriptor, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def watch_input(self, descriptor: int, call: Callable[[], None]) -> None:
        """Call as long as there is something to read; for pipes."""
        self._calls[descriptor] = call
        self._poll.register(descriptor, select.EPOLLIN)

    def forget(self, descriptor: int) -> None:
        """Stop watching; to be called right before the descriptor is closed."""
        if self._calls.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    def at(self, moment: float, call: Callable[[], None]) -> None:
        """Call at a moment of the monotonic clock."""
        heapq.heappush(self._due, (moment, next(self._numbers), call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call so many seconds from now."""
        self.at(time.monotonic() + seconds, call)

    def stop(self) -> None:
        """Return from `run` soon."""
        self._stopped = True

    def run(self) -> None:
        """Serve until stopped."""
        while not self._stopped:
            for descriptor, _ in self._poll.poll(self._wait()):
                if (call := self._calls.get(descriptor)) is not None:
                    call()
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                heapq.heappop(self._due)[2]()

    def _wait(self) -> float:
        if not self._due:
            return _LONGEST_WAIT_SECONDS
        return min(max(0.0, self._due[0][0] - time.monotonic()), _LONGEST_WAIT_SECONDS)
