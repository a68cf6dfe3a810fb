"""What one manifest file holds, and what is left of it when a part cannot be read.

Lives here: a file's content with its objects and problems, made from the one before so that only
what changed is decoded. Must not: touch the file system, or know other files (claims.py).
"""

from collections import Counter
from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

from msgspec import Struct

from vipd.proxy.decode import Decoded, decode, flaws, head_of
from vipd.proxy.errors import ManifestError
from vipd.proxy.names import NamespacedName
from vipd.proxy.sources.documents import Document, DocumentError, Item, documents, items
from vipd.proxy.sources.kinds import mistake


class Key(NamedTuple):
    """What tells objects apart: kind as in the API (Endpoints has its own) and name."""

    kind: str
    name: NamespacedName

    def __str__(self) -> str:
        return f"{self.kind} {self.name if self.name.namespace else self.name.name}"


class Entry(NamedTuple):
    """What was once found in a piece of text; `value` is None for what is not read."""

    key: Key
    value: Decoded | None
    passed_over: str = ""


Entries = tuple[tuple[bytes, Entry], ...]


class Content(Struct, frozen=True):
    """A file's content. `documents` and `entries` are found again by a digest of their text."""

    documents: Mapping[bytes, Entries] = {}
    entries: Mapping[bytes, Entry] = {}
    objects: Mapping[Key, Decoded] = {}
    problems: Mapping[str, ManifestError] = {}
    """Keyed as events.Problem is."""
    passed_over: Mapping[str, int] = {}
    """How many objects of each kind are not vipd's, such as ``apps/v1 Deployment``."""
    incomplete: bool = False
    """A document could not be read: objects that are missing may be in it."""


NOTHING = Content()


def content(name: str, text: bytes, before: Content = NOTHING) -> Content:
    """Return what the file `name` now holds.

    A broken object keeps the form it had before; a broken document keeps every object that is
    missing now, since nobody knows which it held.
    """
    reading = _Reading(name, before)
    found = documents(text, only_json=name.endswith(".json"))
    for document in found:
        reading.document(document, f"document {document.number}" if len(found) > 1 else "")
    if reading.incomplete:
        for key, value in before.objects.items():
            reading.objects.setdefault(key, value)
    return Content(
        reading.documents,
        reading.entries,
        reading.objects,
        reading.problems,
        reading.passed_over,
        reading.incomplete,
    )


def _digest(raw: Item | Document) -> bytes:
    if isinstance(raw, Document):
        return blake2b(raw.text, digest_size=16).digest()
    typed = f"{raw.api_version} {raw.kind}".encode()[:64]
    return blake2b(raw.raw, digest_size=16, key=typed).digest()


class _Reading:
    """One pass over a file."""

    def __init__(self, name: str, before: Content) -> None:
        self.name = name
        self.before = before
        self.documents: dict[bytes, Entries] = {}
        self.entries: dict[bytes, Entry] = {}
        self.objects: dict[Key, Decoded] = {}
        self.problems: dict[str, ManifestError] = {}
        self.passed_over: Counter[str] = Counter()
        self.incomplete = False
        self._places: dict[Key, str] = {}

    def document(self, document: Document, where: str) -> None:
        """Take in one document; one that has not changed is not parsed."""
        digest = _digest(document)
        if (known := self.before.documents.get(digest)) is not None:
            self.documents[digest] = known
            for of_entry, entry in known:
                self._take(of_entry, entry, where)
            return
        try:
            found = items(document)
        except DocumentError as error:
            self.incomplete = True
            self.problems.setdefault(
                self.name, ManifestError(self._origin(where), "", "", str(error))
            )
            return
        good: list[tuple[bytes, Entry]] = []
        for item in found:
            place = " ".join(part for part in (where, item.where) if part)
            of_entry = _digest(item)
            found_entry = self.before.entries.get(of_entry) or self._decoded(item, place)
            if found_entry is not None:
                good.append((of_entry, found_entry))
                self._take(of_entry, found_entry, place)
        if len(good) == len(found):
            self.documents[digest] = tuple(good)

    def _origin(self, where: str) -> str:
        return f"{self.name} {where}" if where else self.name

    def _decoded(self, item: Item, place: str) -> Entry | None:
        origin = self._origin(place)
        try:
            head = head_of(item.raw, origin, item.api_version, item.kind)
        except ManifestError as error:
            self.incomplete = True
            self.problems[origin] = error
            return None
        key = Key(head.kind, head.name)
        try:
            if head.kind == "List":
                why = "a list within a list is not read"
                raise ManifestError(origin, str(head), "", why)  # noqa: TRY301
            if (wrong := mistake(head)) is not None:
                raise ManifestError(origin, str(head), *wrong)  # noqa: TRY301
            value = decode(item.raw, origin, head)
        except ManifestError as error:
            if not head.name.name:
                self.incomplete = True
                self.problems[origin] = error
                return None
            self.problems[f"{self.name} {key}"] = error
            if (last := self.before.objects.get(key)) is not None:
                self.objects.setdefault(key, last)
            return None
        return Entry(key, value, "" if head.read else f"{head.api_version} {head.kind}")

    def _take(self, digest: bytes, entry: Entry, place: str) -> None:
        self.entries[digest] = entry
        if entry.passed_over:
            self.passed_over[entry.passed_over] += 1
        if entry.value is None:
            return
        if (first := self._places.get(entry.key)) is not None:
            why = f"stands there twice; the one in {self._origin(first)} is used"
            error = ManifestError(self._origin(place), str(entry.key), "", why)
            self.problems[f"{self.name} {entry.key}"] = error
            return
        self._places[entry.key] = place
        flawed = flaws(entry.value, self._origin(place), str(entry.key))
        if flawed is not None:
            self.problems[f"{self.name} {entry.key}"] = flawed
        self.objects[entry.key] = entry.value
