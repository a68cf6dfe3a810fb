"""After kube-proxy: its rules go as soon as ours are there, once, and only where that is wanted.

Lives here: when, and what is said of it. Must not: know what kube-proxy's rules are
(backends/kube_proxy.py). Which rules a first packet meets while both are there depends on who wrote
last; a kube-proxy that still runs puts its own back, and is not fought.
"""

import asyncio
import sys
from collections.abc import Callable

import msgspec
import structlog
from msgspec import Struct

# A process of its own: what removing imports is several times what the daemon has (lean.py).
_REMOVE = ("-P", "-m", "vipd.proxy.cli", "cleanup", "--only-kube-proxy", "--json")

PAUSE_SECONDS = 60.0
"""Before what could not be removed is tried again."""

log = structlog.get_logger()


class _Cleaned(Struct):
    """What `vipd cleanup --json` prints, as far as it is of interest."""

    removed: list[str]
    failed: list[str]


async def take_over(synced: asyncio.Event, again: Callable[[], None]) -> None:
    """Remove what kube-proxy left once `synced` is set; then wait until it is cancelled.

    `again` is called when it has gone: it may have stood in the way, as virtual servers of IPVS do.
    """
    await synced.wait()
    while not await _done(again):  # noqa: ASYNC110 - nothing tells when it can be done
        await asyncio.sleep(PAUSE_SECONDS)
    await asyncio.Event().wait()


async def _done(again: Callable[[], None]) -> bool:
    """Return whether nothing of kube-proxy is left."""
    try:
        done = await _removed()
    except (OSError, msgspec.DecodeError, _NotRemovedError) as error:
        log.warning("kube-proxy's rules stay", why=str(error))
        return False
    if done.removed:
        again()
        log.info("kube-proxy's rules are removed", objects=len(done.removed))
    for one in done.failed:
        log.warning("kube-proxy's rules stay", why=one)
    return not done.failed


class _NotRemovedError(Exception):
    """The command that removes them has failed as a whole."""


async def _removed() -> _Cleaned:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, *_REMOVE, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )
    try:
        printed, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if not printed:
        raise _NotRemovedError(said.decode(errors="replace").strip() or f"{process.returncode}")
    return msgspec.json.decode(printed, type=_Cleaned)
