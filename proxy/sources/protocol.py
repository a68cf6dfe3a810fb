"""What the daemon and the DNS server ask of a source."""

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Protocol

from vipd.proxy.events import Event
from vipd.proxy.model import Pod
from vipd.proxy.names import NamespacedName
from vipd.proxy.notice import Notice


class Source(Protocol):
    """Says what there is, and then what changes."""

    @property
    def passed_over(self) -> Counter[str]:
        """How many objects of kinds that are not read there are (``apps/v1 Deployment``)."""

    def pods(self) -> Mapping[NamespacedName, Pod] | None:
        """Return the Pods by name, None where they are not kept. May be asked from any thread."""

    def tell(self, notice: Notice) -> None:
        """Let a notice reach those who look at the object that it is on, where there is a way.

        Never waits, never fails.
        """

    async def check(self) -> None:
        """Raise ConfigError or SourceError where it can never say anything."""

    def events(self) -> AsyncIterator[Sequence[Event]]:
        """Yield what changed; Synced stands behind everything that existed at the start."""
