"""The life of a forwarded TCP connection, in any order of events.

A model of the two sockets does what the core commands, and nothing else.
"""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from vipd.backends.userspace.forwarder.connection import (
    CLOSE,
    CONNECT,
    NOTHING,
    READ,
    RESET,
    SHUT,
    WRITE,
    Connection,
    Flow,
)

BOUND = 7
ATTEMPTS = 3


@dataclass
class Side:
    """A socket and who is at its other end."""

    sent: bytearray = field(default_factory=bytearray)
    """All that its peer ever sent."""
    unread: bytearray = field(default_factory=bytearray)
    finished: bool = False
    """Whether the peer sends no more."""
    room: int = 0
    """Bytes that can be written to it now."""
    arrived: bytearray = field(default_factory=bytearray)
    ends: int = 0
    """How often the peer was told the end."""
    resets: int = 0
    closed: bool = False


class Datapath:
    """Does what the core wants, with bounded buffers."""

    def __init__(self, header: bytes = b"") -> None:
        self.header = header
        self.request, self.reply = Flow(), Flow()
        self.core = Connection(self.request, self.reply, ATTEMPTS)
        self.client, self.endpoint = Side(), Side()
        self.held = {self.request: b"", self.reply: b""}
        self.connects = 1
        self.over = False

    def ways(self) -> tuple[tuple[Flow, Side, Side], ...]:
        return (
            (self.request, self.client, self.endpoint),
            (self.reply, self.endpoint, self.client),
        )

    def do(self, command: int, sink: Side | None = None) -> None:
        assert command == NOTHING or not self.over, "a command after the end"
        if command == CONNECT:
            self.connects += 1
        elif command == SHUT:
            assert sink is not None
            sink.ends += 1
        elif command in (CLOSE, RESET):
            self.over = True
            for side in (self.client, self.endpoint):
                side.closed = True
                if command == RESET:
                    side.resets += 1
                elif not side.ends:
                    side.ends += 1

    def establish(self) -> None:
        if self.request.wants == NOTHING and self.reply.wants == CONNECT:
            self.core.established(holds=bool(self.header))
            self.held[self.request] = self.header

    def move(self, flow: Flow, source: Side, sink: Side) -> None:
        """What an event of either socket leads to."""
        if flow.wants == WRITE:
            held = self.held[flow]
            sink.arrived += held[: sink.room]
            taken = min(len(held), sink.room)
            sink.room -= taken
            self.held[flow] = held[taken:]
            if self.held[flow]:
                return
            flow.taken()
        while flow.wants == READ:
            data = bytes(source.unread[:BOUND])
            if not data:
                if source.finished:
                    self.do(flow.end(), sink)
                return
            del source.unread[:BOUND]
            taken = min(len(data), sink.room)
            sink.arrived += data[:taken]
            sink.room -= taken
            if taken < len(data):
                self.held[flow] = data[taken:]
                flow.hold()

    def check(self) -> None:
        assert self.connects <= ATTEMPTS
        if self.reply.wants == CONNECT:
            assert self.client.sent == self.client.unread, "read before an endpoint took it"
        for flow, source, sink in self.ways():
            first = self.header if flow is self.request else b""
            everything = first + bytes(source.sent)
            assert everything.startswith(sink.arrived)
            assert len(self.held[flow]) <= max(BOUND, len(self.header))
            assert sink.ends <= 1
            if self.held[flow]:
                assert flow.wants == WRITE or self.over
            if sink.ends:
                assert sink.arrived == everything
                assert source.finished


sides = st.sampled_from(["client", "endpoint"])
events = st.one_of(
    st.tuples(st.just("sends"), sides, st.binary(min_size=1, max_size=20)),
    st.tuples(st.just("takes"), sides, st.integers(1, 20)),
    st.tuples(st.just("finishes"), sides),
    st.tuples(st.just("established")),
)
troubles = st.one_of(
    st.tuples(st.just("failed")),
    st.tuples(st.just("breaks"), sides),
    st.tuples(st.just("cut")),
)


def happen(datapath: Datapath, event: tuple[object, ...]) -> None:
    kind = event[0]
    if kind == "established":
        datapath.establish()
    elif kind == "failed":
        datapath.do(datapath.core.failed())
    elif kind in ("breaks", "cut"):
        datapath.do(datapath.core.reset())
    else:
        side = datapath.client if event[1] == "client" else datapath.endpoint
        if datapath.reply.wants == CONNECT and side is datapath.endpoint:
            return
        if kind == "sends" and not side.finished and not side.closed:
            data = event[2]
            assert isinstance(data, bytes)
            side.sent += data
            side.unread += data
        elif kind == "takes":
            assert isinstance(event[2], int)
            side.room += event[2]
        elif kind == "finishes":
            side.finished = True
    for way in datapath.ways():
        datapath.move(*way)
    datapath.check()


headers = st.sampled_from([b"", b"PROXY of 20 bytes ..."])


@given(st.lists(st.one_of(events, troubles), max_size=60), headers)
def test_whatever_happens_bytes_are_right_and_bounded_and_the_end_is_the_end(
    history: list[tuple[object, ...]], header: bytes
) -> None:
    datapath = Datapath(header)
    for event in history:
        happen(datapath, event)
    assert {datapath.client.resets, datapath.endpoint.resets} in ({0}, {1})


@given(st.lists(events, max_size=60), headers)
def test_nothing_is_lost_while_both_sides_live(
    history: list[tuple[object, ...]], header: bytes
) -> None:
    datapath = Datapath(header)
    for event in history:
        happen(datapath, event)
    happen(datapath, ("established",))
    for side in ("client", "endpoint"):
        happen(datapath, ("takes", side, 10_000))
    assert datapath.endpoint.arrived == header + bytes(datapath.client.sent)
    assert datapath.client.arrived == datapath.endpoint.sent
    assert datapath.endpoint.ends == datapath.client.finished
    assert datapath.client.ends == datapath.endpoint.finished
    assert datapath.over == (datapath.client.finished and datapath.endpoint.finished)
    assert not datapath.client.resets


@given(
    st.lists(events, max_size=40),
    st.one_of(st.tuples(st.just("breaks"), sides), st.tuples(st.just("cut"))),
    st.lists(st.one_of(events, troubles), max_size=20),
)
def test_a_reset_reaches_the_other_side_and_ends_all(
    before: list[tuple[object, ...]], trouble: tuple[object, ...], after: list[tuple[object, ...]]
) -> None:
    datapath = Datapath()
    for event in before:
        happen(datapath, event)
    was_over = datapath.over
    happen(datapath, trouble)
    assert datapath.over
    assert datapath.client.resets == datapath.endpoint.resets == (0 if was_over else 1)
    arrived = bytes(datapath.client.arrived), bytes(datapath.endpoint.arrived)
    for event in after:
        happen(datapath, event)
    assert (bytes(datapath.client.arrived), bytes(datapath.endpoint.arrived)) == arrived


@given(st.integers(1, 5))
def test_endpoints_are_tried_up_to_the_bound_and_then_the_client_is_reset(attempts: int) -> None:
    core = Connection(Flow(), Flow(), attempts)
    commands = [core.failed() for _ in range(attempts + 2)]
    assert commands == [CONNECT] * (attempts - 1) + [RESET, NOTHING, NOTHING]


def test_after_a_byte_could_be_read_no_other_endpoint_is_tried() -> None:
    core = Connection(Flow(), Flow(), 4)
    core.established()
    assert core.failed() == NOTHING
    assert not core.is_over
