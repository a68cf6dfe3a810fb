"""One process that answers, as whoever started or found it sees it: asked and watched.

Lives here: the process, its control socket and one request at a time. Must not: decide what it is
told (workers.py). With a folder it outlives the daemon: it has a session of its own, and its
control socket stays in the folder for the next one.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from vipd.backends.userspace.channel import Channel
from vipd.backends.worker_environment import worker_environment
from vipd.dns.server import messages
from vipd.dns.server.messages import Answer, Greet, Met, Quit, Request
from vipd.proxy import logs
from vipd.proxy.errors import Busy, UnknownResult

PROGRAM = "vipd.dns.server"
PATIENCE_SECONDS = 20.0
"""How long one answer may take: a portion is a matter of milliseconds."""
_CREDENTIALS = struct.Struct("3i")
"""struct ucred: pid, uid, gid (unix(7))."""


class Process:
    """A process that runs. `path` is its control socket, None where it has none."""

    def __init__(self, channel: Channel, met: Met, path: Path | None) -> None:
        self.path = path
        self.met = met
        """What it said when it was found."""
        self.number, self.pid = met.number, met.pid
        self._channel = channel
        self._turn = asyncio.Lock()
        self._exchanges: set[asyncio.Task[tuple[Answer, list[socket.socket]]]] = set()
        self._forgotten = False
        self._watched = os.pidfd_open(met.pid)
        self._gone = asyncio.Event()

    @classmethod
    async def start(cls, number: int, folder: Path | None) -> "Process":
        """Start a process and return it once it answers. Raise Busy or UnknownResult."""
        path = None if folder is None else folder / f"{number}-{secrets.token_hex(4)}.sock"
        ours: socket.socket | None = None
        try:
            if path is None:
                ours, theirs = socket.socketpair()
            else:
                theirs = _listening(path)
            with theirs:
                pid = await asyncio.to_thread(_spawn, number, theirs.fileno())
        except OSError as error:
            if ours is not None:
                ours.close()
            _discard(path)
            raise Busy(f"no DNS worker can be started: {error}") from error
        try:
            connection = ours if ours is not None else await _connected(path)
            return await cls._met(connection, path, pid)
        except (Busy, UnknownResult):
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(os.waitpid, pid, 0)
            _discard(path)
            raise

    @classmethod
    async def find(cls, path: Path | None) -> "Process":
        """Return the process behind a control socket; Busy where none answers.

        The file that one has left which is gone is removed.
        """
        connection = await _connected(path)
        try:
            pid, _, _ = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
        except OSError as error:
            connection.close()
            raise Busy(f"no DNS worker answers at {path}: {error}") from error
        return await cls._met(connection, path, pid)

    @classmethod
    async def _met(cls, connection: socket.socket, path: Path | None, pid: int) -> "Process":
        """Return the process behind a connection; `pid` is its id, whatever it says.

        It will be killed by that id, and it runs without privileges: it must not choose another.
        """
        channel = Channel(connection)
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await channel.send(messages.encode(Greet()))
                met = messages.answer_of((await channel.receive())[0])
            if isinstance(met, Met) and met.pid == pid:
                return cls(channel, met, path)
            why: object = f"pid {pid} said {met}"
        except (OSError, EOFError, ValueError, TimeoutError, msgspec.DecodeError) as error:
            why = repr(error)
        channel.close()
        raise Busy(f"a DNS worker does not answer: {why}")

    def watch(self, ended: Callable[["Process"], None]) -> None:
        """Call `ended` once, as soon as the process is gone."""
        loop = asyncio.get_running_loop()

        def tell() -> None:
            self.forget()
            _discard(self.path)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self._gone.set()
            ended(self)

        loop.add_reader(self._watched, tell)

    async def gone(self) -> None:
        """Return when a process that is watched is gone."""
        await self._gone.wait()

    def forget(self) -> None:
        """Watch and ask it no more. It goes on, with a folder."""
        if self._watched >= 0:
            asyncio.get_running_loop().remove_reader(self._watched)
            os.close(self._watched)
            self._watched = -1
        # The loop must not watch a descriptor that is closed: whoever gets its number is not heard.
        for one in self._exchanges:
            one.cancel()
        self._forgotten = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._forgotten and not self._exchanges:
            self._channel.close()

    async def ask(
        self, request: Request, given: Sequence[socket.socket] = ()
    ) -> tuple[Answer, list[socket.socket]]:
        """Send a request with sockets beside it; return its answer, with those that came back.

        What is given stays open here. Raise Busy where the process has ended, UnknownResult where
        it does not answer: it is killed then, as nothing else would bring it back.
        """
        # Whoever asks may be cancelled: then the answer is still read, or the next one would be
        # taken for it.
        exchange = asyncio.get_running_loop().create_task(self._exchange(request, given))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._exchanged)
        try:
            return await asyncio.shield(exchange)
        except asyncio.CancelledError as error:
            if exchange.cancelled():  # forgotten meanwhile
                raise Busy(f"DNS worker {self.number} (pid {self.pid}) is forgotten") from error
            raise

    def _exchanged(self, exchange: asyncio.Task[tuple[Answer, list[socket.socket]]]) -> None:
        self._exchanges.discard(exchange)
        if not exchange.cancelled():
            exchange.exception()  # nobody may be there to hear it
        self._close_if_idle()

    async def _exchange(
        self, request: Request, given: Sequence[socket.socket]
    ) -> tuple[Answer, list[socket.socket]]:
        try:
            async with self._turn, asyncio.timeout(PATIENCE_SECONDS):
                await self._channel.send(messages.encode(request), [one.fileno() for one in given])
                data, descriptors = await self._channel.receive()
            return messages.answer_of(data), [socket.socket(fileno=one) for one in descriptors]
        except TimeoutError as error:
            self.kill()
            raise UnknownResult(f"DNS worker {self.number} (pid {self.pid}) is deaf") from error
        except (OSError, EOFError, ValueError) as error:
            raise Busy(f"DNS worker {self.number} (pid {self.pid}): {error}") from error
        except msgspec.DecodeError as error:
            raise UnknownResult(f"DNS worker {self.number}: {error}") from error

    async def quit(self) -> None:
        """Let it end at once."""
        async with self._turn:
            with contextlib.suppress(OSError):
                await self._channel.send(messages.encode(Quit()))

    def kill(self) -> None:
        """End the process as it is; `watch` tells when it is gone."""
        if self._watched >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._watched, signal.SIGKILL)


async def _connected(path: Path | None) -> socket.socket:
    """Return a connection to a control socket. Raise Busy.

    The file of one that has gone is removed.
    """
    connection: socket.socket | None = None
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.get_running_loop().sock_connect(connection, str(path))
    except (OSError, TimeoutError) as error:
        if connection is not None:
            connection.close()
        if isinstance(error, ConnectionRefusedError):
            _discard(path)
        raise Busy(f"no DNS worker answers at {path}: {error!r}") from error
    return connection


def _discard(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)


def _spawn(number: int, control: int) -> int:
    """Start a process and return its id."""
    command = [sys.executable, "-P", "-m", PROGRAM, str(number), str(control), logs.form()]
    process = subprocess.Popen(
        command,
        pass_fds=[control],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",  # it must not hold a file system that somebody wants to unmount
        env=worker_environment(os.environ),
    )
    # It is watched and reaped by whoever is there when it ends, which need not be this object.
    process.returncode = 0
    return process.pid


def _listening(path: Path) -> socket.socket:
    """Return a control socket that only this user may connect to."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        made.bind(str(path))
        made.listen(8)
    except OSError as error:
        made.close()
        raise Busy(f"{path}: {error.strerror}") from error
    finally:
        os.umask(before)
    return made
