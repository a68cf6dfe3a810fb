"""After kube-proxy: its rules go as soon as ours are there, once, and only where that is wanted.

Lives here: when, and what is said of it. Must not: know what kube-proxy's rules are
(backends/kube_proxy.py). Which rules a first packet meets while both are there depends on who wrote
last; a kube-proxy that still runs puts its own back, and is not fought.
"""

import asyncio

import structlog

from vipd.backends import kube_proxy
from vipd.proxy.errors import DataplaneError

log = structlog.get_logger()


async def take_over(synced: asyncio.Event) -> None:
    """Remove what kube-proxy left once `synced` is set; then wait until it is cancelled."""
    await synced.wait()
    try:
        outcome = await kube_proxy.remove(dry_run=False)
    except DataplaneError as error:
        log.warning("kube-proxy's rules stay", why=str(error))
    else:
        if outcome.removed:
            log.info("kube-proxy's rules are removed", objects=len(outcome.removed))
        for one in outcome.failed:
            log.warning("kube-proxy's rules stay", why=one)
    await asyncio.Event().wait()
