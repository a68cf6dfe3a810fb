"""What the daemon and the DNS server ask of a source."""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from vipd.proxy.events import Event


class Source(Protocol):
    """Says what there is, and then what changes."""

    @property
    def passed_over(self) -> Counter[str]:
        """How many objects of kinds that are not read there are (``apps/v1 Deployment``)."""

    async def check(self) -> None:
        """Raise ConfigError or SourceError where it can never say anything."""

    def events(self) -> AsyncIterator[Sequence[Event]]:
        """Yield what changed; Synced stands behind everything that existed at the start."""
