"""Moving the bytes of one direction: what is read, how much, and by which system call.

Lives here: the choice between the ways to move bytes, their buffers, and short writes. Must not:
accept, connect, close sockets, or wait: the forwarder says when a socket may be read or written.

There are three ways, and a stream goes from one to the next as it proves long:
1. `recv` of up to SMALL bytes and `send`: two calls for a request. A read that is not full leaves
   nothing behind, so no third call is needed to be told so. Measured on loopback, a large buffer
   (recv_into, and a view of it to send) is no faster than this for requests.
2. `recv_into` one large buffer of all streams, and `send`, after a read of SMALL bytes was full.
   256 KiB take about 0.7 of the processor time that 64 KiB take, for each byte.
3. `splice` through a pipe, after SPLICE_AFTER full reads of the large buffer: nothing is copied,
   which takes about 0.6 of the processor time of (2), for each byte. Not from the start: a pipe
   cannot be read short, so that each turn costs one call more.
Whatever the sink does not take is held: a remainder of the buffer, or the pipe with what is in it.
A stream with a slow sink begins again with (1), so that it holds little the next time.
"""

import contextlib
import errno
import mmap
import os
import socket
from typing import Final

from vipd.backends.userspace.forwarder.connection import NOTHING
from vipd.backends.userspace.forwarder.streams import PIPE, Pipe, Stream
from vipd.backends.userspace.forwarder.tcp_limits import TcpLimits

MORE: Final = 7
"""There may be more to read, but others have to have their turn."""
BROKEN: Final = 8
"""The sink was reset; what its side has sent may still be read, but an end is none: the write has
taken the error away that a read would have met."""
BROKEN_AFTER_END: Final = 9
"""The sink is broken after its side has ended, which may still be read."""

TINY: Final = 4096
SMALL: Final = 16384
LARGE: Final = 1 << 18
TURNS: Final = 8
"""Large reads of one stream before others have their turn."""
SPLICE_AFTER: Final = 8
"""Large reads that were full: 2 MiB."""
SPLICED: Final = 1 << 30
"""The length of a stream that is being spliced."""

