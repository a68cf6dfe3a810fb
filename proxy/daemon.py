"""The daemon: one source, one sync, its dataplanes and the control socket, until told to stop.

Lives here: in which order the parts (parts.py) start and end, and the signals. Must not: decide
anything about services. Ending leaves the dataplane in place, so that traffic survives a restart,
unless its removal is asked for.
"""

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import structlog

from vipd.backends.registry import backend
from vipd.proxy import control, instance, lean, record
from vipd.proxy.choice import begin, choose, require
from vipd.proxy.config import Config, Flags
from vipd.proxy.errors import Unsupported
from vipd.proxy.notify import more_time, notify, watchdog
from vipd.proxy.parts import Parts
from vipd.proxy.sources.protocol import Source
from vipd.proxy.switching import Switching
from vipd.proxy.sync import Sync
from vipd.proxy.version import VERSION

LONGEST_WITHOUT_COLLECTION_SECONDS = 30.0

AtExit = Callable[[str, Sequence[int]], Awaitable[None]]
"""Called with the path of the control socket, and descriptors that hold this network namespace."""

log = structlog.get_logger()


async def run(
    config: Config,
    source: Source,
    flags: Flags | None = None,
    *,
    after_kube_proxy: bool = False,
    at_exit: AtExit | None = None,
) -> None:
    """Serve what the source says until SIGTERM or SIGINT, then do what is left to do `at_exit`.

    `flags` name the configuration file that is followed, if any. `after_kube_proxy`: what that left
    is removed once everything is programmed. Raise ConfigError, SourceError or
    Unsupported where it cannot start; nothing is programmed then.
    """
    started = time.time()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Before anything is made; it may take a while.
    await _until_one_ends(source.check(), stop.wait())
    if stop.is_set():
        log.info("stop", dataplane="left in place")
        return
    if os.geteuid() != 0:
        await choose(config)
    with contextlib.closing(instance.take()) as lock:
        start = await begin(config, record.read(Path(config.socket).parent / record.RECORD))
        synced = asyncio.Event()
        starting = asyncio.ensure_future(more_time())

        def on_synced() -> None:
            starting.cancel()
            _synced()
            synced.set()

        parts = Parts(config, source, flags or Flags(), start, (lock.fileno(),), started, on_synced)
        loop.add_signal_handler(signal.SIGHUP, parts.on_hangup)
        server = await control.serve(config.socket, parts.requests)
        log.info("start", version=VERSION, mode=start.state.serving, node=config.node.node_name)
        if parts.switching.why:
            log.info("mode chosen", mode=start.state.serving, why=parts.switching.why)
        # Hardly any garbage arises while everything that is read is kept: see _synced. If the
        # first sync does not come, collections have to.
        gc.disable()
        loop.call_later(LONGEST_WITHOUT_COLLECTION_SECONDS, gc.enable)
        watching = asyncio.ensure_future(watchdog_forever())
        try:
            # May be refused, so before anything is programmed.
            parts.http.open()
            await parts.dns.start()
            await _until_one_ends(
                stop.wait(),
                _following(parts.sync, source),
                _serving(parts.switching, config),
                *parts.running(),
                *_beside(parts, synced, after_kube_proxy),
            )
        finally:
            notify("STOPPING=1")
            for one in (starting, watching):
                one.cancel()
            await asyncio.gather(starting, watching, return_exceptions=True)
            await parts.stop()
            server.close()
            with contextlib.suppress(OSError):
                os.unlink(config.socket)
            if not (at_exit and stop.is_set()):
                log.info("stop", dataplane="left in place")
        if at_exit:
            await at_exit(config.socket, (lock.fileno(),))


def _beside(
    parts: Parts, synced: asyncio.Event, after_kube_proxy: bool
) -> tuple[Coroutine[Any, Any, None], ...]:
    if not after_kube_proxy:
        return ()
    from vipd.proxy.handover import take_over

    def again() -> None:
        parts.switching.serving.retry_rejected()

    return (take_over(synced, again),)


async def watchdog_forever() -> None:
    """Feed systemd's watchdog where there is one, else wait."""
    await watchdog()
    await asyncio.Event().wait()


async def _until_one_ends(*work: Coroutine[Any, Any, Any]) -> None:
    """Run all side by side until the first ends, and raise what it raised; the others end, too."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _following(sync: Sync, source: Source) -> None:
    """Follow the source; once it has ended, keep serving what it said."""
    await sync.run(source.events())
    await asyncio.Event().wait()


async def _serving(switching: Switching, config: Config) -> None:
    try:
        await switching.run()
    except Unsupported:
        # Say everything that is missing, not only what failed first.
        await require(backend(switching.state.serving, config.dataplane))
        raise


def _synced() -> None:
    """Tell systemd; what was loaded stays for good, so collections need not look at it again."""
    gc.freeze()
    gc.enable()
    notify("READY=1")
    lean.give_back()
