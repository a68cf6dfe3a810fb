"""Replies that are kept ready, by the question's bytes in lower case.

Lives here: the table that the hot path looks into, its bound, and which replies go with what they
were made of. Pure. Must not: make replies.
"""

from collections.abc import Iterable

from vipd.dns.replies import Fixed, Long, Ready, Rotating

MOST_BYTES = 48 << 20
_ENTRY = 200
"""Bytes of memory of an entry, beside its question and sections, about (CPython 3.11)."""


class Source:
    """What replies are made of: when it changes, they go."""

    __slots__ = ("_questions", "_round")

    def __init__(self) -> None:
        self._questions: dict[bytes, None] | None = None
        self._round = 0

    def add(self, question: bytes, current: int) -> None:
        """Remember that a reply is made of this; those of rounds before the current are gone."""
        if self._questions is None or self._round != current:
            self._questions, self._round = {}, current
        # Again and again, where another source of the same reply changes: once is enough.
        self._questions[question] = None

    def take_questions(self) -> list[bytes]:
        """Return the questions whose replies are made of this, and forget them."""
        found = self._questions or {}
        self._questions = None
        return list(found)


class Prebuilt:
    """The replies. Where one more would take more than `most` bytes, all go first: a round ends."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self.most = most
        self.replies: dict[bytes, Ready] = {}
        """By name, type and class, in lower case; always the same object."""
        self.bytes = 0
        """Memory, about."""
        self.rounds = 0
        """How often the bound was met."""

    def keep(self, question: bytes, reply: Ready, sources: Iterable[Source]) -> None:
        """Keep a reply until one of its sources changes. Nothing happens where it is too large."""
        size = _size(question, reply)
        if size > self.most or question in self.replies:
            return
        if self.bytes + size > self.most:
            self.replies.clear()
            self.bytes = 0
            self.rounds += 1
        self.replies[question] = reply
        self.bytes += size
        for source in sources:
            source.add(question, self.rounds)

    def drop(self, questions: Iterable[bytes]) -> None:
        """Forget replies, and those that are not there anyway."""
        for question in questions:
            reply = self.replies.pop(question, None)
            if reply is not None:
                self.bytes -= _size(question, reply)


def _size(question: bytes, reply: Ready) -> int:
    if isinstance(reply, Fixed):
        return _ENTRY + len(question) + len(reply.sections)
    if isinstance(reply, (Rotating, Long)):
        return _ENTRY + len(question) + reply.size
    return _ENTRY + len(question)
