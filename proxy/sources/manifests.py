"""Manifest files as a source: once for a command, or watched for the daemon.

Lives here: waiting for changes and reading standard input. Must not: know what is in a file
(files.py) or which files to read (reading.py).
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence

from watchfiles import awatch

from vipd.proxy.errors import SourceError
from vipd.proxy.events import Event, Synced
from vipd.proxy.model import Pod
from vipd.proxy.names import NamespacedName
from vipd.proxy.sources.reading import STDIN, Reading
from vipd.proxy.sources.tree import Watch

STEP_MILLISECONDS = 3
"""Quiet time after which a change is told; the watcher wakes up this often. Measured idle: 1.0 % of
a core at 3 ms, 0.6 % at 5 ms. Of a change, p99 from write to packet: 17 ms at 3, 20 ms at 5."""
DEBOUNCE_MILLISECONDS = 20
"""Longest wait for quiet while changes go on."""
RETRY_SECONDS = 0.25
"""Wait after a watch could not be set up."""
LOOK_AROUND_SECONDS = 10.0
"""Everything is compared this often, for file systems that tell no changes (NFS, some overlays)."""


def load(paths: Sequence[str]) -> list[Event]:
    """Return the events of all manifests under `paths`, for one-shot use; the last is Synced.

    Paths are files, folders, or ``-`` for standard input. SourceError if one does not exist.
    """
    return [*_reading(paths).refresh(time.monotonic()), Synced()]


def _reading(paths: Sequence[str]) -> Reading:
    if not paths:
        raise SourceError("no manifests are named")
    stdin = None
    if STDIN in paths:
        try:
            stdin = sys.stdin.buffer.read()
        except OSError as error:
            raise SourceError(f"standard input: {error.strerror}") from error
    return Reading(paths, stdin)


class ManifestSource:
    """Manifests under some paths, watched. SourceError if a path does not exist at the start.

    A path that vanishes later is waited for.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._reading = _reading(paths)
        self._changed: set[str] = set()
        self._all = True
        self._wake = asyncio.Event()

    @property
    def passed_over(self) -> Counter[str]:
        """How many objects of kinds that are not read there are (``apps/v1 Deployment``)."""
        return self._reading.passed_over

    def pods(self) -> dict[NamespacedName, Pod]:
        """Return the Pods by name: nothing else keeps them. May be asked from any thread."""
        return self._reading.pods()

    async def events(self) -> AsyncIterator[list[Event]]:
        """Yield what changed, as it changes; the first batch is everything and ends with Synced."""
        first: tuple[Event, ...] = (Synced(),)
        watching: Watch | None = None
        stop, tasks = asyncio.Event(), list[asyncio.Task[None]]()
        try:
            while True:
                events = await self._refresh()
                if self._reading.watch != watching or any(task.done() for task in tasks):
                    # Files may have changed before the new watch stood: read once more.
                    await _end(stop, tasks)
                    watching, stop = self._reading.watch, asyncio.Event()
                    tasks = [
                        asyncio.create_task(self._follow(paths, recursive, stop))
                        for paths, recursive in ((watching.trees, True), (watching.folders, False))
                        if paths
                    ]
                    await asyncio.sleep(0)  # each task sets up its watch before it first waits
                    events += await self._refresh()
                if events or first:
                    yield [*events, *first]
                    first = ()
                await self._wait()
        finally:
            await _end(stop, tasks)

    async def _refresh(self) -> list[Event]:
        changed = None if self._all else self._changed
        self._changed, self._all = set(), False
        self._wake.clear()
        return await asyncio.to_thread(self._reading.refresh, time.monotonic(), changed)

    async def _wait(self) -> None:
        """Return when something changed, a loss has settled, or it is time to look around."""
        due = self._reading.due
        seconds = LOOK_AROUND_SECONDS
        if due is not None:
            seconds = max(0.0, due - time.monotonic())
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            self._all = due is None

    async def _follow(self, paths: tuple[str, ...], recursive: bool, stop: asyncio.Event) -> None:
        try:
            async for changes in awatch(
                *paths,
                watch_filter=None,
                step=STEP_MILLISECONDS,
                debounce=DEBOUNCE_MILLISECONDS,
                recursive=recursive,
                stop_event=stop,
                ignore_permission_denied=True,
            ):
                self._changed.update(path for _, path in changes)
                self._wake.set()
        except* (OSError, RuntimeError):
            # The folder went away before the watch stood, there are no inotify watches left, or
            # watchfiles 1.3 met a file name that is not UTF-8 (WatchfilesRustInternalError, a
            # RuntimeError): read everything, then try again.
            await asyncio.sleep(RETRY_SECONDS)
            self._all = True
            self._wake.set()


async def _end(stop: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    stop.set()
    for task in tasks:
        await task
    tasks.clear()
