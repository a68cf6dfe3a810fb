"""What the daemon and a process that answers say to each other, as bytes.

Lives here: the messages. Pure. Must not: send. A message is msgpack; each request is answered by
one, so that there is never more than one on its way.

`Greet`, `HandOver`, `Retire` and `Quit` are said to processes of other versions too: they must go
on being understood, and their answers.
"""

import msgspec
from msgspec import Struct

from vipd.dns.feed import Portion
from vipd.dns.settings import DnsSettings

WireListen = tuple[str, int]
"""Address and port. Its sockets come beside the message, UDP before TCP."""
Sample = tuple[str, list[tuple[str, str]], float]


# From the daemon


class Greet(Struct, tag=True, array_like=True):
    """Say who you are. Answered Met."""


class Begin(Struct, tag=True, array_like=True):
    """Be this from now on; everything is told anew, and answered from once it was. Answered Done.

    Until it was for the first time, questions for the cluster's names get SERVFAIL.
    """

    settings: DnsSettings
    listens: list[WireListen] = []
    """Where to answer beside where it does; two sockets come with each."""
    outlives: bool = True
    """Whether to go on without whoever sends this."""


class Feed(Struct, tag=True, array_like=True):
    """Changes; `synced` once everything was told. Answered Fed."""

    portion: Portion
    synced: bool = False


class Serve(Struct, tag=True, array_like=True):
    """Answer on the sockets. Answered Done."""


class Tell(Struct, tag=True, array_like=True):
    """Say how it is. Answered Told."""


class HandOver(Struct, tag=True, array_like=True):
    """Give all sockets away, and go on answering on them. Answered HandedOver."""


class Retire(Struct, tag=True, array_like=True):
    """Take no new questions, and end once those that are here were answered. Answered Done."""


class Quit(Struct, tag=True, array_like=True):
    """End at once. Not answered."""


Request = Greet | Begin | Feed | Serve | Tell | HandOver | Retire | Quit


# From the process


class Done(Struct, tag=True, array_like=True):
    """It is done."""


class Fed(Struct, tag=True, array_like=True):
    """The changes are made: no later answer is from before."""

    services: int
    """How many have names."""
    serial: int


class Met(Struct, tag=True, array_like=True):
    """Who it is. New fields come last, with a default."""

    version: str
    pid: int
    number: int
    retired: bool


class Told(Struct, tag=True, array_like=True):
    """How it is."""

    version: str
    pid: int
    number: int
    retired: bool = False
    synced: bool = False
    services: int = 0
    serial: int = 0
    fed_seconds: float = 0.0
    """Since the last change was told."""
    stale_seconds: float | None = None
    """Since nobody tells changes any more; None while somebody does."""
    listens: list[WireListen] = []
    connections: int = 0
    """Over TCP, open now."""
    waiting: int = 0
    """Questions that wait for upstreams."""
    counters: dict[str, int] = {}
    types: dict[str, int] = {}
    """Questions by ``PROTOCOL FAMILY TYPE``: ``udp 1 A``."""
    rcodes: dict[str, int] = {}
    """Replies by name of their rcode."""
    request_sizes: dict[str, list[int]] = {}
    """By protocol: how many were at most as long as each bound of SIZES, and longer ones."""
    response_sizes: dict[str, list[int]] = {}
    durations: list[int] = []
    """How many replies took at most as long as each bound of SECONDS, and longer ones."""
    sums: dict[str, float] = {}
    """Of what the histograms count: ``request udp``, ``response udp`` (bytes), ``duration``."""
    zone: dict[str, int] = {}
    """Prebuilt replies and their bytes."""
    samples: list[Sample] = []
    """What the forwarder has counted: names as in docs/dns.md, labels, values."""


class HandedOver(Struct, tag=True, array_like=True):
    """Two sockets of each come beside it, UDP before TCP."""

    listens: list[WireListen]


Answer = Done | Met | Fed | Told | HandedOver

_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Request | Answer) -> bytes:
    """Return a message as bytes."""
    return _ENCODER.encode(message)


def request_of(data: bytes) -> Request:
    """Return what was asked. Raise msgspec.DecodeError."""
    return _REQUESTS.decode(data)


def answer_of(data: bytes) -> Answer:
    """Return what was answered. Raise msgspec.DecodeError."""
    return _ANSWERS.decode(data)
