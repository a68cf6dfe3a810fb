"""What an operator said and vipd does not do.

Lives here: the one record of that. Must not: know any field.
"""

from msgspec import Struct


class Note(Struct, frozen=True):
    """A field or flag without effect: where it is said, and what happens instead."""

    where: str
    instead: str

    def __str__(self) -> str:
        return f"{self.where}: {self.instead}"
