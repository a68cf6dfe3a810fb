"""Manifest files as a source: once for a command, or watched for the daemon.

Lives here: waiting for changes and reading standard input. Must not: know what is in a file
(files.py) or which files to read (reading.py).
"""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence

from vipd.proxy import inotify
from vipd.proxy.errors import SourceError
from vipd.proxy.events import Event, Synced
from vipd.proxy.model import Pod
from vipd.proxy.names import NamespacedName
from vipd.proxy.notice import Notice
from vipd.proxy.sources.reading import STDIN, Reading
from vipd.proxy.sources.tree import Watch

QUIET_SECONDS = 0.003
"""Quiet time after which a change is told."""
LONGEST_SECONDS = 0.02
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

    async def check(self) -> None:
        """Nothing is left to be said that was not when it was made."""

    def tell(self, notice: Notice) -> None:
        """Nobody looks at objects in files: what there is to say is in the log and the status."""

    def pods(self) -> dict[NamespacedName, Pod]:
        """Return the Pods by name: nothing else keeps them. May be asked from any thread."""
        return self._reading.pods()

    async def events(self) -> AsyncIterator[list[Event]]:
        """Yield what changed, as it changes; the first batch is everything and ends with Synced."""
        first: tuple[Event, ...] = (Synced(),)
        watching: Watch | None = None
        tasks = list[asyncio.Task[None]]()
        try:
            while True:
                events = await self._refresh()
                if self._reading.watch != watching or any(task.done() for task in tasks):
                    # Files may have changed before the new watch stood: read once more.
                    await _end(tasks)
                    watching = self._reading.watch
                    tasks = [
                        asyncio.create_task(self._follow(paths, recursive))
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
            await _end(tasks)

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

    async def _follow(self, paths: tuple[str, ...], recursive: bool) -> None:
        try:
            async for changed in inotify.changes(
                paths,
                recursive=recursive,
                quiet_seconds=QUIET_SECONDS,
                longest_seconds=LONGEST_SECONDS,
            ):
                self._changed |= changed
                self._wake.set()
        except OSError:
            # A folder went away before the watch stood, there are no inotify watches left, or there
            # were more changes than the kernel remembers: read everything, then try again.
            await asyncio.sleep(RETRY_SECONDS)
            self._all = True
            self._wake.set()


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()
    tasks.clear()
