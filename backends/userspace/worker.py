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
from vipd.backends.userspace.objects import Forwarding, Place
from vipd.backends.worker_environment import worker_environment
from vipd.proxy import logs
from vipd.proxy.errors import Busy, UnknownResult

PROGRAM = "vipd.backends.userspace.forwarder"
PATIENCE_SECONDS = 10.0
"""How long one answer may take: 200 listeners are a matter of milliseconds."""
FIND_SECONDS = 5.0
"""How long one that was there before the daemon may take for its first answer."""
REPORT_SECONDS = 1.5
"""How long a portion of a report may take: less than the status waits (proxy/answers.py)."""
PLACES_AT_ONCE = 250
"""In one report: meanwhile, about 10 ms with five endpoints each, the worker forwards nothing."""
_NOT_UNDERSTOOD = (msgspec.DecodeError, LookupError, TypeError, ValueError)
"""What the answer of another version may raise."""

log = structlog.get_logger()


class Worker:
    """A worker that runs. `places` are where it listens."""

    def __init__(self, path: Path, channel: Channel, told: Told) -> None:
        self.path = path
        self.number, self.pid, self.version = told.number, told.pid, told.version
        self.retired = told.retired
        self.transparent = told.transparent
        self.files = told.files
        """How many files it may open."""
        self.served: dict[Place, Forwarding] = {
            messages.place_of(one.place): messages.forwarding_of(one.forwarding)
            for one in told.places
        }
        """What it served when it was found, and its `surroundings` then."""
        self.surroundings = messages.surroundings_of(told.surroundings)
        self.places = set(self.served)
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
                        logs.form(),
                        *(["transparent"] if transparent else []),
                    ],
                    pass_fds=[control.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",  # it must not hold a file system that somebody wants to unmount
                    env=worker_environment(os.environ),
                )
            path = path.rename(folder / f"{number}-{process.pid}.sock")
        except OSError as error:
            path.unlink(missing_ok=True)
            raise Busy(f"no worker can be started: {error.strerror}") from error
        try:
            made = await cls.find(path, PATIENCE_SECONDS)
        except BaseException:  # nobody knows of it: it must not be there either
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
        except (OSError, EOFError, TimeoutError, *_NOT_UNDERSTOOD) as error:
            why = repr(error)
        except BaseException:
            if channel is not None:
                channel.close()
            raise
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
        """Return what it has counted at places, and there of one client.

        Nothing where it is gone. Portion by portion, so that it goes on forwarding in between: one
        at least. Raise TimeoutError where a portion takes too long, for which it is not killed yet,
        and UnknownResult where it is deaf.
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
    # Files of a network namespace are its own (fs/proc/proc_net.c). Not ns/net: that of nobody's
    # process is hidden from root without CAP_SYS_PTRACE, as in a container or a service.
    try:
        theirs = os.stat(f"/proc/{pid}/net/unix")
    except FileNotFoundError:
        return True
    return theirs.st_ino == os.stat("/proc/self/net/unix").st_ino


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
