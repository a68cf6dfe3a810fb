"""The life of one forwarded TCP connection, without sockets: events go in, commands come out.

Lives here: when the next endpoint is tried, what each direction does next, when an end or a reset
is passed on, and when all is over. Pure. Must not: know sockets, bytes, clocks, or how an endpoint
is chosen.

A direction is a `Flow`: it reads while it holds nothing, and holds what was read and not taken yet.
So at most one read is buffered in each direction; the end of the data is seen only when all before
it is written, and may be passed on at once. Bytes that the other side takes at once change nothing
and are no event: the bulk path looks at `Flow.wants` and calls nothing here.
Source of half-close and reset: RFC 9293 §3.6 and §3.10.7.
"""

from typing import Final

NOTHING: Final = 0
"""Nothing is to be done until the next event."""
CONNECT: Final = 1
"""Connect to an endpoint, one that was not tried; a flow wants it until the connect has an end."""
READ: Final = 2
"""Read from the source as soon as it is readable."""
WRITE: Final = 3
"""Write what is held as soon as the sink is writable, and read nothing."""
SHUT: Final = 4
"""Pass on the end of the data: shut down the writing side of the sink."""
CLOSE: Final = 5
"""Close both sockets in order, which passes on the end of the data where it was not yet."""
RESET: Final = 6
"""Reset both sockets."""


class Flow:
    """One direction of a connection. `wants` is CONNECT, READ, WRITE or NOTHING."""

    __slots__ = ("_whole", "wants")

    def __init__(self) -> None:
        self.wants = NOTHING
        self._whole: Connection | None = None

    def hold(self) -> None:
        """Say that the sink did not take all that was read."""
        if self.wants == READ:
            self.wants = WRITE

    def taken(self) -> None:
        """Say that the sink has taken all that was held."""
        if self.wants == WRITE:
            self.wants = READ

    def end(self) -> int:
        """Say that the source has ended. Returns SHUT, or CLOSE when both directions have ended."""
        whole = self._whole
        if self.wants != READ or whole is None:
            return NOTHING
        self.wants = NOTHING
        whole.open_flows -= 1
        if whole.open_flows:
            return SHUT
        whole.over()
        return CLOSE


class Connection:
    """A client's connection and the one to an endpoint, from the accept to the end of both.

    `request` is the flow from the client, `reply` the one from the endpoint. `attempts` is how many
    endpoints may be tried, 1 or more.
    """

    __slots__ = ("_reply", "_request", "attempts", "is_over", "open_flows")

    def __init__(self, request: Flow, reply: Flow, attempts: int) -> None:
        self._request = request
        self._reply = reply
        request._whole = reply._whole = self
        self.attempts = attempts
        self.open_flows = 2
        self.is_over = False
        reply.wants = CONNECT

    def failed(self) -> int:
        """Say that an endpoint refused or did not answer in time. Returns CONNECT or RESET."""
        if self._reply.wants != CONNECT:
            return NOTHING
        self.attempts -= 1
        return CONNECT if self.attempts > 0 else self.reset()

    def established(self, *, holds: bool = False) -> None:
        """Say that an endpoint took the connection; only from now on the client is read.

        `holds` is whether there is something to be written to the endpoint before that.
        """
        if self._reply.wants == CONNECT:
            self._request.wants = WRITE if holds else READ
            self._reply.wants = READ

    def reset(self) -> int:
        """Say that one side is broken or reset, is to be cut, or that no endpoint is left.

        Returns RESET, or NOTHING when all is over already.
        """
        if self.is_over:
            return NOTHING
        self.over()
        return RESET

    def over(self) -> None:
        """End both flows: no event has a command after this. Not to be called from outside."""
        self.is_over = True
        self._request.wants = self._reply.wants = NOTHING
        self._request._whole = self._reply._whole = None
