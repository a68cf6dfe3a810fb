"""A question at one upstream, over one transport.

Lives here: what its course remembers of it. Pure. Must not: decide anything (course.py), or hold a
socket (fetch.py).
"""

from typing import NamedTuple

from vipd.dns.forward.reading import Unwanted
from vipd.dns.forward.standing import Standing


class Attempt:
    """A question at one upstream, over one transport."""

    __slots__ = (
        "again",
        "due",
        "edns",
        "is_late",
        "is_open",
        "is_trial",
        "standing",
        "started",
        "tcp",
        "unwanted",
        "why",
    )

    def __init__(self, standing: Standing, *, tcp: bool, edns: bool, trial: bool) -> None:
        self.standing = standing
        self.tcp = tcp or standing.upstream.tcp
        self.edns = edns
        self.is_trial = trial
        self.is_open = True
        self.is_late = False
        self.started = 0.0
        self.due = 0.0
        """When it is late."""
        self.unwanted = 0
        """How much came that was not the reply."""
        self.again = 0
        """How often the same upstream was asked in other ways before, or beside it."""
        self.why: Unwanted | None = None
        """What came over UDP, that this is over TCP."""


class Steps(NamedTuple):
    """What has to be done now."""

    begin: list[Attempt]
    close: list[Attempt]
