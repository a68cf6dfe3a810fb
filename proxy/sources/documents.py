"""YAML and JSON text becomes pieces of JSON, one for each Kubernetes object.

Lives here: the grammar of a manifest file (documents, lists, JSON after JSON), and the only use of
the YAML library. Must not: read files, know kinds other than lists, decode an object.
Source: YAML 1.2.2 section 9.1 (document markers); lists as `kubectl get -o yaml` prints them.
"""

import json
import re
from collections.abc import Iterator

import msgspec
from msgspec import Raw, Struct
from ryaml import loads  # type: ignore[attr-defined] # its stub forgets to say so

MAX_DEPTH = 1000
"""Brackets open at once. The parser stops at 128 levels, but its scanner takes quadratic time to
get there: 100,000 times ``{a: `` is 24 s (ryaml 0.5.1)."""
_MARKER = re.compile(rb"^(?:---|\.\.\.)(?=[\s]|\Z)", re.MULTILINE)
_BRACKET = re.compile(rb"[\[\]{}]")
_ONLY_COMMENTS = re.compile(rb"(?:[ \t]*(?:#[^\n]*)?\r?(?:\n|\Z)|%[^\n]*(?:\n|\Z))*\Z")
_LINE = re.compile(r"\bline (\d+)")
_POSITION = re.compile(r"\bat position (\d+)")
_SPACE = " \t\r\n"


class DocumentError(Exception):
    """A document is no YAML or JSON, or not an object; the message is the rest of the sentence."""


class Document(Struct, frozen=True):
    """One document of a file. `line` is that of its first byte, counted from 0."""

    number: int
    line: int
    text: bytes
    json: bool


class Item(Struct, frozen=True):
    """An object as JSON. `where` is its place in a list, such as ``items[3]``, or empty.

    `api_version` and `kind` are what a typed list says about items that do not say it themselves.
    """

    where: str
    raw: bytes | Raw
    api_version: str = ""
    kind: str = ""


class _List(Struct, rename="camel"):
    api_version: object = ""
    kind: object = ""
    items: list[Raw] | msgspec.UnsetType | None = msgspec.UNSET


_LIST = msgspec.json.Decoder(_List)
_ANY = msgspec.json.Decoder(Raw)


def documents(content: bytes, *, only_json: bool = False) -> list[Document]:
    """Return the documents of a file, without looking into them; comments alone are none."""
    content = content.removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        return []
    if only_json or content.lstrip()[:1] in (b"{", b"["):
        try:
            _ANY.decode(content)
        except (msgspec.DecodeError, RecursionError):
            found = _json_after_json(content)
            if found or only_json:
                return found or [Document(1, 0, content, True)]
        else:
            return [Document(1, 0, content, True)]
    return list(_yaml_documents(content))


def _json_after_json(content: bytes) -> list[Document]:
    """Return JSON values that follow one another, empty if something else stands between them."""
    found: list[Document] = []
    decoder = json.JSONDecoder()
    try:
        text = content.decode()
        start = 0
        while start < len(text):
            if text[start] in _SPACE:
                start += 1
                continue
            _, end = decoder.raw_decode(text, start)
            line = text.count("\n", 0, start)
            found.append(Document(len(found) + 1, line, text[start:end].encode(), True))
            start = end
    except (ValueError, RecursionError):
        return []
    return found


def _yaml_documents(content: bytes) -> Iterator[Document]:
    """Cut at the markers, which may stand at the start of a line only as markers."""
    ends = [(m.start(), m.end()) for m in _MARKER.finditer(content)]
    start = line = counted = number = 0
    for stop, following in [*ends, (len(content), len(content))]:
        text = content[start:stop]
        line += content.count(b"\n", counted, start)
        counted = start
        if not _ONLY_COMMENTS.match(text):
            number += 1
            yield Document(number, line, text, False)
        start = following


def items(document: Document) -> list[Item]:
    """Return the objects of a document, those of a list one by one; raise DocumentError."""
    return _json_items(document.text) if document.json else _yaml_items(document)


def _json_items(text: bytes) -> list[Item]:
    try:
        found = _LIST.decode(text)
    except msgspec.ValidationError:
        if text.lstrip()[:1] == b"{":
            if _could_be_list(text):
                raise DocumentError("items is not an array") from None
            return [Item("", text)]
        raise DocumentError("is not an object") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DocumentError(str(error)) from error
    kind, version = _text(found.kind), _text(found.api_version)
    if not _is_list(kind, found.items is not msgspec.UNSET):
        return [Item("", text)]
    return _listed(kind, version, found.items or [])


def _could_be_list(text: bytes) -> bool:
    try:
        found = msgspec.json.decode(text, type=dict[str, Raw])
        kind = msgspec.json.decode(found.get("kind", b'""'), type=str)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return _is_list(kind, "items" in found)


def _is_list(kind: str, has_items: bool) -> bool:
    return kind == "List" or (has_items and kind.endswith("List"))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _listed(kind: str, version: str, raws: list[Raw] | list[bytes]) -> list[Item]:
    """Return items; those of a ServiceList are Services unless they say otherwise."""
    kind = kind.removesuffix("List")
    if not kind:
        version = ""
    return [Item(f"items[{i}]", raw, version, kind) for i, raw in enumerate(raws)]


def _yaml_items(document: Document) -> list[Item]:
    value = _yaml(document)
    if value is None:
        return []
    if not isinstance(value, dict):
        raise DocumentError("is not an object")
    kind, version, listed = (
        _text(value.get("kind")),
        _text(value.get("apiVersion")),
        value.get("items"),
    )
    if not _is_list(kind, "items" in value):
        return [Item("", _encoded(value))]
    if listed is not None and not isinstance(listed, list):
        raise DocumentError("items is not an array")
    return _listed(kind, version, [_encoded(each) for each in listed or []])


def _yaml(document: Document) -> object:
    """Return what the YAML library makes of a document; raise DocumentError whatever it is."""
    depth = 0
    for bracket in _BRACKET.finditer(document.text):
        depth += 1 if bracket[0] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise DocumentError("is nested too deeply")
    try:
        value: object = loads(document.text.decode())
    except UnicodeDecodeError as error:
        raise DocumentError("is not UTF-8") from error
    except ValueError as error:  # InvalidYamlError is one; an unhashable key is a bare one
        raise DocumentError(f"not YAML: {_placed(str(error), document)}") from error
    return _merged(value) if b"<<" in document.text else value


def _placed(why: str, document: Document) -> str:
    """Return what is wrong with the line of the file where it is, as far as that is told."""
    if _LINE.search(why):
        return _LINE.sub(lambda m: f"line {int(m[1]) + document.line}", why)
    if (found := _POSITION.search(why)) is not None:
        before = document.text.decode()[: int(found[1])].count("\n")
        return f"{why[: found.start()]}at line {document.line + 1 + before}"
    return f"{why}, in the document that begins at line {document.line + 1}"


def _merged(value: object) -> object:
    """Return the value with ``<<`` keys taken apart; what a mapping says itself wins (YAML 1.1)."""
    if isinstance(value, list):
        return [_merged(each) for each in value]
    if not isinstance(value, dict):
        return value
    found: dict[object, object] = {}
    sources = value.get("<<", ())
    for source in sources if isinstance(sources, list) else [sources]:
        for key, each in (_merged(source) if isinstance(source, dict) else {}).items():  # type: ignore[attr-defined]
            found.setdefault(key, each)
    found.update({key: _merged(each) for key, each in value.items() if key != "<<"})
    return found


def _encoded(value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise DocumentError(f"cannot be an object: {error}") from error
