"""What is asked of others, and what they said: the two values that everything here passes on.

Lives here: both. Pure. Must not: know messages as upstreams write them (reading.py).
"""

import struct
from typing import NamedTuple

from vipd.dns import names
from vipd.dns.forward import wire

_KEY = struct.Struct(">HB")


class Question(NamedTuple):
    """A question in class IN. Two that are equal get one reply."""

    name: bytes
    """Wire form, lower case."""
    type: int
    dnssec: bool = False
    """DO: signatures are wanted."""
    checking_disabled: bool = False
    """CD: the upstream need not check them."""

    def __str__(self) -> str:
        return f"{names.text_of(self.name)} type {self.type}"


def key_of(name: bytes, qtype: int, dnssec: bool, checking_disabled: bool) -> bytes:
    """Return what a question is kept under."""
    return name + _KEY.pack(qtype, dnssec + 2 * checking_disabled)


def question_of(key: bytes) -> Question:
    """Return the question of a key."""
    kind, flags = _KEY.unpack_from(key, len(key) - _KEY.size)
    return Question(key[: -_KEY.size], kind, bool(flags & 1), bool(flags & 2))


class Reply(NamedTuple):
    """What an upstream said, as far as it is of use; or that none said anything."""

    rcode: int
    message: bytes = b""
    """As `Got.message`; empty where it is not for clients."""
    ttl: int = 0
    """Seconds for which it may be kept; 0: for no later question."""
    is_denial: bool = False
    """Whether it says that there is no such name or no such record."""
    target: bytes | None = None
    """A CNAME's target, which the reply has nothing of: it has to be asked for."""
    extended_error: int | None = None
    is_truncated: bool = False
    """TC: the rest comes over TCP."""
    is_lame: bool = False
    """Whether it only names other servers: the upstream does not know, nor look further."""
    server_cookie: bytes = b""

    @property
    def is_final(self) -> bool:
        """Whether no other upstream would say it better."""
        return self.message != b"" and self.rcode != wire.SERVFAIL


def failure(question: Question, extended_error: int | None, ttl: int = 0) -> Reply:
    """Return the reply that there is no answer to be had."""
    flags = wire.CD if question.checking_disabled else 0
    message = wire.reply(question.name, question.type, wire.SERVFAIL, flags=flags)
    return Reply(wire.SERVFAIL, message, ttl, extended_error=extended_error)
