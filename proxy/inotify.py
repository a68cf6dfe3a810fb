"""Folders watched for changes, by inotify(7).

Lives here: the system calls, events to paths, and the watches of folders that come and go below a
folder. Must not: know what is in the folders.

Nothing runs while nothing happens: the descriptor is one of the loop's. Not by watchfiles: its
import is 2 MB of each process, and it wakes up every few milliseconds to look (1 % of a core at 3).
"""

import asyncio
import ctypes
import errno
import os
import struct
from collections.abc import AsyncGenerator, Collection, Iterator

_HEADER = struct.Struct("=iIII")
"""struct inotify_event: watch, mask, cookie, length of the name behind it."""
_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF = 0x400, 0x800
_OVERFLOW, _IGNORED, _ONLY_FOLDERS = 0x4000, 0x8000, 0x1000000
_OTHER_NAMES = _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
_WANTED = (
    _OTHER_NAMES | _MODIFY | _ATTRIB | _CLOSE_WRITE | _DELETE_SELF | _MOVE_SELF | _ONLY_FOLDERS
)
_AT_ONCE = 1 << 16
"""Bytes of events in one read."""


class Inotify:
    """Watches of folders, and of all below them where `recursive`, also by links to folders.

    A folder is known by one path, the first in the order of names. Raise OSError where one of
    `paths` cannot be watched; what lies below and cannot be is left out.
    """

    def __init__(self, paths: Collection[str], *, recursive: bool) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._roots = tuple(paths)
        self._recursive = recursive
        self._paths: dict[int, str] = {}
        """By number of the watch."""
        self._folders: set[str] = set()
        """The same paths."""
        self.descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0:
            raise _error("inotify")
        try:
            self._watch_roots()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Watch no more."""
        os.close(self.descriptor)

    def changed(self) -> set[str]:
        """Return the paths of what has changed since the last call.

        Of a folder that came it is the folder's path, and not what it held already; where a folder
        has gone or got another name, also `paths`. Raise OSError where events were lost, or one of
        `paths` cannot be watched any more.
        """
        found: set[str] = set()
        stale = False
        while True:
            try:
                data = os.read(self.descriptor, _AT_ONCE)
            except BlockingIOError:
                break
            for watch, mask, name in _events(data):
                if mask & _OVERFLOW:
                    raise OSError(errno.EOVERFLOW, "more changes than the kernel remembers")
                if mask & _IGNORED:  # the folder is gone
                    self._folders.discard(self._paths.pop(watch, ""))
                elif (folder := self._paths.get(watch)) is not None:
                    path = os.path.join(folder, name) if name else folder
                    found.add(path)
                    if name and mask & _OTHER_NAMES and self._recursive:
                        stale = stale or path in self._folders
                        self._come(path)
        if stale:  # some paths are not what they were
            self._watch_anew()
            found.update(self._roots)
        return found

    def _watch_roots(self) -> None:
        for path in self._roots:
            if self._watch(path) and self._recursive:
                self._watch_below(path)

    def _watch_anew(self) -> None:
        for watch in self._paths:
            self._libc.inotify_rm_watch(self.descriptor, watch)
        self._paths.clear()
        self._folders.clear()
        self._watch_roots()

    def _come(self, path: str) -> None:
        """Watch what came, if it is a folder or a link to one."""
        if os.path.isdir(path):
            try:
                if self._watch(path):
                    self._watch_below(path)
            except OSError as error:
                _pass_over(error)

    def _watch(self, path: str) -> bool:
        """Watch a folder; return whether it was not yet, by whatever path."""
        watch = self._libc.inotify_add_watch(self.descriptor, os.fsencode(path), _WANTED)
        if watch < 0:
            raise _error(path)
        if watch in self._paths:
            return False
        self._paths[watch] = path
        self._folders.add(path)
        return True

    def _watch_below(self, path: str) -> None:
        waiting = _folders(path)
        while waiting:
            one = waiting.pop()
            try:
                if self._watch(one):
                    waiting += _folders(one)
            except OSError as error:
                _pass_over(error)


async def changes(
    paths: Collection[str], *, recursive: bool, quiet_seconds: float, longest_seconds: float
) -> AsyncGenerator[set[str], None]:
    """Yield the paths of what changed in folders (see Inotify), as it changes.

    The watch stands when this first waits. A change is told after `quiet_seconds` without another,
    or after `longest_seconds`. Raise OSError where folders cannot be watched or events were lost.
    """
    loop = asyncio.get_running_loop()
    inotify = Inotify(paths, recursive=recursive)
    try:
        while True:
            await _readable(loop, inotify.descriptor)
            until = loop.time() + longest_seconds
            found = more = inotify.changed()
            while more and loop.time() < until:
                await asyncio.sleep(quiet_seconds)
                more = inotify.changed()
                found |= more
            if found:
                yield found
    finally:
        inotify.close()


async def _readable(loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
    readable = asyncio.Event()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(descriptor)


def _events(data: bytes) -> Iterator[tuple[int, int, str]]:
    start = 0
    while start + _HEADER.size <= len(data):
        watch, mask, _, length = _HEADER.unpack_from(data, start)
        start += _HEADER.size
        yield watch, mask, os.fsdecode(data[start : start + length].rstrip(b"\0"))
        start += length


def _folders(path: str) -> list[str]:
    """Return the folders in a folder, and the links to any, the first in order of names last."""
    try:
        with os.scandir(path) as entries:
            return sorted((one.path for one in entries if one.is_dir()), reverse=True)
    except OSError:
        return []


def _pass_over(error: OSError) -> None:
    """Raise the errors that are not of one folder: no room for another watch, or no memory."""
    if error.errno in (errno.ENOSPC, errno.ENOMEM):
        raise error


def _error(path: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)
