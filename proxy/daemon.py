"""The daemon: one source, one sync, its dataplanes and the control socket, until told to stop.

Lives here: what runs side by side and in which order it starts and ends. Must not: decide anything
about services. Ending leaves the dataplane in place, so that traffic survives a restart.
"""

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import structlog

from vipd.backends.nftables.tool import Nft
from vipd.backends.registry import NEED_OWN_ADDRESSES, Backend, backend
from vipd.backends.skeleton import Skeleton
from vipd.dns.server.service import DnsService
from vipd.proxy import control, instance, lean, record
from vipd.proxy.answers import Answers
from vipd.proxy.choice import begin, choose, require
from vipd.proxy.config import Config, Flags
from vipd.proxy.departures import Departures
from vipd.proxy.dns_way import DnsWay
from vipd.proxy.errors import Unsupported
from vipd.proxy.events import Event
from vipd.proxy.notify import notify, watchdog
from vipd.proxy.reload import Reloading
from vipd.proxy.snapshot import Snapshot, Touched
from vipd.proxy.sources.addresses import FollowedAddresses
from vipd.proxy.sources.protocol import Source
from vipd.proxy.switching import Switching
from vipd.proxy.sync import Sync
from vipd.proxy.unreplied import Unreplied
from vipd.proxy.version import VERSION
from vipd.proxy.virtualserver import Changes, Key, Table

LONGEST_WITHOUT_COLLECTION_SECONDS = 30.0

log = structlog.get_logger()


async def run(config: Config, source: Source, flags: Flags | None = None) -> None:
    """Serve what the source says until SIGTERM or SIGINT.

    `flags` name the configuration file that is followed, if any. Raise ConfigError, SourceError or
    Unsupported where it cannot start; nothing is programmed then.
    """
    started = time.time()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await source.check()  # before anything is made
    if os.geteuid() != 0:
        await choose(config)
    lock = instance.take()
    inherited = (lock.fileno(),)
    state_directory = Path(config.socket).parent

    def make(mode: str) -> Backend:
        return backend(mode, config.dataplane, inherited, state_directory)

    path = state_directory / record.RECORD
    start = await begin(config, record.read(path))

    async def forget(keys: Collection[Key]) -> int:
        from vipd.backends import conntrack

        facts = sync.table.network
        return await conntrack.forget_unreplied(
            keys, facts.own_addresses or facts.primary_addresses
        )

    unreplied = Unreplied(forget)

    def on_update(before: Table, changes: Changes) -> None:
        departures.note(before, changes)
        unreplied.note(before, changes)

    def on_commit(keys: Collection[Key]) -> None:
        departures.committed(keys)
        unreplied.committed(keys)
        dns_way.committed(keys)

    def on_fold(
        events: Sequence[Event], before: Snapshot, after: Snapshot, touched: Touched
    ) -> None:
        dns.take(events, before, after, touched)
        dns_way.note(before, after, touched)

    node = config.node
    dns = DnsService(config.dns, state_directory, node.cluster_cidrs, node.service_cidrs)

    async def change_dns(changed: Config) -> list[str]:
        return await dns_way.change(changed, lambda: dns.change(changed.dns))

    def on_hangup() -> None:
        dns_way.look()
        if flags is None or flags.config is None:
            log.info("nothing is read again: there is no configuration file (--config)")
        else:
            reloading.ask()

    reloading = Reloading(flags or Flags(), {"dns": change_dns}, dns.reread)
    sync = Sync(node, on_update, on_fold)
    dns_way = DnsWay(dns, sync)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    own_addresses = FollowedAddresses(sync.take, NEED_OWN_ADDRESSES)
    switching = Switching(
        sync,
        start,
        path,
        make,
        Skeleton(Nft(inherited=inherited)),
        config.dataplane.drain_seconds,
        on_synced=_synced,
        on_commit=on_commit,
        prepare=own_addresses.known,
    )
    departures = Departures(
        config.dataplane.drain_seconds, switching.cut, lambda: (sync.snapshot, sync.table)
    )
    answers = Answers(config, sync, switching, departures, source, started, dns)
    requests = {**answers.requests(), "dns": dns.status, "dns-trace": dns.trace}
    server = await control.serve(config.socket, requests)
    log.info("start", version=VERSION, mode=start.state.serving, node=config.node.node_name)
    if switching.why:
        log.info("mode chosen", mode=start.state.serving, why=switching.why)
    # Hardly any garbage arises while everything that is read is kept: see _synced. If the first
    # sync does not come, collections have to.
    gc.disable()
    loop.call_later(LONGEST_WITHOUT_COLLECTION_SECONDS, gc.enable)
    needed: list[asyncio.Future[Any]] = []
    watching = asyncio.ensure_future(watchdog_forever())
    try:
        await dns.start()  # may be refused, so before anything is programmed
        needed += [
            asyncio.ensure_future(one)
            for one in (
                stop.wait(),
                _following(sync, source),
                _serving(switching, config),
                departures.run(),
                dns_way.run(),
                reloading.run(),
            )
        ]
        await asyncio.wait(needed, return_when=asyncio.FIRST_COMPLETED)
        for task in needed:
            if task.done():
                task.result()
    finally:
        notify("STOPPING=1")
        tasks = [*needed, watching]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await dns.stop()
        await unreplied.stop()
        await own_addresses.stop()
        server.close()
        with contextlib.suppress(OSError):
            os.unlink(config.socket)
        lock.close()
        log.info("stop", dataplane="left in place")


async def watchdog_forever() -> None:
    """Feed systemd's watchdog where there is one, else wait."""
    await watchdog()
    await asyncio.Event().wait()


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
