"""What an API server keeps: objects, their versions, and what happened to them.

Lives here: versions, selectors, the history that watches begin in. Must not: speak HTTP
(api_server.py). It behaves as kube-apiserver with etcd does, for the kinds that vipd reads.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

Json = dict[str, Any]


class Kept(NamedTuple):
    """An object as it is kept: parsed for selectors, and as the bytes that are sent."""

    version: int
    labels: Mapping[str, str]
    fields: Mapping[str, str]
    text: bytes


class Change(NamedTuple):
    """Something that happened. `before` is None of a new object, `after` of one that is gone."""

    version: int
    before: Kept | None
    after: Kept | None


class Gone(Exception):
    """What happened since a version is not known any more."""


class Conflict(Exception):
    """The object is there already."""


Selector = Callable[[Kept], bool]


def selector(labels: str, fields: str) -> Selector:
    """Return whether an object is meant by the two selectors of a request.

    Of the language of labels: ``!key``, ``key``, ``key=value``; of fields ``=`` and ``!=``.
    """
    tests = [_label_test(term) for term in labels.split(",") if term]
    tests += [_field_test(term) for term in fields.split(",") if term]
    return lambda kept: all(test(kept) for test in tests)


def _field_test(term: str) -> Selector:
    name, differs, value = term.partition("!=")
    if differs:
        return lambda kept: kept.fields.get(name, "") != value
    name, _, value = term.partition("=")
    return lambda kept: kept.fields.get(name, "") == value


def _label_test(term: str) -> Selector:
    if term.startswith("!"):
        return lambda kept: term[1:] not in kept.labels
    name, equals, value = term.partition("=")
    if equals:
        return lambda kept: kept.labels.get(name) == value.lstrip("=")
    return lambda kept: name in kept.labels


def _merged(thing: Any, change: Any) -> Any:
    if not isinstance(change, dict):
        return change
    found = dict(thing) if isinstance(thing, dict) else {}
    for name, value in change.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = _merged(found.get(name), value)
    return found


class Collection:
    """All objects of one kind."""

    def __init__(self, store: "Store", api_version: str, kind: str, namespaced: bool) -> None:
        self.api_version, self.kind, self.namespaced = api_version, kind, namespaced
        self.objects: dict[tuple[str, str], Kept] = {}
        self.watchers: set[Callable[[Change], None]] = set()
        self._store = store
        self._history: deque[Change] = deque()
        self._forgotten = 0

    def put(self, thing: Json, *, new: bool = False) -> int:
        """Create or replace an object, and return its version. Raise Conflict where it is not new.

        KeyError where it has no name.
        """
        metadata = thing.setdefault("metadata", {})
        key = (metadata.get("namespace", "") if self.namespaced else "", metadata["name"])
        if new and key in self.objects:
            raise Conflict
        version = self._store.next()
        metadata["resourceVersion"] = str(version)
        metadata.setdefault("uid", "-".join(filter(None, (self.kind, *key))))
        whole = {"kind": self.kind, "apiVersion": self.api_version, **thing}
        fields = {"metadata.name": key[1], "metadata.namespace": key[0]}
        fields["spec.clusterIP"] = str(thing.get("spec", {}).get("clusterIP", ""))
        text = json.dumps(whole, separators=(",", ":")).encode()
        return self.put_text(key, text, metadata.get("labels") or {}, fields, version)

    def put_text(
        self,
        key: tuple[str, str],
        text: bytes,
        labels: Mapping[str, str],
        fields: Mapping[str, str],
        version: int,
    ) -> int:
        """Put in an object whose bytes are known, broken ones too; return its version."""
        kept = Kept(version, labels, fields, text)
        before = self.objects.get(key)
        self.objects[key] = kept
        self._happened(Change(version, before, kept))
        return version

    def patch(self, namespace: str, name: str, change: Json) -> Json:
        """Change an object by a merge patch (RFC 7386), and return it. Raise KeyError."""
        thing: Json = _merged(json.loads(self.objects[namespace, name].text), change)
        self.put(thing)
        return thing

    def delete(self, namespace: str, name: str) -> bool:
        """Delete an object; return whether it was there."""
        before = self.objects.pop((namespace if self.namespaced else "", name), None)
        if before is None:
            return False
        self._happened(Change(self._store.next(), before, None))
        return True

    def sorted(self) -> Iterator[tuple[tuple[str, str], Kept]]:
        """Return all objects in the order of their names."""
        return iter(sorted(self.objects.items()))

    def since(self, version: int) -> Iterable[Change]:
        """Return what happened after a version. Raise Gone where that is not known any more."""
        if version < self._forgotten:
            raise Gone
        return [change for change in self._history if change.version > version]

    def forget(self) -> None:
        """Forget what happened, as etcd does when it is compacted."""
        self._history.clear()
        self._forgotten = self._store.version

    def _happened(self, change: Change) -> None:
        self._history.append(change)
        if len(self._history) > self._store.longest_history:
            self._forgotten = self._history.popleft().version
        for watcher in tuple(self.watchers):
            watcher(change)


class Store:
    """The collections by their path without a namespace, such as ``/api/v1/services``."""

    def __init__(self, longest_history: int = 100_000) -> None:
        self.version = 1000
        self.longest_history = longest_history
        self.collections: dict[str, Collection] = {}
        for path, kind, namespaced in (
            ("/api/v1/services", "Service", True),
            ("/api/v1/pods", "Pod", True),
            ("/api/v1/nodes", "Node", False),
            ("/api/v1/namespaces", "Namespace", False),
            ("/apis/discovery.k8s.io/v1/endpointslices", "EndpointSlice", True),
            ("/apis/networking.k8s.io/v1/servicecidrs", "ServiceCIDR", False),
            ("/apis/events.k8s.io/v1/events", "Event", True),
            ("/api/v1/events", "Event", True),
        ):
            api_version = path.removeprefix("/apis/").removeprefix("/api/").rpartition("/")[0]
            self.collections[path] = Collection(self, api_version, kind, namespaced)

    def next(self) -> int:
        """Return a new version."""
        self.version += 1
        return self.version

    def of(self, kind: str) -> Collection:
        """Return the collection of a kind. Raise KeyError."""
        return next(one for one in self.collections.values() if one.kind == kind)

    def put(self, thing: Json) -> int:
        """Create or replace an object of whatever kind it says; return its version."""
        return self.of(thing["kind"]).put(thing)
