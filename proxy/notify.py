"""systemd's notification protocol: ready, stopping, and the watchdog. Silent without systemd.

Lives here: the datagrams of sd_notify(3). Must not: decide when the daemon is ready.
"""

import asyncio
import os
import socket

START_SECONDS = 20
"""How often systemd is asked for more time, for three times as long."""


def notify(message: str) -> None:
    """Send a message such as ``READY=1`` to NOTIFY_SOCKET; do nothing where that is not set."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.setblocking(False)
        try:
            sender.sendto(message.encode(), address)
        except OSError:
            return  # nobody listens: the service manager is gone, which is not our failure


async def more_time() -> None:
    """Tell systemd until cancelled that the start takes longer, as it does where the API server is
    away: else it would end the daemon after TimeoutStartSec (90 s)."""
    while True:
        notify(f"EXTEND_TIMEOUT_USEC={3 * START_SECONDS * 1_000_000}")
        await asyncio.sleep(START_SECONDS)


def watchdog_interval_seconds() -> float | None:
    """Return how often systemd wants to hear of this process (half of WatchdogSec), or None."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or os.environ.get("WATCHDOG_PID", "") not in (
        "",
        str(os.getpid()),
    ):
        return None
    return int(microseconds) / 2_000_000


async def watchdog() -> None:
    """Tell systemd forever that the event loop turns; return at once where it does not ask."""
    interval = watchdog_interval_seconds()
    while interval is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval)
