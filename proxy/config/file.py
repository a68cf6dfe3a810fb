"""The configuration file: its documents, and what each says.

Lives here: reading, which kinds there are, duplicate and unknown fields. Must not: know a field.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from vipd.proxy.config import kube_proxy_configuration as kube_proxy
from vipd.proxy.config import vipd_configuration as vipd
from vipd.proxy.config.fields import Said, paths, read
from vipd.proxy.config.notes import Note
from vipd.proxy.errors import ConfigError
from vipd.proxy.sources.documents import Document, DocumentError, Item, documents, items

MOST_BYTES = 16 << 20
_API_VERSIONS = {vipd.KIND: vipd.API_VERSION, kube_proxy.KIND: kube_proxy.API_VERSION}
_HEAD = ("apiVersion", "kind")


class File(Struct):
    """What a file says, document by document; `wrong` and `notes` of both."""

    vipd: Mapping[str, Said] | None = None
    """Of VipdConfiguration, by path; None where there is no such document."""
    kube_proxy: Mapping[str, object] | None = None
    """Of KubeProxyConfiguration: its values by path."""
    wrong: list[ConfigError] = []
    notes: list[Note] = []


def read_file(path: str) -> File:
    """Return what the file says. What is wrong with a field is told, not raised.

    Raise ConfigError where it cannot be read at all.
    """
    found = File()
    for raw, doubles in _objects(path):
        kind = raw.get("kind")
        if not isinstance(kind, str) or kind not in _API_VERSIONS:
            why = f"kind is {kind!r}, not {vipd.KIND} or {kube_proxy.KIND}"
            raise ConfigError(path, why)
        if raw.get("apiVersion") != _API_VERSIONS[kind]:
            raise ConfigError(f"{path}: apiVersion", f"must be {_API_VERSIONS[kind]} for {kind}")
        if (found.vipd if kind == vipd.KIND else found.kube_proxy) is not None:
            raise ConfigError(path, f"holds more than one document of kind {kind}")
        if kind == vipd.KIND:
            _read_vipd(path, raw, doubles, found)
        else:
            _read_kube_proxy(path, raw, doubles, found)
    if found.vipd is None and found.kube_proxy is None:
        raise ConfigError(path, f"holds no document of kind {vipd.KIND} or {kube_proxy.KIND}")
    return found


def _read_vipd(path: str, raw: Mapping[str, object], doubles: list[str], found: File) -> None:
    said = read(raw, vipd.VipdConfiguration)
    found.wrong += [ConfigError(f"{path}: {one}", "is there twice") for one in doubles]
    found.wrong += [ConfigError(f"{path}: {one}", _no_field(one)) for one in said.unknown]
    found.wrong += [ConfigError(f"{path}: {field}", why) for field, why in said.wrong]
    found.vipd = {
        field: Said(value, f"{path}: {field}")
        for field, value in said.values.items()
        if field not in _HEAD
    }


def _no_field(name: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, list(paths(vipd.VipdConfiguration)), 1)
    return "there is no such field" + (f"; did you mean {close[0]}?" if close else "")


def _read_kube_proxy(path: str, raw: Mapping[str, object], doubles: list[str], found: File) -> None:
    said = read(raw, kube_proxy.KubeProxyConfiguration)
    found.wrong += [ConfigError(f"{path}: {field}", why) for field, why in said.wrong]
    found.notes += [
        Note(f"{path}: {one}", "is there twice; the last one counts") for one in doubles
    ]
    found.notes += [
        Note(f"{path}: {one}", f"no field of {kube_proxy.KIND}; it is passed over")
        for one in said.unknown
    ]
    found.kube_proxy = said.values


def _objects(path: str) -> Iterator[tuple[dict[str, object], list[str]]]:
    """Yield the objects of a file, each with the fields that it has twice."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError("--config", f"{path}: {os.strerror(error.errno or 0)}") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(path, f"is longer than {MOST_BYTES >> 20} MiB")
    try:
        for document in documents(content):
            doubles: list[str] = []
            for item in _items(document, doubles):
                yield _object(bytes(item.raw)), doubles
    except (DocumentError, msgspec.DecodeError) as error:
        raise ConfigError(path, str(error)) from error


def _items(document: Document, doubles: list[str]) -> list[Item]:
    """Return the objects of a document with the last of each field, and note what is there twice.

    kube-proxy takes such a file with a warning; the YAML library stops there.
    """
    if document.json:
        _note_json_doubles(document.text, doubles)
        return items(document)
    try:
        return items(document)
    except DocumentError as error:
        if "duplicate entry" not in str(error):
            raise
        return items(_without_doubles(document, doubles))


def _object(raw: bytes) -> dict[str, object]:
    decoded = msgspec.json.decode(raw)
    if not isinstance(decoded, dict):
        raise DocumentError("is not an object")
    return decoded


def _without_doubles(document: Document, doubles: list[str]) -> Document:
    import yaml  # only here: it is slow, and reads YAML 1.1

    try:
        node = yaml.compose(document.text.decode(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DocumentError(f"not YAML: {error}") from error
    _drop_doubles(node, doubles)
    return msgspec.structs.replace(document, text=yaml.serialize(node).encode())


def _drop_doubles(root: Any, doubles: list[str]) -> None:
    """Take every field but the last of its name out of a tree of YAML nodes.

    Each node is seen once, however many aliases lead to it.
    """
    seen: set[int] = set()
    waiting = [(root, "")]
    while waiting:
        node, path = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.id == "sequence":
            waiting += [(one, path) for one in node.value]
        elif node.id == "mapping":
            last: dict[tuple[str, str], tuple[Any, Any]] = {}
            for key, value in node.value:
                name = (key.tag, str(key.value))
                if name in last:
                    doubles.append(f"{path}{key.value}")
                last[name] = (key, value)
            node.value = list(last.values())
            waiting += [(value, f"{path}{key.value}.") for key, value in reversed(node.value)]


def _note_json_doubles(text: bytes, doubles: list[str]) -> None:
    def pairs(found: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(found)
        if len(made) < len(found):
            names = [name for name, _ in found]
            doubles.extend(sorted({name for name in names if names.count(name) > 1}))
        return made

    try:
        json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        return  # whoever reads it next says why
