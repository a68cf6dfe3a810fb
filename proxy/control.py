"""The control socket: how the other commands ask a running daemon. Unix socket, root only.

Lives here: the protocol, its server and its client. One request a connection: a line with a name
and, after a space, what it is about; answered with one JSON document. Must not: know what the
answers mean.
"""

import asyncio
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec

from vipd.proxy.errors import ConfigError, ControlError, InUseError, VipdError

LONGEST_REQUEST_BYTES = 4096
PATIENCE_SECONDS = 30.0

Reader = Callable[[str], Awaitable[object]]
"""Takes the rest of the request's line and returns something that msgspec can encode; a VipdError
that it raises is the answer."""


class Refused(msgspec.Struct):
    """The answer to a request that cannot be met."""

    refused: str


async def serve(path: str, readers: Mapping[str, Reader]) -> asyncio.Server:
    """Listen on `path`, which only this user may connect to; answer the names in `readers`.

    A socket that a killed daemon left is replaced; anything else at that
    path, is a ConfigError; one that answers, an InUseError.
    """
    _make_way(path)

    async def answer(incoming: asyncio.StreamReader, outgoing: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                line = await incoming.readline()
                name, _, argument = line.decode(errors="replace").strip().partition(" ")
                reply = await _reply(readers, name, argument)
                outgoing.write(msgspec.json.encode(reply))
                await outgoing.drain()
        except (OSError, TimeoutError, ValueError):
            pass  # the client went away, or sent no line: nobody is left to tell
        finally:
            outgoing.close()

    before = os.umask(0o177)
    try:
        return await asyncio.start_unix_server(answer, path, limit=LONGEST_REQUEST_BYTES)
    except OSError as error:
        raise ConfigError("--socket", f"{path}: {os.strerror(error.errno or 0)}") from error
    finally:
        os.umask(before)


async def _reply(readers: Mapping[str, Reader], name: str, argument: str) -> object:
    reader = readers.get(name)
    if reader is None:
        return Refused(f"no request {name!r}")
    try:
        return await reader(argument)
    except VipdError as error:
        return Refused(str(error))


def read(path: str, name: str, argument: str = "") -> bytes:
    """Return the JSON document that the daemon on `path` answers `name` with.

    Raise ControlError where there is no daemon, or it refuses.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as asking:
            asking.settimeout(PATIENCE_SECONDS)
            asking.connect(path)
            asking.sendall(f"{name} {argument}".strip().encode() + b"\n")
            parts = []
            while part := asking.recv(1 << 20):
                parts.append(part)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise ControlError(f"no vipd listens on {path} (is `vipd run` running?)") from error
    except OSError as error:
        raise ControlError(f"{path}: {error.strerror or error}") from error
    document = b"".join(parts)
    if document.startswith(b'{"refused"'):
        raise ControlError(msgspec.json.decode(document, type=Refused).refused)
    if not document:
        raise ControlError(f"vipd on {path} closed the connection without an answer")
    return document


def listener(path: str) -> int | None:
    """Return the pid of who listens on `path`, 0 where it cannot be told; None where nobody does.

    Nothing is asked: a daemon that is too busy to answer listens all the same.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as trying:
        trying.setblocking(False)
        try:
            trying.connect(path)
            told = trying.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except BlockingIOError:
            return 0  # so many wait already
        except OSError:
            return None
    pid: int = struct.unpack("3i", told)[0]
    return pid


def _make_way(path: str) -> None:
    try:
        if len(os.fsencode(path)) > 107:
            raise ConfigError("--socket", f"{path}: longer than the 107 bytes a socket may have")
        Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError("--socket", f"{path}: {os.strerror(error.errno or 0)}") from error
    if not stat.S_ISSOCK(mode):
        raise ConfigError("--socket", f"{path} exists and is no socket")
    if not discard(path):
        raise InUseError(f"somebody listens on {path}, such as another vipd")


def discard(path: str) -> bool:
    """Remove the socket that a killed daemon left at `path`; return whether it is gone.

    Only a socket that refuses connections is removed: anything else is somebody's.
    """
    try:
        if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trying:
            trying.settimeout(1.0)
            trying.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
        return True
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False
