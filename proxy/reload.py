"""The configuration file of a running process: read again when it changes, and at SIGHUP.

Lives here: noticing, reading, and who is told. Must not: know what a section means. A file that is
wrong changes nothing; fields that nobody here takes while running are named.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

import structlog
from msgspec import structs

from vipd.dns.forward.sources import changes
from vipd.proxy.config import Config, Flags, VipdConfiguration, checked, read
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

    `sections` are the fields of VipdConfiguration that are taken while running, `concerned` all
    that the process has a use for. Raise ConfigError.
    """

    def __init__(
        self,
        flags: Flags,
        sections: Mapping[str, Take],
        tell: Tell = lambda refused, restart: None,
        concerned: Collection[str] = VipdConfiguration.__struct_fields__,
    ) -> None:
        self._flags, self._sections, self._tell = flags, sections, tell
        self._concerned = concerned
        self._runs_by = read(flags)
        """What counts now, as the file would say it."""
        self._left: dict[str, Sequence[str]] = {}
        """Fields of sections that count at the next start only."""
        self._named: list[str] = []
        """Fields that were named last."""
        self._asked = asyncio.Event()
        self._refused = ""
        """What was wrong last."""
        self._again: asyncio.TimerHandle | None = None
        self._is_retry = False

    def ask(self) -> None:
        """Read the file now, whether it has changed or not."""
        log.info("configuration is read again", file=self._flags.config)
        self._asked.set()

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
        is_good = False
        try:
            told = await asyncio.to_thread(read, self._flags)
            config = await asyncio.to_thread(checked, self._flags, told)
            is_good = True
            for field in self._differences(told):
                if field in self._sections:
                    self._left[field] = await self._sections[field](config)
                    setattr(self._runs_by, field, getattr(told, field))
                    log.info("configuration is taken", section=field)
        except VipdError as error:
            if is_good:
                loop = asyncio.get_running_loop()
                self._again = loop.call_later(RETRY_SECONDS, self._retry)
            if not is_retry or str(error) != self._refused:
                then = f"in {RETRY_SECONDS:g} s" if is_good else "when the file changes"
                said = "configuration is refused; the one before stays"
                log.warning(said, why=str(error), tried_again=then)
                self._tell(str(error), self._named)
            self._refused = str(error)
            return
        self._refused = ""
        restart = [*map(_spelled, self._differences(told)), *self._fields_left()]
        if restart and restart != self._named:
            log.warning("configuration counts at the next start only", fields=", ".join(restart))
        self._named = restart
        self._tell("", restart)

    def _retry(self) -> None:
        self._is_retry = True
        self._asked.set()

    def _fields_left(self) -> list[str]:
        return [f"{section}.{field}" for section, left in self._left.items() for field in left]

    def _differences(self, told: VipdConfiguration) -> list[str]:
        """Return the fields that the file says otherwise than counts."""
        ours = self._runs_by
        return [one for one in self._concerned if getattr(ours, one) != getattr(told, one)]


def _spelled(field: str) -> str:
    """Return the name of a field as the file spells it."""
    names = {one.name: one.encode_name for one in structs.fields(VipdConfiguration)}
    return names[field]
