"""How a worker shares out the files that it may have open: listeners, connections, sessions.

Lives here: the arithmetic. Pure. Must not: ask for or change a limit (__main__.py), or know what is
open (tcp.py, udp.py).

A listener takes one descriptor, a TCP connection two, a UDP session one. What has no bound of its
own would be starved by what grows under load, so the bounds of connections and sessions are what is
left by the listeners and by a reserve, and a listener is refused before it would touch the reserve.
"""

from msgspec import Struct

WANTED = 1 << 18
"""Enough for 100,000 listeners beside the most connections and sessions that a worker takes."""
RESERVE = 640
"""For what is not counted: descriptors of listeners on their way (253 at most, SCM_MAX_FD), sockets
of failed attempts until the batch of events (256) is over, pipes (34), epoll, control sockets."""


class Shares(Struct, frozen=True):
    """How many there may be at once."""

    connections: int
    sessions: int


def reserve(most: int) -> int:
    """Return how many of `most` open files are kept for what is not counted."""
    return min(RESERVE, most // 4)


def shares(most: int, listeners: int, most_sessions: int) -> Shares:
    """Return what is left for connections and sessions of `most` open files.

    Sessions get a quarter of it, but no more than `most_sessions`. There is always room for one of
    both, or a worker with too many listeners would do nothing at all.
    """
    left = max(0, most - reserve(most) - listeners)
    sessions = min(most_sessions, left // 4)
    return Shares(max(1, (left - sessions) // 2), max(1, sessions))


def may_listen(most: int, used: int) -> bool:
    """Return whether there is room for one more listener beside `used` descriptors."""
    return used < most - reserve(most)
