"""The daemon: one source, one sync, the control socket, until it is told to stop.

Lives here: what runs side by side and in which order it starts and ends. Must not: decide anything
about services. Ending leaves the dataplane in place, so that traffic survives a restart.
"""

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from msgspec import Raw

from vipd.backends.registry import Backend, backend
from vipd.proxy import control, instance, views
from vipd.proxy.config import Config
from vipd.proxy.errors import Unsupported
from vipd.proxy.notify import notify, watchdog
from vipd.proxy.sources.manifests import ManifestSource
from vipd.proxy.status import Status, judged
from vipd.proxy.sync import Sync
from vipd.proxy.version import VERSION

LONGEST_WITHOUT_COLLECTION_SECONDS = 30.0

log = structlog.get_logger()


async def run(config: Config, source: ManifestSource) -> None:
    """Serve what the source says until SIGTERM or SIGINT.

    Raise ConfigError, SourceError or Unsupported where it cannot start; nothing is programmed then.
    """
    started = time.time()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if os.geteuid() != 0:
        await _require(backend(config.mode))  # before anything is made
    lock = instance.take()
    dataplane = backend(config.mode, inherited=(lock.fileno(),))
    sync: Sync[Any, Any, Any] = Sync(
        config.node, dataplane.compiler, dataplane.driver, on_synced=_synced
    )
    server = await control.serve(config.socket, _readers(config, sync, source, dataplane, started))
    log.info("start", version=VERSION, mode=config.mode, node=config.node.node_name)
    # Hardly any garbage arises while everything that is read is kept: see _synced. If the first
    # sync does not come, collections have to.
    gc.disable()
    loop.call_later(LONGEST_WITHOUT_COLLECTION_SECONDS, gc.enable)
    tasks = [
        asyncio.ensure_future(one)
        for one in (stop.wait(), _syncing(sync, source, dataplane), watchdog_forever())
    ]
    try:
        await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks[:2]:
            if task.done():
                task.result()
    finally:
        notify("STOPPING=1")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server.close()
        with contextlib.suppress(OSError):
            os.unlink(config.socket)
        lock.close()
        lock.close()
        log.info("stop", dataplane="left in place")


async def watchdog_forever() -> None:
    """Feed systemd's watchdog where there is one, else wait."""
    await watchdog()
    await asyncio.Event().wait()


async def _syncing(sync: Sync[Any, Any, Any], source: ManifestSource, dataplane: Backend) -> None:
    """Run the sync; once the source has ended, keep serving what it said."""
    try:
        await sync.run(source.events())
    except Unsupported:
        await _require(dataplane)  # says everything that is missing, not only what failed first
        raise
    await asyncio.Event().wait()


async def _require(dataplane: Backend) -> None:
    """Raise Unsupported where the mode cannot work here, with all that is missing."""
    capabilities = await dataplane.driver.probe()
    missing = [one for one in capabilities.found if one.needed and not one.present]
    if missing:
        raise Unsupported(
            f"mode {capabilities.mode} does not work here",
            "; ".join(f"no {one.name}: {one.remedy or one.detail}" for one in missing),
        )


def _synced() -> None:
    """Tell systemd; what was loaded stays for good, so collections need not look at it again."""
    gc.freeze()
    gc.enable()
    notify("READY=1")


def _readers(
    config: Config,
    sync: Sync[Any, Any, Any],
    source: ManifestSource,
    dataplane: Backend,
    started: float,
) -> dict[str, Callable[[], Awaitable[object]]]:
    """Return what the control socket answers, by name. The pure work is done off the event loop."""

    async def status() -> Status:
        table = sync.table
        servers, endpoints = await asyncio.to_thread(views.counts, table)
        notes = await asyncio.to_thread(views.notes, sync.snapshot, table, config.node)
        said = Status(
            version=VERSION,
            pid=os.getpid(),
            mode=config.mode,
            node=config.node.node_name,
            manifests=config.manifests,
            started=started,
            synced=sync.synced,
            services=len(sync.snapshot.services),
            virtual_servers=servers,
            endpoints=endpoints,
            syncs=sync.syncs,
            failed_syncs=sync.failed_syncs,
            last_sync=sync.last_sync,
            failure=sync.failure,
            problems=tuple(str(error) for error in sync.problems.values()),
            conflicts=tuple(map(str, sync.table.contested.values())),
            rejected=tuple(f"{key}: {error}" for key, error in sync.rejected.items()),
            notes=notes,
            passed_over=views.passed_over(source.passed_over),
        )
        return judged(said)

    async def services() -> list[views.VirtualServerView]:
        return await asyncio.to_thread(views.services, sync.table.virtual_servers())

    async def program() -> Raw:
        if sync.program is None:
            return Raw(b"null")
        return Raw(await asyncio.to_thread(dataplane.compiler.dump, sync.program))

    async def settings() -> object:
        return views.settings(config.mode, config.node)

    return {"status": status, "services": services, "program": program, "settings": settings}
