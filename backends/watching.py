"""What a driver offers that is told, or finds out cheaply, when someone else changes what it has in
the kernel.
"""

import typing
from collections.abc import AsyncIterator, Callable, Sequence

from msgspec import Struct


class Drift(Struct, frozen=True):
    """Someone else changed what is ours, or may have."""

    what: tuple[str, ...]
    """What was changed, as far as it is told: the first of it."""
    by: str = ""
    """The name of the program; empty where nobody knows."""
    process: int = 0
    """Its process id as the kernel counts; 0 where it is not known."""

    def __str__(self) -> str:
        who = f"{self.by} (process {self.process})" if self.process else self.by
        return who or "somebody"


Watch = Callable[[], AsyncIterator[Drift]]
"""Yields drift as it happens, for ever; ends where there is nothing to watch. Raises OSError or a
DataplaneError where it cannot be watched now."""


@typing.runtime_checkable
class Mending(typing.Protocol):
    """A driver that puts the kernel right by what was committed, faster than by an observation."""

    async def mend(self, program: typing.Any) -> int:
        """Make the kernel hold exactly the program; return how many objects that took.

        Raise DataplaneError, after which only an observation tells what the kernel has.
        """

    async def differing(self, program: typing.Any) -> Sequence[str]:
        """Return what the kernel has otherwise than the program, in words. Raise DataplaneError."""


@typing.runtime_checkable
class Watching(typing.Protocol):
    """A driver that watches. Where one does not, only comparing finds out."""

    def watches(self) -> Sequence[Watch]:
        """Return what has to be watched side by side."""
