"""What the API server writes, as far as a list and a watch go: pages, lines, statuses.

Lives here: their shapes and how they are read. Must not: look into the objects (known.py does).
Source: apimachinery/pkg/apis/meta/v1/types.go and watch.go, v1.37; KEP-3157 for the end of a
watch's initial events.
"""

from typing import TypeVar

import msgspec
from msgspec import Raw, Struct

INITIAL_EVENTS_END = "k8s.io/initial-events-end"
"""Annotation of the bookmark after which a watch has told everything there was."""

T = TypeVar("T")


class WireError(Exception):
    """What came is not what the API writes. The text says what is wrong with it."""


class PageMetadata(Struct, rename="camel", gc=False):
    """``metadata`` of a list."""

    resource_version: str = ""
    continue_: str | None = msgspec.field(default=None, name="continue")


class Page(Struct, gc=False):
    """A list, or a part of one. `items` null is how Go may write an empty one."""

    metadata: PageMetadata = msgspec.field(default_factory=PageMetadata)
    kind: str | None = None
    items: list[Raw] | None = None


class Line(Struct, gc=False):
    """One line of a watch. `type` is ADDED, MODIFIED, DELETED, BOOKMARK or ERROR."""

    type: str
    object: Raw


class HeadMetadata(Struct, rename="camel", gc=False):
    """``metadata`` of an object, as far as following it needs."""

    name: str | None = None
    namespace: str | None = None
    resource_version: str | None = None
    uid: str | None = None
    annotations: dict[str, str] | None = None


class Head(Struct, gc=False):
    """An object, without what it says. In a list `kind` is left out."""

    metadata: HeadMetadata
    kind: str | None = None


class StatusDetails(Struct, rename="camel", gc=False):
    """``details`` of a Status."""

    retry_after_seconds: int | None = None


class Status(Struct, gc=False):
    """Why a request failed, or why a watch ends."""

    code: int | None = None
    reason: str | None = None
    message: str | None = None
    details: StatusDetails | None = None

    def __str__(self) -> str:
        text = f"{self.code or ''} {self.message or self.reason or ''}"[:300]
        return "".join(one if one.isprintable() else " " for one in text).strip()


_PAGE = msgspec.json.Decoder(Page)
_LINE = msgspec.json.Decoder(Line)
_HEAD = msgspec.json.Decoder(Head)
_STATUS = msgspec.json.Decoder(Status)


def page(text: bytes, kind: str) -> Page:
    """Read a list of a kind of object. Raise WireError, also where it is of another kind: an empty
    one would say that everything is gone."""
    told = _read(_PAGE, text, "a list")
    if told.kind != f"{kind}List":
        raise WireError(f"is not a {kind}List but {(told.kind or 'nothing')[:64]!r}")
    return told


def line(text: bytes) -> Line:
    """Read a line of a watch. Raise WireError."""
    return _read(_LINE, text, "an event")


def head(raw: Raw) -> Head:
    """Read an object's head. Raise WireError."""
    return _read(_HEAD, raw, "an object")


def version(raw: Raw) -> str:
    """Return an object's version, empty where it has none that can be read."""
    try:
        return head(raw).metadata.resource_version or ""
    except WireError:
        return ""


def ends_initial_events(metadata: HeadMetadata) -> bool:
    """Whether a bookmark says that a watch has now told everything there was."""
    return (metadata.annotations or {}).get(INITIAL_EVENTS_END) == "true"


def status(text: bytes | Raw) -> Status:
    """Read a Status; anything else is one that says nothing."""
    try:
        return _read(_STATUS, text, "a Status")
    except WireError:
        return Status()


def _read(decoder: msgspec.json.Decoder[T], text: bytes | Raw, what: str) -> T:
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"is not {what}: {error}") from error
