"""The pages of the metrics server: /metrics, /proxyMode, /configz, /statusz, /flagz, /.

Lives here: which page stands at which path, and who is asked for it. Must not: say what a page
looks like (status_page.py, zpages.py, configz.py), or count anything.
"""

import asyncio
import platform
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from msgspec import Struct

from vipd.proxy.config import Config
from vipd.proxy.http.answer import EXPOSITION, JSON, Answer, Page
from vipd.proxy.http.configz import configz
from vipd.proxy.http.shared import Shared
from vipd.proxy.http.status_page import MOST_SERVERS, status_page
from vipd.proxy.http.zpages import flagz, statusz
from vipd.proxy.status import Status
from vipd.proxy.views import VirtualServerView

KEEP_SECONDS = 1.0
"""How old a page may be that costs something to make."""

Exposition = Callable[[], Awaitable[bytes]]
"""Returns the metrics in Prometheus' text format, made once for all who ask at once."""
Shown = tuple[Sequence[VirtualServerView], int]


class Asked(Struct, frozen=True, kw_only=True):
    """Whom the pages ask."""

    exposition: Exposition
    status: Callable[[], Awaitable[Status]]
    servers: Callable[[int], Awaitable[Shown]]
    """Returns the first so many virtual servers, and how many there are."""
    mode: Callable[[], str]
    config: Callable[[], Config]
    flags: Struct
    """Those that were given."""


def metrics_pages(asked: Asked) -> Mapping[str, Page]:
    """Return the pages by path."""

    async def metrics() -> Answer:
        return Answer(await asked.exposition(), EXPOSITION)

    async def ok() -> Answer:
        return Answer(b"ok")

    async def proxy_mode() -> Answer:
        return Answer(asked.mode().encode())

    async def told_configz() -> Answer:
        return Answer(configz(asked.config(), asked.mode()), JSON)

    async def make_statusz() -> Answer:
        told = statusz(await asked.status(), time.time(), platform.python_version())
        return Answer(told.encode(errors="replace"))

    async def told_flagz() -> Answer:
        return Answer(flagz(asked.flags).encode(errors="replace"))

    async def make_page() -> Answer:
        status = await asked.status()
        servers, total = await asked.servers(MOST_SERVERS)
        return await asyncio.to_thread(status_page, status, servers, total, time.time())

    return {
        "/": Shared(make_page, KEEP_SECONDS).get,
        "/metrics": metrics,
        "/healthz": ok,
        "/proxyMode": proxy_mode,
        "/configz": told_configz,
        "/statusz": Shared(make_statusz, KEEP_SECONDS).get,
        "/flagz": told_flagz,
    }
