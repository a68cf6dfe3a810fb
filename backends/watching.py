"""What a driver offers that is told when someone else changes what it has in the kernel."""

import typing
from collections.abc import AsyncIterator

from msgspec import Struct


class Drift(Struct, frozen=True):
    """Someone else changed what is ours, or may have."""

    what: tuple[str, ...]
    """What was changed, as far as it is told: the first of it."""
    by: str
    """The name of the program; empty where nobody knows."""
    process: int = 0
    """Its process id as the kernel counts; 0 where it is not known."""

    def __str__(self) -> str:
        who = f"{self.by} (process {self.process})" if self.process else self.by
        return who or "somebody"


@typing.runtime_checkable
class Watching(typing.Protocol):
    """A driver that is told. Where one is not, only comparing finds out."""

    def drifts(self) -> AsyncIterator[Drift]:
        """Yield drift as it happens, for ever. Raise OSError where it cannot be watched for."""
