"""The prober of `vipd bench sync`: short TCP connections from a client, and what became of them.

Lives here: one attempt, and the waits built from attempts. Runs in a thread that is inside the
client's namespace. Must not: know what is being measured.
"""

import errno
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address

from vipd.bench.sync_cluster import PORT

PATIENCE_SECONDS = 0.003
"""How long one attempt waits for an answer: the resolution of the figures, well above the round
trip in the lab (about 0.1 ms)."""
STREAK = 16
"""So many connections in a row that miss an endpoint mean that it is gone: of two endpoints, one
is missed 16 times by chance once in 65,536 cases."""
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class NoAnswerError(Exception):
    """What was waited for did not come in time."""


def attempt(address: IPv4Address, patience: float = PATIENCE_SECONDS) -> str | None:
    """Connect once; return the address of the endpoint that answered, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as trying:
        trying.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        if trying.connect_ex((str(address), PORT)) not in (0, errno.EINPROGRESS):
            return None
        poll = select.poll()
        poll.register(trying, select.POLLIN)
        if not poll.poll(patience * 1000):
            return None
        try:
            return trying.recv(64).decode() or None
        except OSError:
            return None


def until(seen: Callable[[str | None], bool], address: IPv4Address, timeout: float) -> float:
    """Return the moment of the first attempt whose outcome satisfies `seen`."""
    deadline = time.monotonic() + timeout
    while True:
        outcome = attempt(address)
        now = time.monotonic()
        if seen(outcome):
            return now
        if now > deadline:
            raise NoAnswerError(f"{address}: {outcome} after {timeout:.0f} s")


def until_gone(endpoint: str, address: IPv4Address, timeout: float) -> float:
    """Return the moment of the first of STREAK answers in a row by other endpoints."""
    deadline = time.monotonic() + timeout
    first, streak = 0.0, 0
    while streak < STREAK:
        outcome = attempt(address)
        now = time.monotonic()
        if outcome is None or outcome == endpoint:
            streak = 0
        else:
            first = now if streak == 0 else first
            streak += 1
        if now > deadline:
            raise NoAnswerError(f"{address}: {endpoint} still answers after {timeout:.0f} s")
    return first


def until_unanswered(address: IPv4Address, timeout: float) -> float:
    """Return the moment of the start of the first attempt that nobody answers."""
    deadline = time.monotonic() + timeout
    while True:
        start = time.monotonic()
        # A lost time slice must not look like a missing service, so wait longer, and twice.
        if attempt(address, 0.05) is None and attempt(address, 0.05) is None:
            return start
        if start > deadline:
            raise NoAnswerError(f"{address} still answers after {timeout:.0f} s")


def until_all(
    sample: Iterable[IPv4Address],
    everything: Iterable[IPv4Address],
    timeout: float,
    alive: Callable[[], None],
) -> float:
    """Return the moment when the last of `everything` has begun to answer.

    While the sample is waited for, only that is probed, to leave the processor to what is measured;
    then everything is asked once, and whatever does not answer at once counts as later. `alive`
    raises where there is nothing to wait for.
    """
    deadline = time.monotonic() + timeout
    last = 0.0
    for address in sample:
        while (outcome := attempt(address)) is None:
            alive()
            if time.monotonic() > deadline:
                raise NoAnswerError(f"{address}: {outcome} after {timeout:.0f} s")
        last = time.monotonic()
    left = [one for one in everything if attempt(one, 0.1) is None]
    while left:
        left = [one for one in left if attempt(one, 0.1) is None]
        last = time.monotonic()
        if last > deadline:
            raise NoAnswerError(f"{len(left)} services do not answer, {left[0]} among them")
    return last
