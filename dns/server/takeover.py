"""What the daemon before has left: workers that answer, and the sockets they answer on.

Lives here: finding them, having their sockets, and ending them. Must not: start any (seat.py).
"""

import asyncio
import os
import socket
from collections.abc import Collection
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
                for one in both:
                    one.close()
        for those in self.http.values():
            for one in those:
                one.close()


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
            answer, given = await process.ask(HandOver())
        except (Busy, UnknownResult) as error:
            log.warning("a DNS worker does not give its sockets", why=str(error))
            continue
        if not isinstance(answer, HandedOver):
            continue
        for listen in answer.listens:
            udp, tcp = given.pop(0), given.pop(0)
            if is_new(udp):
                found.pairs.setdefault(_listen(listen), []).append((udp, tcp))
            else:
                udp.close()
                tcp.close()
        for listen, one in zip(answer.http, given, strict=True):
            if is_new(one):
                found.http.setdefault(_listen(listen), []).append(one)
            else:
                one.close()
    return found


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
