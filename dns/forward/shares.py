"""Who makes room in the cache for whom.

Lives here: bytes, and the order in which entries go. Pure. Must not: know what an entry says, or
how long it counts (cache.py).

An entry begins on trial and is established when it is asked for again. The oldest on trial goes
first, the longest unused of the established last, and these have four fifths of the room. So who
asks for any number of names once (a scan, random subdomains) pushes out what was asked for once,
and nothing that is in use. Denials and failures have a share of their own and never more: names
that do not exist are free to make up. Each step costs the same, however many entries there are.
"""

from collections import OrderedDict

ENTRY_BYTES = 560
"""What an entry takes beside its message and key: 460 in Python's objects and tables, the rest is
what its allocator loses. Measured; a test watches it."""
ESTABLISHED_SHARE = 0.8
LARGEST_PART = 16
"""No entry may take more than this part of its share."""


class Kept:
    """What is kept, as far as its place is concerned."""

    __slots__ = ("is_established", "is_failure", "key", "share", "size")

    def __init__(self, key: bytes, size: int) -> None:
        self.key = key
        self.size = ENTRY_BYTES + len(key) + size
        """Bytes."""
        self.is_established = False
        self.is_failure = False
        self.share: Share | None = None
        """Where it is; None once it is gone."""


class Share:
    """A part of the cache."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self.evicted = 0
        """How many had to make room."""
        self._established_bytes = 0
        self._trial: OrderedDict[bytes, Kept] = OrderedDict()
        self._established: OrderedDict[bytes, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._trial) + len(self._established)

    def resize(self, most_bytes: int) -> list[Kept]:
        """Have so many bytes from now on; return who had to go."""
        self.most_bytes = most_bytes
        self._demote()
        return self._evict()

    def add(self, entry: Kept) -> list[Kept]:
        """Take an entry whose key is not there. Return who has to go: itself, if too large."""
        if entry.size > self.most_bytes // LARGEST_PART:
            return [entry]
        entry.share = self
        self._trial[entry.key] = entry
        self.bytes += entry.size
        return self._evict()

    def used(self, entry: Kept) -> None:
        """Note that an entry that is here was asked for again."""
        if entry.is_established:
            self._established.move_to_end(entry.key)
            return
        del self._trial[entry.key]
        entry.is_established = True
        self._established[entry.key] = entry
        self._established_bytes += entry.size
        self._demote()

    def remove(self, entry: Kept) -> None:
        """Take out an entry that is here."""
        if entry.is_established:
            del self._established[entry.key]
            self._established_bytes -= entry.size
        else:
            del self._trial[entry.key]
        self.bytes -= entry.size
        entry.share = None

    def _demote(self) -> None:
        """Have those of the established that were not used for longest prove themselves again."""
        while self._established_bytes > self.most_bytes * ESTABLISHED_SHARE:
            _, entry = self._established.popitem(last=False)
            self._established_bytes -= entry.size
            entry.is_established = False
            self._trial[entry.key] = entry

    def _evict(self) -> list[Kept]:
        gone: list[Kept] = []
        while self.bytes > self.most_bytes:
            entry = next(iter((self._trial or self._established).values()))
            self.remove(entry)
            gone.append(entry)
        self.evicted += len(gone)
        return gone
