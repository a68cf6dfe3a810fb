"""What goes on beside questions: files are followed, upstreams that loop are found.

Lives here: those two tasks. Must not: decide what follows from a file (configured.py).
"""

import asyncio
from collections.abc import Awaitable, Callable

from vipd.dns.forward.asking import Asking
from vipd.dns.forward.configured import Files, Note, tell_files
from vipd.dns.forward.loops import RECHECK_SECONDS, Loops
from vipd.dns.forward.routes import Routes
from vipd.dns.forward.settings import ForwardSettings
from vipd.dns.forward.sources import changes, read_hosts, read_resolv_conf
from vipd.dns.forward.standing import Standing


def read_files(settings: ForwardSettings, before: Files, note: Note) -> Files:
    """Return what the files say. One that cannot be read, or that is empty, leaves what was before.

    A resolv.conf is written in two steps by some: empty, then full.
    """
    resolv_conf, hosts = Files()
    path = "" if settings.upstreams else settings.resolv_conf
    try:
        if path:
            resolv_conf = read_resolv_conf(path)
            if not resolv_conf.upstreams and before.resolv_conf.upstreams:
                note("a file names no upstream; the old ones are kept", file=path)
                resolv_conf = before.resolv_conf
    except (OSError, ValueError) as error:
        note("a file cannot be read; what it said is kept", file=path, reason=str(error))
        resolv_conf = before.resolv_conf
    try:
        if settings.hosts_file:
            hosts = read_hosts(settings.hosts_file)
    except (OSError, ValueError) as error:
        reason = str(error)
        note("a file cannot be read; what it said is kept", file=settings.hosts_file, reason=reason)
        hosts = before.hosts
    files = Files(resolv_conf, hosts)
    if files != before:
        tell_files(files, settings, note)
    return files


class Upkeep:
    """The tasks. `reread` is called when a file has changed."""

    def __init__(
        self, loops: Loops, asking: Asking, reread: Callable[[], Awaitable[None]], note: Note
    ) -> None:
        self._loops = loops
        self._asking = asking
        self._reread = reread
        self._note = note
        self._paths: tuple[str, ...] = ()
        self._following: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None

    def follow(self, settings: ForwardSettings) -> None:
        """Follow the files of these settings, and no others."""
        paths = ("" if settings.upstreams else settings.resolv_conf, settings.hosts_file)
        wanted = tuple(filter(None, paths))
        if wanted == self._paths:
            return
        self._paths = wanted
        if self._following is not None:
            self._following.cancel()
        self._following = asyncio.create_task(self._follow(wanted)) if wanted else None

    def check_loops(self, routes: Routes) -> None:
        """Look whether any upstream loops, and go on looking at those that do."""
        if self._checking is not None:
            self._checking.cancel()
            self._checking = None
        if self._asking.rules.settings.loop_check:
            self._checking = asyncio.create_task(self._check(routes))

    async def close(self) -> None:
        """End both."""
        tasks = [one for one in (self._following, self._checking) if one is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, paths: tuple[str, ...]) -> None:
        async for _ in changes(paths):
            try:
                await self._reread()
            except Exception as error:  # whatever a file has done: the next change may mend it
                self._note("a file could not be followed", reason=repr(error))

    async def _check(self, routes: Routes) -> None:
        domains: dict[Standing, bytes] = {}
        for domain, group in routes.groups():
            for standing in group.members:
                domains.setdefault(standing, domain)
        while domains:
            await asyncio.gather(*(self._probe(one, domains[one]) for one in domains))
            domains = {one: domains[one] for one in domains if one.looping}
            await asyncio.sleep(RECHECK_SECONDS)

    async def _probe(self, standing: Standing, domain: bytes) -> None:
        was_looping = standing.looping
        question = self._loops.begin(standing, domain)
        try:
            await asyncio.wait([self._asking.probe(question, standing.upstream).reply])
        finally:
            is_looping = self._loops.end(question)
        if is_looping and not was_looping:
            self._note(
                "an upstream asks this server what it is asked; it is left out",
                upstream=str(standing.upstream),
            )
            self._asking.counters.loops += 1
        elif was_looping and not is_looping:
            self._note("an upstream loops no more", upstream=str(standing.upstream))
