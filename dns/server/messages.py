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


class Supervised(Struct, array_like=True, frozen=True):
    """What the daemon has counted since its start."""

    restarts: int = 0
    """Processes that ended and were started again."""
    refused: int = 0
    """Changed configurations that were wrong."""


# From the daemon


class Greet(Struct, tag=True, array_like=True):
    """Say who you are. Answered Met."""


class Begin(Struct, tag=True, array_like=True):
    """Be this from now on. Answered Done.

    Until everything was told for the first time, questions for the cluster's names get SERVFAIL.
    """

    settings: DnsSettings
    listens: list[WireListen] = []
    """Where to answer beside where it does; two sockets come with each."""
    outlives: bool = True
    """Whether to go on without whoever sends this."""
    anew: bool = True
    """Whether everything is told anew, and answered from once it was; else what was told stays."""
    leave: list[WireListen] = []
    """Where to answer no more, once what has arrived there is answered."""
    http: list[WireListen] = []
    """Where to tell metrics beside where it does; a socket comes with each, behind the others."""
    leave_http: list[WireListen] = []


class Feed(Struct, tag=True, array_like=True):
    """Changes; `synced` once everything was told. Answered Fed."""

    portion: Portion
    synced: bool = False
    supervised: Supervised = Supervised()
    serial: int = 0
    """Of the SOA records from now on; 0: as it is."""


class Sibling(Struct, tag=True, array_like=True):
    """Ask this process of the same server on the socket beside, to tell of all. Answered Done."""

    number: int


class Hear(Struct, tag=True, array_like=True):
    """Say on the socket beside how it is, to whoever asks there. Answered Done."""


class Serve(Struct, tag=True, array_like=True):
    """Answer on the sockets. Answered Done."""


class Tell(Struct, tag=True, array_like=True):
    """Say how it is. Answered Told."""


class HandOver(Struct, tag=True, array_like=True):
    """Give all sockets away, and go on answering on them. Answered HandedOver."""

    skip: int = 0
    """How many addresses were given before."""


class Retire(Struct, tag=True, array_like=True):
    """Take no new questions, and end once those that are here were answered. Answered Done."""


class Quit(Struct, tag=True, array_like=True):
    """End at once. Not answered."""


Request = Greet | Begin | Feed | Sibling | Hear | Serve | Tell | HandOver | Retire | Quit


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
    forwarded_rcodes: dict[str, int] = {}
    """Replies of forwarded questions by name of their rcode; they are in `rcodes` too."""
    supervised: Supervised = Supervised()
    http: list[WireListen] = []
    """Where it tells metrics."""
    started: float = 0.0
    """When the process began, in seconds since 1970."""


class HandedOver(Struct, tag=True, array_like=True):
    """Two sockets of each come beside it, UDP before TCP; then one of each for HTTP."""

    listens: list[WireListen]
    http: list[WireListen] = []
    more: bool = False
    """Whether there are more addresses, to be asked for next."""


Answer = Done | Met | Fed | Told | HandedOver

_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_TOLD: msgspec.msgpack.Decoder[Told] = msgspec.msgpack.Decoder(Told)
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


def told_of(data: bytes) -> Told:
    """Return how a process says that it is. Raise msgspec.DecodeError."""
    return _TOLD.decode(data)