_NOW: Final = socket.MSG_DONTWAIT
LAST: Final = socket.MSG_DONTWAIT | socket.MSG_MORE
"""For `move`: the source's end has come, so what is read goes out in one segment with the end.
Measured on loopback, 7 % less processor time for a new connection, and a packet less."""
_SPLICE: Final = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class Pump:
    """Moves bytes. One for all streams of a loop: nothing stays in its buffer."""

    def __init__(self, limits: TcpLimits) -> None:
        self.held = 0
        """Bytes that all streams together hold."""
        self.pipes = 0
        self._limits = limits
        # Not a bytearray: of this, a worker without long streams has nothing in memory.
        self._buffer = memoryview(mmap.mmap(-1, LARGE))
        self._spare: Pipe | None = None

    def move(self, stream: Stream, flags: int = _NOW) -> int:
        """Move what can be moved now; only while the stream wants READ. `flags` may be LAST.

        Returns NOTHING, MORE, BROKEN, BROKEN_AFTER_END, or a command of the connection.
        """
        if stream.length:
            return self._move_much(stream)
        source = stream.source
        size = SMALL if self.held < self._limits.most_held else TINY
        try:
            while True:
                data = source.recv(size, _NOW)
                if not data:
                    return stream.end()
                try:
                    sent = stream.sink.send(data, flags)
                except BlockingIOError:
                    sent = 0
                except OSError as error:
                    return _broken(error)
                count = len(data)
                if sent < count:
                    self._hold(stream, memoryview(data)[sent:])
                    return NOTHING
                if count == size:
                    if size == SMALL:
                        stream.length = 1
                    return MORE if stream.length == 0 else self._move_much(stream)
                if not stream.hung:
                    return NOTHING
        except BlockingIOError:
            if flags == LAST:  # urgent data, which hides what is behind
                _push(stream.sink)
            return NOTHING
        except OSError:
            if flags == LAST:  # a reset after the end
                _push(stream.sink)
            return stream.connection.reset()

    def write(self, stream: Stream) -> int:
        """Write what is held, and then go on reading; only while the stream wants WRITE.

        Returns the same as `move`.
        """
        pipe = stream.pipe
        try:
            if pipe is not None:
                while pipe.count:
                    sent = os.splice(pipe.reads, stream.sink.fileno(), pipe.count, flags=_SPLICE)
                    pipe.count -= sent
                    self.held -= sent
                stream.pipe = None
                self._give_back(pipe)
            else:
                sent = stream.sink.send(stream.held, _NOW)
                self.held -= sent
                if sent < len(stream.held):
                    stream.held = memoryview(stream.held)[sent:]
                    return NOTHING
                stream.held = b""
        except BlockingIOError:
            return NOTHING
        except OSError as error:
            return _broken(error)
        stream.taken()
        return self.move(stream)

    def forget(self, stream: Stream) -> None:
        """Let go of what a stream holds whose connection is over."""
        self.held -= len(stream.held)
        stream.held = b""
        if stream.pipe is not None:
            self.held -= stream.pipe.count
            self._drop(stream.pipe)
            stream.pipe = None

    def hold(self, stream: Stream, data: bytes) -> None:
        """Let a stream that is about to be established hold `data`, to be written first."""
        stream.held = data
        self.held += len(data)

    def close(self) -> None:
        """Close the pipe that no stream has."""
        if self._spare is not None:
            self._drop(self._spare)
            self._spare = None

    def _move_much(self, stream: Stream) -> int:
        """Move what can be moved now of a stream whose reads were full."""
        if self.held >= self._limits.most_held:
            stream.length = 0
            return MORE
        if stream.length > SPLICE_AFTER and (pipe := self._take_pipe()) is not None:
            return self._splice(stream, pipe)
        source = stream.source
        sink = stream.sink
        buffer = self._buffer
        try:
            for _ in range(TURNS):
                count = source.recv_into(buffer, 0, _NOW)
                if not count:
                    return stream.end()
                data = buffer if count == LARGE else buffer[:count]
                try:
                    sent = sink.send(data, _NOW)
                except BlockingIOError:
                    sent = 0
                except OSError as error:
                    return _broken(error)
                if sent < count:
                    self._hold(stream, memoryview(bytes(data[sent:])))
                    return NOTHING
                if count == LARGE:
                    stream.length += 1
                    continue
                if count < SMALL:
                    stream.length = 0
                if not stream.hung:
                    return NOTHING
        except BlockingIOError:
            return NOTHING
        except OSError:
            return stream.connection.reset()
        return MORE

    def _splice(self, stream: Stream, pipe: Pipe) -> int:
        """Move what can be moved now through an empty pipe."""
        source = stream.source.fileno()
        sink = stream.sink.fileno()
        if stream.length != SPLICED:  # splice knows no MSG_DONTWAIT for sockets
            os.set_blocking(source, False)
            os.set_blocking(sink, False)
            stream.length = SPLICED
        try:
            for _ in range(TURNS):
                count = os.splice(source, pipe.writes, PIPE, flags=_SPLICE)
                if not count:
                    return stream.end()
                pipe.count = count
                try:
                    while pipe.count:
                        pipe.count -= os.splice(pipe.reads, sink, pipe.count, flags=_SPLICE)
                except BlockingIOError:
                    self._spare = None
                    stream.pipe = pipe
                    stream.length = 0
                    self.held += pipe.count
                    stream.hold()
                    return NOTHING
                except OSError as error:
                    self._spare = None
                    self._drop(pipe)
                    return _broken(error)
                if count < SMALL:
                    stream.length = 0
                    return MORE
        except BlockingIOError:
            return NOTHING
        except OSError:
            return stream.connection.reset()
        return MORE

    def _hold(self, stream: Stream, data: memoryview) -> None:
        stream.length = 0
        stream.held = data
        self.held += len(data)
        stream.hold()

    def _take_pipe(self) -> Pipe | None:
        """Return the empty pipe that streams share, made where some stream has kept the last."""
        if self._spare is None and self.pipes < self._limits.most_pipes:
            try:
                self._spare = Pipe()
            except OSError:
                return None
            self.pipes += 1
        return self._spare

    def _give_back(self, pipe: Pipe) -> None:
        if self._spare is None:
            self._spare = pipe
        else:
            self._drop(pipe)

    def _drop(self, pipe: Pipe) -> None:
        pipe.close()
        self.pipes -= 1


def _push(sink: socket.SocketType) -> None:
    """Let the kernel send what it keeps for more to come.

    `__tcp_sock_set_nodelay` in net/ipv4/tcp.c, Linux 6.18.
    """
    with contextlib.suppress(OSError):
        sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _broken(error: OSError) -> int:
    """Return what a failed write says of the sink.

    A reset after the end leaves EPIPE, any other ECONNRESET: `tcp_reset` in net/ipv4/tcp_input.c,
    Linux 6.18.
    """
    return BROKEN_AFTER_END if error.errno == errno.EPIPE else BROKEN
