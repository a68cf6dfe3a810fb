"""One worker process as the daemon sees it: started or found again, asked, and watched.

Lives here: the process, its control socket and one request at a time. Must not: decide what it
serves (workers.py). A worker outlives the daemon: it has a session of its own, and its control
socket stays in the folder for the next daemon.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec
import structlog

from vipd.backends.userspace import messages
from vipd.backends.userspace.channel import Channel
from vipd.backends.userspace.messages import (
    Answer,
    Report,
    Reported,
    Request,
    Resume,
    Tell,
    Told,
)
from vipd.backends.userspace.objects import Place
from vipd.proxy.errors import Busy, DataplaneError, UnknownResult

PROGRAM = "vipd.backends.userspace.forwarder"
PATIENCE_SECONDS = 10.0
"""How long one answer may take: 200 listeners are a matter of milliseconds."""
FIND_SECONDS = 5.0
"""How long one that was there before the daemon may take for its first answer."""
REPORT_SECONDS = 1.5
"""How long a portion of a report may take: less than the status waits (proxy/answers.py)."""
PLACES_AT_ONCE = 250
"""In one report: meanwhile, about 10 ms with five endpoints each, the worker forwards nothing."""

log = structlog.get_logger()


class Worker:
    """A worker that runs. `places` are where it listens."""

    def __init__(self, path: Path, channel: Channel, told: Told) -> None:
        self.path = path
        self.number, self.pid, self.version = told.number, told.pid, told.version
        self.retired = told.retired
        self.transparent = told.transparent
        self.told = told
        """What it said when it was found."""
        self.places: set[Place] = {messages.place_of(one.place) for one in told.places}
        self._channel = channel
        self._turn = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._watched = os.pidfd_open(told.pid)

    @classmethod
    async def start(cls, number: int, folder: Path, *, transparent: bool = False) -> "Worker":
        """Start a worker process and return it once it answers. Raise Busy."""
        path = folder / f"{number}-{secrets.token_hex(4)}.sock"
        try:
            with _control(path) as control:
                command = [sys.executable, "-P", "-m", PROGRAM]
                process = await asyncio.to_thread(
                    subprocess.Popen,
                    [
                        *command,
                        str(number),
                        str(control.fileno()),
                        _log_form(),
                        *(["transparent"] if transparent else []),
                    ],
                    pass_fds=[control.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            path = path.rename(folder / f"{number}-{process.pid}.sock")
        except OSError as error:
            path.unlink(missing_ok=True)
            raise Busy(f"no worker can be started: {error.strerror}") from error
        try:
            made = await cls.find(path, PATIENCE_SECONDS)
        except DataplaneError:
            process.kill()
            await asyncio.to_thread(process.wait)
            path.unlink(missing_ok=True)
            raise
        made._process = process
        return made

    @classmethod
    async def find(cls, path: Path, seconds: float = FIND_SECONDS) -> "Worker":
        """Return the worker behind a control socket; Busy where none answers within the time."""
        loop = asyncio.get_running_loop()
        channel = None
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            channel = Channel(connection)
            async with asyncio.timeout(seconds):
                await loop.sock_connect(connection, str(path))
                await channel.send(messages.encode(Tell()))
                told = messages.answer_of((await channel.receive())[0])
            if isinstance(told, Told):
                return cls(path, channel, told)
            why = "unexpected answer"
        except (OSError, EOFError, TimeoutError, msgspec.DecodeError) as error:
            why = repr(error)
        if channel is not None:
            channel.close()
        raise Busy(f"the worker at {path} does not answer: {why}")

    @property
    def is_found(self) -> bool:
        """Whether it was there before the daemon."""
        return self._process is None

    @property
    def is_here(self) -> bool:
        """Whether it is in our network namespace; folders of two can be the same."""
        return _is_here(self.pid)

    def watch(self, ended: Callable[["Worker"], None]) -> None:
        """Call `ended` once, as soon as the process is gone."""
        loop = asyncio.get_running_loop()

        def tell() -> None:
            loop.remove_reader(self._watched)
            self.forget()
            self.path.unlink(missing_ok=True)
            if self._process is not None:
                self._process.wait()
            ended(self)

        loop.add_reader(self._watched, tell)

    async def ask(
        self, request: Request, given: Sequence[socket.socket] = ()
    ) -> tuple[Answer, list[socket.socket]]:
        """Send a request with sockets beside it, and return its answer, with those that came back.

        What is given is closed here once it is sent. Raise Busy where the worker ends meanwhile.
        One that does not answer, or cannot be understood, is killed: nothing else would bring it
        back.
        """
        # Whoever asks may be cancelled: then the answer is still read, or the next one would be
        # taken for it.
        exchange = asyncio.ensure_future(self._exchange(request, given))
        exchange.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(exchange)

    async def _exchange(
        self, request: Request, given: Sequence[socket.socket]
    ) -> tuple[Answer, list[socket.socket]]:
        try:
            async with self._turn, asyncio.timeout(PATIENCE_SECONDS):
                numbers = [one.fileno() for one in given]
                await self._channel.send(messages.encode(request), numbers)
                data, descriptors = await self._channel.receive()
            beside = [socket.socket(fileno=one) for one in descriptors]
            return messages.answer_of(data), beside
        except (TimeoutError, msgspec.DecodeError) as error:
            log.warning("a worker does not answer; it is killed", number=self.number, pid=self.pid)
            self.kill()
            raise UnknownResult(f"worker {self.number} (pid {self.pid}) is deaf") from error
        except (OSError, EOFError) as error:
            self.kill()
            raise Busy(f"worker {self.number} (pid {self.pid}) has ended") from error
        finally:
            for one in given:
                one.close()
            # Not before: the loop would go on waiting for a number that another file has by then.
            if self._watched < 0:
                self._channel.close()

    async def tell(self, request: Request) -> None:
        """Send a request that is not answered."""
        async with self._turn:
            with contextlib.suppress(OSError):
                await self._channel.send(messages.encode(request))

    async def report(self, places: Collection[Place], client: str = "") -> list[Reported]:
        """Return what it has counted at places, and there of one client; nothing where it is gone.

        Portion by portion, so that it goes on forwarding in between. There is one at least. Raise
        TimeoutError where a portion takes too long; it is not killed for that yet.
        """
        wires = [messages.wire_place(one) for one in places]
        portions = [wires[at : at + PLACES_AT_ONCE] for at in range(0, len(wires), PLACES_AT_ONCE)]
        found: list[Reported] = []
        with contextlib.suppress(Busy):
            for portion in portions or [[]]:
                async with asyncio.timeout(REPORT_SECONDS):
                    answer, _ = await self.ask(Report(portion, client))
                if isinstance(answer, Reported):
                    found.append(answer)
        return found

    async def resume(self) -> None:
        """Let it go on after a pause. Raise Busy where it is gone."""
        told, _ = await self.ask(Resume())
        if isinstance(told, Told):
            self.retired = False
            self.places = {messages.place_of(one.place) for one in told.places}

    def kill(self) -> None:
        """End the process as it is; `watch` tells when it is gone."""
        if self._watched >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._watched, signal.SIGKILL)

    def forget(self) -> None:
        """Let go of it: it goes on."""
        os.close(self._watched)
        self._watched = -1
        if not self._turn.locked():
            self._channel.close()


def end_silent(path: Path) -> None:
    """Kill the worker whose control socket this is, if it lives; remove the socket.

    One that does not answer would go on taking its share of what comes to its places. That of
    another network namespace is left alone, as where it answers.
    """
    pid = path.stem.partition("-")[2]
    with contextlib.suppress(OSError, ValueError):
        watched = os.pidfd_open(int(pid))
        try:
            if PROGRAM.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                if not _is_here(int(pid)):
                    return
                signal.pidfd_send_signal(watched, signal.SIGKILL)
        finally:
            os.close(watched)
    path.unlink(missing_ok=True)


def _is_here(pid: int) -> bool:
    """Whether a process is in our network namespace, or has ended, which `watch` tells."""
    try:
        theirs = os.stat(f"/proc/{pid}/ns/net")
    except FileNotFoundError:
        return True
    return theirs.st_ino == os.stat("/proc/self/ns/net").st_ino


def _log_form() -> str:
    """Return the form of this process's log, which is that of its workers: text or json."""
    *_, last = structlog.get_config()["processors"]
    return "json" if isinstance(last, structlog.processors.JSONRenderer) else "text"


def _control(path: Path) -> socket.socket:
    """Return a socket that listens at a path, in a folder that only root may enter."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(str(path))
        made.listen(4)
    except OSError:
        made.close()
        raise
    return made
