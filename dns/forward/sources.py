"""Files that say whom to ask and what is known here: read with bounds, and watched.

Lives here: opening resolv.conf and hosts files, and noticing that they changed. Must not: know what
their text means (resolv_conf.py, hosts.py).

Watched are folders, for such files are replaced rather than written (renamed, or a symbolic link
moved, as kubelet does); every few seconds it is looked anyway, for not every file system tells.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Collection
from pathlib import Path

from vipd.dns.forward.hosts import Hosts, parse_hosts
from vipd.dns.forward.resolv_conf import ResolvConf, parse_resolv_conf
from vipd.dns.forward.settings import SYSTEMD_STUBS
from vipd.proxy import inotify

SYSTEMD_RESOLV_CONF = "/run/systemd/resolve/resolv.conf"
MOST_RESOLV_CONF_BYTES = 64 << 10
MOST_HOSTS_BYTES = 1 << 20
LOOK_SECONDS = 5.0
_QUIET_SECONDS = 0.05
_LONGEST_SECONDS = 0.2

Signature = tuple[int, int, int]


def read_resolv_conf(path: str, systemd: str = SYSTEMD_RESOLV_CONF) -> ResolvConf:
    """Return what it says. Raise OSError, or ValueError where it is too long.

    Where it names systemd-resolved's own listener and nothing else, what that one asks is returned.
    """
    found = parse_resolv_conf(_text(path, MOST_RESOLV_CONF_BYTES))
    if found.upstreams and all(one.address in SYSTEMD_STUBS for one in found.upstreams):
        try:
            return parse_resolv_conf(_text(systemd, MOST_RESOLV_CONF_BYTES))
        except OSError:
            return found  # somebody else listens there
    return found


def read_hosts(path: str) -> Hosts:
    """Return what it says. Raise OSError, or ValueError where it is too long."""
    return parse_hosts(_text(path, MOST_HOSTS_BYTES))


def _text(path: str, most: int) -> str:
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} is longer than {most} bytes")
    return data.decode("utf-8", "replace")


def signature(path: str) -> Signature | None:
    """Return what tells one state of a file from another, None where there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


async def changes(
    paths: Collection[str], look_seconds: float = LOOK_SECONDS
) -> AsyncGenerator[set[str], None]:
    """Yield the files that are other than they were: first all of them, then as any changes.

    Read them after that, and no change is missed: one that comes meanwhile is told next time.
    """
    known: dict[str, Signature | None] = {}
    stirred = asyncio.Event()
    folders: set[str] = set()
    watching: asyncio.Task[None] | None = None
    try:
        while True:
            stirred.clear()
            if watching is None or watching.done() or folders != _folders(paths):
                await _end(watching)
                folders = _folders(paths)
                watching = asyncio.create_task(_watch(folders, stirred))
                await asyncio.sleep(0)  # the watch stands when the task first waits
            now = {one: signature(one) for one in paths}
            other = {one for one in paths if one not in known or now[one] != known[one]}
            known = now
            if other:
                yield other
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(look_seconds):
                    await stirred.wait()
    finally:
        await _end(watching)


async def _watch(folders: set[str], stirred: asyncio.Event) -> None:
    """Set the event whenever something happens in the folders; end where that cannot be known."""
    try:
        async for _ in inotify.changes(
            folders, recursive=False, quiet_seconds=_QUIET_SECONDS, longest_seconds=_LONGEST_SECONDS
        ):
            stirred.set()
    except OSError:
        # A folder has gone, or there are no inotify watches left: it is looked now and then.
        pass


async def _end(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _folders(paths: Collection[str]) -> set[str]:
    """Return the folders of the files, and of those that they are links to."""
    found = {str(Path(one).parent) for one in paths} | {
        str(Path(os.path.realpath(one)).parent) for one in paths
    }
    return {one for one in found if os.path.isdir(one)}
