"""Connections as a dataplane counts them: one number for each counter that it has.

Lives here: the record, and what a driver offers that can tell them. Must not: add them up
(proxy/metrics/connections.py does), or know any one dataplane.
"""

import typing
from collections.abc import Callable, Collection, Hashable, Iterable
from enum import StrEnum
from typing import NamedTuple

from vipd.proxy.names import ServicePortName
from vipd.proxy.virtualserver import VirtualServer


class Outcome(StrEnum):
    """What became of connections."""

    GIVEN = "given"
    """An endpoint got them."""
    REJECTED = "rejected"
    """Refused, as there is no endpoint."""
    DROPPED = "dropped"
    """Left without an answer, as no endpoint is on this node."""
    UNSERVED = "unserved"
    """Refused or left without an answer, for lack of an endpoint: it is not counted which."""
    ASKED = "asked"
    """Whatever became of them, where not every source is allowed."""
    ADMITTED = "admitted"
    """Of those asked, from a source that is allowed."""
    DENIED = "denied"
    """From a source that is not allowed."""


class Count(NamedTuple):
    """What one counter says.

    It only rises, but for when its object is made anew: then it begins at 0. `at` tells it from
    every other counter of the same dataplane, for as long as that runs.
    """

    at: Hashable
    owner: ServicePortName
    endpoint: str
    """As an Endpoint prints; empty where it is not about one."""
    outcome: Outcome
    number: int


Take = Callable[[Iterable[Count]], None]
"""Takes counts as they are read, in a thread; what it is given may raise DataplaneError."""


@typing.runtime_checkable
class Tallying(typing.Protocol):
    """A driver that counts connections, by itself or by the kernel. Every mode's does."""

    async def tally(self, servers: Collection[VirtualServer], take: Take, seconds: float) -> None:
        """Read what is counted of these virtual servers, who has to be all of the dataplane's.

        Counters that stand at 0 may be left out, and some where something is changed meanwhile.
        Costs what listing costs; changes nothing, and keeps no commit waiting. Raise
        DataplaneError, such as Busy when it takes longer than `seconds`; what was taken until then
        is right.
        """
