"""What the daemon before has left: workers that answer, and the sockets they answer on.

Lives here: finding them, having their sockets, and ending them. Must not: start any (seat.py).
"""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from vipd.dns.server.listeners import Pair
from vipd.dns.server.messages import HandedOver, HandOver, WireListen
from vipd.dns.server.process import Process
from vipd.dns.settings import Listen
from vipd.proxy.errors import Busy, UnknownResult
from vipd.proxy.names import parse_address

QUIT_SECONDS = 5.0

log = structlog.get_logger()


class Inherited(NamedTuple):
    """Sockets of the daemon before, each once; who takes some out has them."""

    pairs: dict[Listen, list[Pair]]
    http: dict[Listen, list[socket.socket]]

    def close(self) -> None:
        """Close what nobody has taken."""
        for pairs in self.pairs.values():
            for both in pairs:
                _close(both)
        for those in self.http.values():
            _close(those)


async def inherit(old: Collection[Process]) -> Inherited:
    """Return the sockets of these workers, which go on answering on them."""
    found = Inherited({}, {})
    known: set[int] = set()

    def is_new(one: socket.socket) -> bool:
        inode = os.fstat(one.fileno()).st_ino
        is_new = inode not in known
        known.add(inode)
        return is_new

    for process in old:
        try:
            async for answer, given in _handed_over(process):
                pairs = 2 * len(answer.listens)
                for listen, both in zip(answer.listens, _pairs(given[:pairs]), strict=True):
                    if is_new(both[0]):
                        found.pairs.setdefault(_listen(listen), []).append(both)
                    else:
                        _close(both)
                for listen, one in zip(answer.http, given[pairs:], strict=True):
                    if is_new(one):
                        found.http.setdefault(_listen(listen), []).append(one)
                    else:
                        one.close()
        except (Busy, UnknownResult) as error:
            log.warning("a DNS worker does not give its sockets", why=str(error))
    return found


async def _handed_over(
    process: Process,
) -> AsyncIterator[tuple[HandedOver, list[socket.socket]]]:
    """Yield what a process gives away, so many sockets at a time. Raise Busy or UnknownResult."""
    skip = 0
    while True:
        answer, given = await process.ask(HandOver(skip))
        if not isinstance(answer, HandedOver) or len(given) != _count(answer):
            _close(given)
            raise Busy(f"{len(given)} sockets came with {type(answer).__name__}")
        yield answer, given
        skip += len(answer.listens)
        if not (answer.more and answer.listens):
            return


def _count(answer: HandedOver) -> int:
    return 2 * len(answer.listens) + len(answer.http)


def _pairs(sockets: Sequence[socket.socket]) -> list[Pair]:
    return list(zip(sockets[::2], sockets[1::2], strict=True))


def _close(sockets: Iterable[socket.socket]) -> None:
    for one in sockets:
        one.close()


def _listen(told: WireListen) -> Listen:
    return Listen(parse_address(told[0]), told[1])


async def find(folder: Path | None) -> list[Process]:
    """Return the processes whose control sockets are in a folder; files of others are removed."""
    found = []
    for path in _control_sockets(folder):
        try:
            found.append(await Process.find(path))
        except Busy as error:
            log.info("no DNS worker there", why=str(error))
    return found


def _control_sockets(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(folder.glob("*.sock"))


async def quit_all(processes: Collection[Process]) -> None:
    """End processes that were found, at once."""
    for one in processes:
        one.watch(lambda _: None)
    await asyncio.gather(*(end(one) for one in processes))


async def end(process: Process) -> None:
    """End a process that is watched, and return when it is gone."""
    await process.quit()
    try:
        async with asyncio.timeout(QUIT_SECONDS):
            await process.gone()
    except TimeoutError:
        process.kill()
        await process.gone()
