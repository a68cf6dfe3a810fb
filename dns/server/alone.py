"""The DNS server without a dataplane: manifests in, answers out, until told to stop.

Lives here: what runs side by side. Must not: know how questions are answered. Needs no privileges
but for a port below 1024.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence

import structlog

from vipd.dns.server.service import DnsService
from vipd.dns.settings import Listen
from vipd.proxy.config import Config, Flags
from vipd.proxy.events import Event, Problem
from vipd.proxy.reload import Reloading
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.sources.protocol import Source

_CONCERNED = ("manifests", "kubeconfig", "clusterCIDRs", "serviceCIDRs", "dns")
"""Fields of the configuration that mean something here."""

LOOK_SECONDS = 10.0
"""Between two looks whether the addresses are the node's."""

log = structlog.get_logger()


async def serve(
    config: Config,
    source: Source,
    ready: Callable[[Sequence[Listen]], None] = lambda _: None,
    flags: Flags | None = None,
) -> None:
    """Answer from the source until SIGTERM or SIGINT; the workers end with it.

    `ready` is called with the addresses once everything that existed at the start is answered.
    `flags` name the configuration file that is followed, if any. Raise ConfigError where an address
    is taken, Busy or UnknownResult where no worker starts.
    """
    await source.check()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    node = config.node
    service = DnsService(config.dns, None, node.cluster_cidrs, node.service_cidrs)

    async def change_dns(changed: Config) -> list[str]:
        return await service.change(changed.dns)

    reloading = Reloading(flags or Flags(), {"dns": change_dns}, service.reread, _CONCERNED)
    has_file = flags is not None and flags.config is not None
    loop.add_signal_handler(signal.SIGHUP, reloading.ask if has_file else _nothing_to_read)
    await service.start()
    following = _Following(service)

    async def tell_ready() -> None:
        await service.in_step()
        await service.look_around()
        ready(service.listens)
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await service.look_around()

    needed: list[asyncio.Future[object]] = [asyncio.ensure_future(stop.wait())]
    needed += [
        asyncio.ensure_future(_forever(one))
        for one in (following.run(source.events()), tell_ready(), reloading.run())
    ]
    try:
        await asyncio.wait(needed, return_when=asyncio.FIRST_COMPLETED)
        for task in needed:
            if task.done():
                task.result()
    finally:
        for task in needed:
            task.cancel()
        await asyncio.gather(*needed, return_exceptions=True)
        await service.stop()


def _nothing_to_read() -> None:
    log.info("nothing is read again: there is no configuration file (--config)")


class _Following:
    """Folds what sources say, and lets the service have it."""

    def __init__(self, service: DnsService) -> None:
        self._service = service
        self._snapshot = Snapshot()

    async def run(self, source: AsyncIterator[Sequence[Event]]) -> None:
        async for events in source:
            for event in events:
                if isinstance(event, Problem) and event.error is not None:
                    log.warning("not read", problem=str(event.error))
            before = self._snapshot
            self._snapshot, touched = fold(before, events)
            self._service.take(events, before, self._snapshot, touched)
            await asyncio.sleep(0)


async def _forever(work: Coroutine[object, object, None]) -> None:
    """Do it, and wait for ever then."""
    await work
    await asyncio.Event().wait()
