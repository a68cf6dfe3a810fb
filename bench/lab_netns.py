"""Named network namespaces: make, enter, remove, and the directory their names stand in.

Lives here: the five system calls for it that Python 3.11 does not have (os.setns and os.unshare
came with 3.12). Only the standard library, because every echo server imports this file.
Must not: know the lab's hosts, or who owns a namespace.
Names are those of iproute2: a file below /run/netns with the namespace bound over it (ip-netns(8)).
"""

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

DIRECTORY = Path("/run/netns")
PRIVATE_RUN = "vipd-lab"
"""Source name of the tmpfs that a user namespace gets over /run, by which it is known again."""

_CLONE_NEWNET = 0x40000000
_MS_BIND, _MS_REC, _MS_SHARED = 0x1000, 0x4000, 0x100000
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: int | bytes | None) -> None:
    """Call a function of libc; raise OSError where it returns other than 0."""
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source: str, target: Path, kind: str, flags: int) -> None:
    target_bytes = os.fsencode(target)
    _call("mount", source.encode(), target_bytes, kind.encode(), ctypes.c_ulong(flags).value, None)


def enter(path: Path) -> None:
    """Move the calling thread into the namespace at `path`; what it starts is born there too.

    Raise OSError (ENOENT, EPERM, or EINVAL where `path` is no namespace).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", descriptor, _CLONE_NEWNET)
    finally:
        os.close(descriptor)


def _in_new_thread(call: Callable[[], T]) -> T:
    """Return what `call` returns or raise what it raises; its thread ends with it.

    A namespace belongs to a thread, so the caller's own thread is never moved.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def inside(path: Path, call: Callable[[], T]) -> T:
    """Run `call` inside the namespace at `path`. Sockets and processes made there stay there."""

    def run() -> T:
        enter(path)
        return call()

    return _in_new_thread(run)


def create(path: Path, prepare: Callable[[], None]) -> None:
    """Make a namespace, run `prepare` inside it, then give it its name, in this order.

    A name therefore never stands for an unprepared namespace, wherever this process is killed.
    Raise FileExistsError where the name is taken.
    """

    def run() -> None:
        _call("unshare", _CLONE_NEWNET)
        prepare()
        path.touch(mode=0o444, exist_ok=False)
        _mount("/proc/thread-self/ns/net", path, "none", _MS_BIND)

    _in_new_thread(run)


def probe() -> None:
    """Raise OSError where this process may not make network namespaces."""
    _in_new_thread(lambda: _call("unshare", _CLONE_NEWNET))


def delete(path: Path) -> None:
    """Take the name away; the namespace goes with its last process and socket. Gone is success."""
    try:
        _call("umount2", os.fsencode(path), _MNT_DETACH)
    except OSError as failure:
        # EINVAL: a name whose maker was killed before it bound a namespace to it.
        if failure.errno not in (errno.EINVAL, errno.ENOENT):
            raise
    path.unlink(missing_ok=True)


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the namespace at `path`, or None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    own = Path("/proc/self/ns/net").stat()
    return (found.st_dev, found.st_ino) if found.st_dev == own.st_dev else None


def in_first_user_namespace() -> bool:
    """Whether this process is in the user namespace the machine booted with."""
    return Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


def _has_private_run() -> bool:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == "/run" and line.split()[-2] == PRIVATE_RUN for line in lines)


def _shares_mounts_with_init() -> bool:
    """Whether process 1 sees the same mounts, as in a container; False where nobody may look."""
    try:
        return os.path.samefile("/proc/1/ns/mnt", "/proc/self/ns/mnt")
    except OSError:
        return False


def prepare_directory() -> None:
    """Make /run/netns ready for names, as `ip netns add` does: shared between mount namespaces.

    Below `unshare -Urnm`, /run is the machine's and mostly not writable: a tmpfs is put over it,
    which only the processes in that mount namespace see, once. Raise OSError.
    """
    if not in_first_user_namespace() and not _has_private_run():
        writable = os.access(DIRECTORY if DIRECTORY.exists() else DIRECTORY.parent, os.W_OK)
        if not (writable and _shares_mounts_with_init()):
            _mount(PRIVATE_RUN, DIRECTORY.parent, "tmpfs", 0)
    DIRECTORY.mkdir(mode=0o755, exist_ok=True)
    try:
        _mount("", DIRECTORY, "none", _MS_SHARED | _MS_REC)
    except OSError as failure:
        if failure.errno != errno.EINVAL:  # EINVAL: not a mount point yet
            raise
        _mount(str(DIRECTORY), DIRECTORY, "none", _MS_BIND | _MS_REC)
        _mount("", DIRECTORY, "none", _MS_SHARED | _MS_REC)


@contextmanager
def locked() -> Iterator[None]:
    """Hold the lock that `ip netns add` takes too (since iproute2 5.16); a dead holder frees it."""
    descriptor = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        flock(descriptor, LOCK_EX)
        yield
    finally:
        os.close(descriptor)
