"""What is known of one kind of object: which there are, in which version, and which are malformed.

Lives here: objects of the API in, events out. Must not: ask for anything. While a new list is read,
everything that was known stays; only when it is complete is what it does not hold gone.
"""

from collections.abc import Iterable

from msgspec import Raw

from vipd.proxy.decode import CLUSTER_WIDE, MAX_OBJECT_BYTES, decode_kind, flaws
from vipd.proxy.decode_fields import is_name
from vipd.proxy.errors import ManifestError
from vipd.proxy.events import Applied, Deleted, Event, Kind, Problem
from vipd.proxy.names import NamespacedName
from vipd.proxy.sources.kubernetes import wire
from vipd.proxy.sources.kubernetes.wire import WireError

MOST_UNNAMED = 16
"""Malformed objects without a name that are told of, between two complete lists."""
MOST_MALFORMED = 256
"""Malformed objects that are told of by name at one time."""
MOST_OBJECTS = 1_000_000
"""Objects of a kind that are kept. Clusters are built for 10,000 services and 150,000 pods."""

_UNTOLD = -1
"""In place of a digest, which it never is: the object is to be looked at again in the next list."""


class Known:
    """The objects of a kind. `origin` is where they come from, for messages."""

    def __init__(self, kind: Kind, origin: str) -> None:
        self._kind = kind
        self._origin = origin
        self._digests: dict[NamespacedName, int] = {}
        """Of the bytes that were last read. A version says less: a server whose store was put back
        gives the same ones again, to other things."""
        self._malformed: set[NamespacedName] = set()
        """Those that were told of."""
        self._listed: set[NamespacedName] | None = None
        self._unnamed: set[str] = set()
        self._unnamed_before: set[str] = set()

    def __len__(self) -> int:
        return len(self._digests)

    def begin(self) -> None:
        """Note that a new list begins; one that was not completed is forgotten."""
        self._listed = set()
        self._unnamed_before |= self._unnamed
        self._unnamed = set()

    def complete(self) -> list[Event]:
        """Return what follows from the list being complete: what it did not hold is gone."""
        listed = self._listed or set()
        self._listed = None
        gone = list(self._digests.keys() - listed)
        events = [event for name in gone for event in self._forget(name)]
        events += [Problem(key, None) for key in sorted(self._unnamed_before - self._unnamed)]
        self._unnamed_before = set()
        return events

    def applied(self, raws: Iterable[Raw]) -> list[Event]:
        """Return what follows from objects that exist; those that are as they were say nothing."""
        return [event for raw in raws for event in self._apply(raw)]

    def deleted(self, raw: Raw) -> list[Event]:
        """Return what follows from an object being gone."""
        try:
            name = self._named(raw)
        except ManifestError as error:
            return self._tell_unnamed(error)
        if self._listed is not None:
            self._listed.discard(name)
        return self._forget(name)

    def _apply(self, raw: Raw) -> list[Event]:
        try:
            name = self._named(raw)
        except ManifestError as error:
            return self._tell_unnamed(error)
        digest, before = hash(bytes(raw)), self._digests.get(name)
        if before is None and len(self._digests) >= MOST_OBJECTS:
            why = f"there are more than {MOST_OBJECTS}; the others are not read"
            return self._tell_once("too many", why)
        if self._listed is not None:
            self._listed.add(name)
        if digest == before:
            return []
        self._digests[name] = digest
        try:
            thing = decode_kind(self._kind, raw, self._origin)
        except ManifestError as error:
            if name not in self._malformed and len(self._malformed) >= MOST_MALFORMED:
                self._digests[name] = _UNTOLD
                why = f"more than {MOST_MALFORMED} are malformed; the others are not named"
                return self._tell_once("malformed", why)
            self._malformed.add(name)
            return [Problem(self._key(name), error)]
        left_out = flaws(thing, self._origin, f"{self._kind.value} {name}")
        events: list[Event] = []
        if left_out is not None:
            self._malformed.add(name)
            events.append(Problem(self._key(name), left_out))
        elif name in self._malformed:
            self._malformed.discard(name)
            events.append(Problem(self._key(name), None))
        # A slice of host names or of no service is not read; it may have been another one.
        events.append(Deleted(self._kind, name) if thing is None else Applied(thing))
        return events

    def _forget(self, name: NamespacedName) -> list[Event]:
        if self._digests.pop(name, None) is None:
            return []
        events: list[Event] = [Deleted(self._kind, name)]
        if name in self._malformed:
            self._malformed.discard(name)
            events.append(Problem(self._key(name), None))
        return events

    def _named(self, raw: Raw) -> NamespacedName:
        """Return the name of an object. Raise ManifestError where it has no name."""
        kind = self._kind.value
        if memoryview(raw).nbytes > MAX_OBJECT_BYTES:
            why = f"is larger than {MAX_OBJECT_BYTES >> 20} MiB"
            raise ManifestError(self._origin, kind, "", why)
        try:
            head = wire.head(raw)
        except WireError as error:
            raise ManifestError(self._origin, kind, "", str(error)) from error
        told = head.metadata
        if head.kind not in (None, "", kind):
            raise ManifestError(self._origin, kind, "kind", f"is {head.kind[:64]!r}")
        space = "" if kind in CLUSTER_WIDE else told.namespace
        if not told.name or space is None or not (space or kind in CLUSTER_WIDE):
            field = "metadata.namespace" if told.name else "metadata.name"
            raise ManifestError(self._origin, kind, field, "is missing")
        for field, text in (("metadata.name", told.name), ("metadata.namespace", space)):
            if text and not is_name(text):
                raise ManifestError(self._origin, kind, field, f"{text[:64]!r} is no name")
        return NamespacedName(space, told.name)

    def _tell_unnamed(self, error: ManifestError) -> list[Event]:
        key = f"{self._origin} {error}"
        if key in self._unnamed or len(self._unnamed) >= MOST_UNNAMED:
            return []
        self._unnamed.add(key)
        return [Problem(key, error)]

    def _tell_once(self, key: str, why: str) -> list[Event]:
        """Tell of objects that are too many, until a list is complete that has fewer."""
        key = f"{self._origin} {key}"
        if key in self._unnamed:
            return []
        self._unnamed.add(key)
        return [Problem(key, ManifestError(self._origin, self._kind.value, "", why))]

    def _key(self, name: NamespacedName) -> str:
        return f"{self._origin} {self._kind.value} {name}"
