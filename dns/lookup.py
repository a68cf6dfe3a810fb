"""How a look-up in the zone ends.

Lives here: what zone.py finds and decision.py makes replies of. Pure. Must not: know messages.
"""

from enum import Enum
from typing import NamedTuple

from vipd.dns.apex import Apex
from vipd.dns.records import EMPTY, Node
from vipd.dns.service_names import ServiceNames


class Ending(Enum):
    """How a look-up ends."""

    NODE = "there is such a name"
    NO_NAME = "there is none"
    NOT_READY = "not known yet, as not everything was put"
    NOT_OURS = "others answer for it"


class Found(NamedTuple):
    """The end of a look-up.

    `offset` is where the name of the zone begins in the name, `apex` that zone's top. `services`
    are those whose change may make it another; without any it must not be kept.
    """

    ending: Ending
    node: Node = EMPTY
    apex: Apex | None = None
    offset: int = 0
    services: tuple[ServiceNames, ...] = ()
