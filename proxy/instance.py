"""One daemon for each network namespace: a lock that the kernel releases with its last holder.

Lives here: the lock file. Must not: know what the daemon does.

The lock is a flock(2) on an inherited descriptor: the `nft` that a killed daemon leaves behind
holds it until its transaction is over, so that a new daemon never observes half of one.
"""

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

from vipd.proxy.errors import ConfigError, InUseError

PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.02


def take(fallback: Path) -> int:
    """Return the descriptor that holds this network namespace's lock.

    The file is in /run/vipd, or in `fallback` where that cannot be written (no root). Raise
    InUseError where another daemon has it, ConfigError where there is no place for the file.
    """
    inode = os.stat("/proc/self/ns/net").st_ino
    path = _folder(fallback) / f"netns-{inode}.lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(str(path), os.strerror(error.errno or 0)) from error
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
            if error.errno != errno.EWOULDBLOCK or _alive(holder) or time.monotonic() > deadline:
                os.close(lock)
                whose = f"pid {holder}" if holder else "of unknown pid"
                raise InUseError(f"vipd ({whose}) serves this network namespace") from error
            # Its last transaction is still running: flock has no timeout, so ask again.
            time.sleep(_POLL_SECONDS)
        else:
            if not _is_still(path, lock):
                os.close(lock)
                return take(fallback)  # a cleanup removed the file while this one waited for it
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            return lock


def discard(lock: int) -> None:
    """Remove the lock file that this process holds, as the last trace of vipd."""
    path = os.readlink(f"/proc/self/fd/{lock}")
    with contextlib.suppress(OSError):
        os.unlink(path)


def _is_still(path: Path, lock: int) -> bool:
    """Return whether the locked descriptor is the file that the path names now."""
    try:
        return os.stat(path).st_ino == os.fstat(lock).st_ino
    except FileNotFoundError:
        return False


def _folder(fallback: Path) -> Path:
    run = Path("/run/vipd")
    try:
        run.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return fallback
    return run if os.access(run, os.W_OK) else fallback


def _alive(pid: str) -> bool:
    return pid.isdecimal() and Path(f"/proc/{pid}").exists()
