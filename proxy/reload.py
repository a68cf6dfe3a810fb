"""The configuration file of a running process: read again when it changes, and at SIGHUP.

Lives here: noticing, reading, and who is told. Must not: know what a section means. A file that is
wrong changes nothing; fields that nobody here takes while running are named.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence

import structlog

from vipd.dns.forward.sources import changes
from vipd.proxy.config import Config, Flags, Loaded, Note, as_file, loaded
from vipd.proxy.errors import VipdError

RETRY_SECONDS = 10.0
"""Until a configuration that is good in itself and could not be taken is tried again: an address
that was somebody else's may be free."""

log = structlog.get_logger()

Take = Callable[[Config], Awaitable[Sequence[str]]]
"""Takes a section while running; returns those of its fields that it cannot take. A VipdError says
that it takes nothing."""
Tell = Callable[[str, Sequence[str]], None]
"""Called with what is wrong, or nothing, and the fields that count at the next start only."""


class Reloading:
    """Keeps a process in step with the file that `flags` name.

    `sections` are the fields of VipdConfiguration that are taken while running, whatever kind of
    file says them; `concerned` are all that the process has a use for, None: all there are. Raise
    ConfigError.
    """

    def __init__(
        self,
        flags: Flags,
        sections: Mapping[str, Take],
        tell: Tell = lambda refused, restart: None,
        concerned: Collection[str] | None = None,
    ) -> None:
        self._flags, self._sections, self._tell = flags, sections, tell
        self._concerned = concerned
        now = loaded(flags)
        self._mode = now.config.mode
        """What was configured at the start: kube-proxy's fields mean what they mean in it."""
        self._runs_by = as_file(now.config)
        """What counts now, as a VipdConfiguration would say it."""
        self._notes = now.notes
        self._left: dict[str, Sequence[str]] = {}
        """Fields of sections that count at the next start only."""
        self._named: list[str] = []
        """Fields that were named last."""
        self._asked = asyncio.Event()
        self._refused = ""
        """What was wrong last: with the file, or with a section of it."""
        self._taken_beside: list[str] = []
        """Sections of a file that were taken before another one was refused."""
        self._again: asyncio.TimerHandle | None = None
        self._is_retry = False

    def ask(self) -> None:
        """Read the file now, whether it has changed or not."""
        log.info("configuration is read again", file=self._flags.config)
        self._asked.set()

    def notes(self) -> Iterator[str]:
        """Yield what those who read the status should know of the file."""
        if self._refused:
            beside = ", ".join(self._taken_beside)
            but = f" (taken of it: {beside})" if beside else ""
            yield f"the configuration as it is now is refused{but}: {self._refused}"
        if self._named:
            yield f"configuration that counts at the next start only: {', '.join(self._named)}"

    async def run(self) -> None:
        """Follow the file for ever."""
        path = self._flags.config
        if path is None:
            await asyncio.Event().wait()
            return
        watching = asyncio.create_task(self._watch(path))
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                await self.reread()
        finally:
            if self._again is not None:
                self._again.cancel()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _watch(self, path: str) -> None:
        async for _ in changes((path,)):
            self._asked.set()

    async def reread(self) -> None:
        """Take what the file says now, as far as that can be done."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        is_retry, self._is_retry = self._is_retry, False
        try:
            now = await asyncio.to_thread(loaded, self._flags, self._mode)
        except VipdError as error:
            self._refuse(error, [], is_retry=is_retry)
            return
        told = as_file(now.config)
        taken = list(self._taken_beside)
        for field in self._differences(told):
            if field in self._sections:
                try:
                    self._left[field] = await self._sections[field](now.config)
                except VipdError as error:
                    loop = asyncio.get_running_loop()
                    self._again = loop.call_later(RETRY_SECONDS, self._retry)
                    self._refuse(error, taken, is_retry=is_retry)
                    return
                self._runs_by[field] = told.get(field)
                taken = [*(one for one in taken if one != field), field]
                log.info("configuration is taken", section=field)
        self._taken_beside = []
        self._refused = ""
        tell_without_effect(now.notes, self._notes)
        self._notes = now.notes
        restart = [*self._fields_that_differ(told, now), *self._fields_left()]
        if restart and restart != self._named:
            log.warning("configuration counts at the next start only", fields=", ".join(restart))
        self._named = restart
        self._tell("", restart)

    def _refuse(self, error: VipdError, taken: list[str], *, is_retry: bool) -> None:
        """Say what is wrong, and what counts instead, unless that was said last time."""
        if not is_retry or str(error) != self._refused:
            then = "when the file changes" if self._again is None else f"in {RETRY_SECONDS:g} s"
            said = {"why": str(error), "tried_again": then}
            if taken:
                beside = ", ".join(taken)
                log.warning("configuration is taken in part; the rest stays", taken=beside, **said)
            else:
                log.warning("configuration is refused; the one before stays", **said)
            self._tell(str(error), self._named)
        self._refused, self._taken_beside = str(error), taken

    def _retry(self) -> None:
        self._is_retry = True
        self._asked.set()

    def _fields_left(self) -> list[str]:
        return [f"{section}.{field}" for section, left in self._left.items() for field in left]

    def _differences(self, told: Mapping[str, object]) -> list[str]:
        """Return the fields that are to be otherwise than they are now."""
        ours = self._runs_by
        return [
            one
            for one in dict.fromkeys((*told, *ours))
            if ours.get(one) != told.get(one)
            and (self._concerned is None or one in self._concerned)
        ]

    def _fields_that_differ(self, told: Mapping[str, object], now: Loaded) -> Iterator[str]:
        """Yield the same field by field, as the file spells them."""
        for one in self._differences(told):
            for path in _inside(one, self._runs_by.get(one), told.get(one)):
                where = now.origins.get(path, "")
                yield where.removeprefix(f"{self._flags.config}: ").partition(" ")[0] or path


def tell_without_effect(notes: Sequence[Note], told_before: Collection[Note] = ()) -> None:
    """Log what is said and has no effect, each once."""
    for one in notes:
        if one not in told_before:
            log.warning("configuration without effect", where=one.where, instead=one.instead)


def _inside(path: str, before: object, after: object) -> Iterator[str]:
    """Yield the paths of the values that differ in a field or section."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys((*before, *after)):
            if before.get(name) != after.get(name):
                yield from _inside(f"{path}.{name}", before.get(name), after.get(name))
    else:
        yield path
