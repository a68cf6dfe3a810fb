"""The parts of the daemon that metrics are collected from.

Lives here: which they are, and what is asked of those that not every daemon has. Must not: collect.
"""

import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from vipd.proxy.departures import Departures
from vipd.proxy.measured import Distribution
from vipd.proxy.metrics.counters import Counters
from vipd.proxy.names import Family
from vipd.proxy.programming import Programming
from vipd.proxy.switching import Switching
from vipd.proxy.sync import Sync


class Health(typing.Protocol):
    """Who answers /healthz and /livez."""

    @property
    def answers(self) -> Mapping[tuple[str, int], int]:
        """How many there were, by ``healthz`` or ``livez`` and HTTP code."""


class StaleFlows(typing.Protocol):
    """Who removes entries of connection tracking that lead nowhere."""

    @property
    def deleted(self) -> Mapping[Family, int]:
        """How many were removed."""

    @property
    def took(self) -> Mapping[Family, Distribution]:
        """How long each time took, in seconds."""


@typing.runtime_checkable
class Refusing(typing.Protocol):
    """Who sets kernel settings."""

    @property
    def refused(self) -> Collection[str]:
        """Names of those that could not be set."""


@typing.runtime_checkable
class Hearing(typing.Protocol):
    """A source that is told by somebody far away."""

    def silence(self) -> Mapping[str, float]:
        """Return for how many seconds nothing was heard about each kind of object."""


class Written(typing.Protocol):
    """What became of the Events that were to be written."""

    @property
    def written(self) -> int:
        """How many were."""

    @property
    def held_back(self) -> int:
        """How many were not, because so many are enough."""

    @property
    def failed(self) -> int:
        """How many the API server did not take."""

    @property
    def lost(self) -> int:
        """How many there was no room for."""


@typing.runtime_checkable
class WritingEvents(typing.Protocol):
    """A source that shows notices to those who run the cluster."""

    @property
    def notices(self) -> Written:
        """What became of them."""


@typing.runtime_checkable
class WritingRules(typing.Protocol):
    """A driver of iptables."""

    @property
    def rules(self) -> Mapping[tuple[str, Family], int]:
        """How many rules of ours each table had when it was listed last."""

    @property
    def written(self) -> Mapping[tuple[str, Family], int]:
        """How many rules the last commit wrote into each table."""


@typing.runtime_checkable
class Locking(typing.Protocol):
    """A driver that needs the xtables lock."""

    @property
    def lock_waits(self) -> int:
        """How often another program held it."""


@typing.runtime_checkable
class Tidying(typing.Protocol):
    """A driver that removes later what is out of use."""

    @property
    def cleanup_failures(self) -> Mapping[Family, int]:
        """How often that could not be done yet."""


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """What there is to be collected from; each may be asked from a thread."""

    programming: Programming
    sync: Sync
    switching: Switching
    departures: Departures
    source: object
    counters: Counters
    counts: Callable[[], bool] = lambda: True
    """Whether connections are to be counted now."""
    health: Health | None = None
    stale_flows: StaleFlows | None = None
    refusing: Collection[object] = field(default=())
    """Who may have been refused a kernel setting."""

    @property
    def counted(self) -> Counters | None:
        """What was counted of services and endpoints; None where nothing is to be."""
        return self.counters if self.counts() else None
