"""One daemon for each network namespace: a name that the kernel gives back with its last holder.

Lives here: the lock. Must not: know what the daemon does.

The lock is a listening Unix socket with an abstract name. Such names belong to the network
namespace, whatever the file systems look like, and leave nothing behind (unix(7)). The descriptor
is inherited by each `nft`: what a killed daemon leaves behind holds the name until its transaction
is over, so that a new daemon never observes half of one.
"""

import errno
import os
import socket
import struct
import time
from pathlib import Path

import structlog

from vipd.proxy.errors import InUseError

NAME = b"\0vipd"
PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.02

log = structlog.get_logger()


def take() -> socket.socket:
    """Return the socket that holds this network namespace; it is given back when it is closed.

    Raise InUseError where another vipd of this user has it. A stranger who took the name cannot
    keep vipd from starting; then nothing tells two daemons apart, which is logged.
    """
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            lock.bind(NAME)
            lock.listen(4096)  # nobody accepts: each who asks takes a place for good
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            holder = _holder()
            if holder is None:
                continue  # given back in this moment
            pid, user = holder
            if user != os.geteuid():
                log.warning("name taken by a stranger", name="@vipd", pid=pid, uid=user)
                return lock
            if _alive(pid) or time.monotonic() > deadline:
                lock.close()
                raise InUseError(f"vipd (pid {pid}) serves this network namespace") from error
            # Killed, and its last transaction is still running: there is no event to wait for.
            time.sleep(_POLL_SECONDS)
        else:
            return lock


def _holder() -> tuple[int, int] | None:
    """Return pid and user of who listens on the name, as they were then; None where nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as asking:
        asking.setblocking(False)  # a full backlog must not keep us: see below
        try:
            asking.connect(NAME)
        except ConnectionRefusedError:
            return None
        except BlockingIOError:
            return 0, os.geteuid()
        told = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", told)
    return pid, user


def _alive(pid: int) -> bool:
    # 0 is a process that this pid namespace cannot see.
    return pid == 0 or Path(f"/proc/{pid}").exists()
