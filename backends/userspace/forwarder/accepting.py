"""Taking new connections from the listeners, in batches, as long as there is room for them.

Lives here: the listeners' epoll descriptor, batches, the pause for lack of descriptors or memory or
at the most connections. Must not: know endpoints, or what becomes of a connection.

All listeners are in one epoll descriptor of their own, level-triggered, which is itself in that of
the connections: a pause is one call, however many listeners there are, and accepting comes after
the batch of established connections. The kernel puts a listener that is still ready behind the
others, so that batches take turns.
"""

import asyncio
import contextlib
import errno
import math
import resource
import select
import socket
from collections.abc import Callable
from typing import Final

from vipd.backends import log
from vipd.backends.userspace.forwarder.keepalive import keep_alive
from vipd.backends.userspace.forwarder.tcp_limits import TcpCounters, TcpLimits

SHORTAGE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What is passing, and no fault of a client or an endpoint."""
_PASSING: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EOPNOTSUPP,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENONET,
    }
)
"""Errors of the one connection that would have been accepted (accept(2))."""
MOST_WAITING: Final = 4096
"""Connections in the queue of a listener, as net.core.somaxconn has it by default (listen(2))."""
_LISTENERS: Final = 64
"""Listeners in one batch."""

Start = Callable[[int, int, tuple[str, int]], None]
"""Is called with the listener's descriptor, the new one, which is blocking, and the client."""


class Accepting:
    """The listeners, and whether they are accepted from.

    `descriptor` is readable when `ready` is to be called; it is in `epoll` but during a pause.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        epoll: select.epoll,
        limits: TcpLimits,
        counters: TcpCounters,
        start: Start,
        resumed: Callable[[], None],
    ) -> None:
        self.taken = 0
        """Connections that were accepted and are not over."""
        self._loop = loop
        self._epoll = epoll
        self._limits = limits
        self.allow(limits.most)
        self._counters = counters
        self._start = start
        self._resumed = resumed
        self._listening = select.epoll()
        self._listeners: dict[int, socket.SocketType] = {}
        self._by_client: dict[str, int] = {}
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._last_shortage = float("-inf")
        self._episode: asyncio.TimerHandle | None = None
        """Set from the first shortage until there was none for a while."""
        self.descriptor = self._listening.fileno()
        epoll.register(self.descriptor, select.EPOLLIN)

    def __len__(self) -> int:
        """Return how many listeners there are."""
        return len(self._listeners)

    @property
    def is_short(self) -> bool:
        """Whether accept is paused, or was a moment ago: pauses are short and follow each other."""
        recent = self._last_shortage + 10 * self._limits.pause_seconds
        return self._paused or self._loop.time() < recent

    def allow(self, most: int) -> None:
        """Have no more than so many from now on; beyond, clients wait in the listeners' queues."""
        self.most = min(most, self._limits.most)
        self._most_of_client = math.ceil(self.most * self._limits.of_client)

    def add(self, listener: socket.SocketType) -> None:
        """Accept from this listener from now on. What connections inherit is set on it."""
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(listener)
        self._listening.register(listener.fileno(), select.EPOLLIN)
        self._listeners[listener.fileno()] = listener

    def remove(self, listener: socket.SocketType) -> None:
        """Accept from this listener no more; it is not closed."""
        with contextlib.suppress(FileNotFoundError):  # if it is out of order
            self._listening.unregister(listener.fileno())
        del self._listeners[listener.fileno()]

    def ready(self) -> None:
        """Accept a batch from each listener that has connections waiting."""
        for descriptor, _ in self._listening.poll(0, _LISTENERS):
            listener = self._listeners[descriptor]
            for _ in range(self._limits.accepts_at_once):
                if self.taken >= self.most:
                    self.pause("connections")
                if self._paused or not self._accept(listener):
                    break
            if self._paused:
                return

    def take_all(self, listener: socket.SocketType) -> None:
        """Accept what waits at a listener that is about to be closed, bounds or not.

        No more than a queue can hold: clients may go on coming.
        """
        for _ in range(MOST_WAITING):
            if not self._accept(listener):
                return

    def came(self, client: str) -> bool:
        """Count a connection of a client. Returns whether that is within the client's share."""
        there = self._by_client.get(client, 0)
        self._by_client[client] = there + 1
        return there < self._most_of_client

    def left(self, client: str) -> None:
        """Count a connection that came and is over."""
        self.taken -= 1
        there = self._by_client[client] - 1
        if there:
            self._by_client[client] = there
        else:
            del self._by_client[client]

    def pause(self, reason: str) -> None:
        """Accept nothing until a descriptor is freed, or the time of a pause is over."""
        if not self._paused:
            self._paused = True
            self._counters.accept_paused += 1
            self._epoll.unregister(self.descriptor)
        self._last_shortage = self._loop.time()
        if self._episode is None:
            log.warning(
                "accept is paused",
                lack_of=reason,
                connections=self.taken,
                most=self.most,
                files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            )
            self._episode = self._loop.call_later(self._limits.quiet_seconds, self._look)
        if self._timer is None:
            self._timer = self._loop.call_later(self._limits.pause_seconds, self._over)

    def freed(self) -> None:
        """Say that descriptors were freed."""
        if self._paused:
            self._resume()

    def close(self) -> None:
        """Close what is here, and all listeners."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._episode is not None:
            self._episode.cancel()
            self._episode = None
        self._listening.close()
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()

    def _accept(self, listener: socket.SocketType) -> bool:
        """Accept one connection. Returns whether there may be another."""
        try:
            # What socket.accept() calls; the object that it would make costs more than all this.
            accepted: tuple[int, tuple[str, int]] = listener._accept()  # type: ignore[attr-defined]
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in SHORTAGE:
                self.pause(errno.errorcode[error.errno])
                return False
            if error.errno in _PASSING:
                return True
            # A listener that does not listen would be ready for ever.
            log.exception("a listener is out of order", listener=str(listener.getsockname()))
            with contextlib.suppress(FileNotFoundError):
                self._listening.unregister(listener.fileno())
            return False
        self.taken += 1
        self._counters.accepted += 1
        self._start(listener.fileno(), accepted[0], accepted[1])
        return True

    def _look(self) -> None:
        """Say that the shortage is over, unless there was one within the last while."""
        left = self._last_shortage + self._limits.quiet_seconds - self._loop.time()
        if self._paused or left > 0:
            pause = max(left, self._limits.pause_seconds)
            self._episode = self._loop.call_later(pause, self._look)
            return
        self._episode = None
        log.warning("accept goes on again", connections=self.taken, most=self.most)

    def _over(self) -> None:
        self._timer = None
        if self._paused:
            self._resume()

    def _resume(self) -> None:
        """Accept again, those first that wait for a descriptor; they may pause it again."""
        self._paused = False
        self._epoll.register(self.descriptor, select.EPOLLIN)
        self._resumed()
