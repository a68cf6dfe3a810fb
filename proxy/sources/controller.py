"""Slices for the Services of manifests, made from Pods as the cluster's controller would.

Lives here: which slices a service has (its own, else those of its Endpoints, else those made from
the Pods it selects) and what a change of any object does to them. Must not: read anything, or know
which endpoints traffic goes to (resolve.py).
Source: pkg/controller/endpointslice and staging/src/k8s.io/endpointslice (reconciler), v1.37.
"""

from collections.abc import Iterable, Iterator

from vipd.proxy.decode_endpoints import Endpoints
from vipd.proxy.events import Applied, Deleted, Event, Kind
from vipd.proxy.model import EndpointSlice, Node, Pod, Service
from vipd.proxy.names import NamespacedName
from vipd.proxy.sources.claims import Change
from vipd.proxy.sources.pod_slices import pod_slices
from vipd.proxy.sources.selection import Selection

_SERVICE, _SLICE, _ENDPOINTS = "Service", "EndpointSlice", "Endpoints"
_POD, _NODE = "Pod", "Node"


class Controller:
    """Turns changes of objects into events, with slices made up for services that have none.

    A change costs the services it concerns: a Pod those that select it before or after, a Node
    those of its Pods if its zone changed, everything else one service.
    """

    def __init__(self) -> None:
        self._services: dict[NamespacedName, Service] = {}
        self._endpoints: dict[NamespacedName, Endpoints] = {}
        self._real: dict[NamespacedName, EndpointSlice] = {}
        self._real_of: dict[NamespacedName, set[NamespacedName]] = {}
        self._made: dict[NamespacedName, dict[NamespacedName, EndpointSlice]] = {}
        self._pods: dict[NamespacedName, Pod] = {}
        self._pods_on: dict[str, set[NamespacedName]] = {}
        self._zones: dict[str, str] = {}
        self._selection = Selection()
        self._dirty: dict[NamespacedName, None] = {}

    def apply(self, changes: Iterable[Change]) -> list[Event]:
        """Return the events of these changes and of what follows from them for slices."""
        events: list[Event] = []
        for change in changes:
            events += self._direct(change)
        for service in self._dirty:
            events += self._slices(service)
        self._dirty.clear()
        return events

    def _direct(self, change: Change) -> Iterator[Event]:
        key, value = change.key, change.value
        if key.kind == _SERVICE:
            self._service(key.name, value if isinstance(value, Service) else None)
        elif key.kind == _SLICE:
            self._slice(key.name, value if isinstance(value, EndpointSlice) else None)
        elif key.kind == _POD:
            self._pod(key.name, value if isinstance(value, Pod) else None)
        elif key.kind == _NODE:
            self._node(key.name.name, value if isinstance(value, Node) else None)
        if key.kind == _ENDPOINTS:
            if isinstance(value, Endpoints):
                self._endpoints[key.name] = value
            else:
                self._endpoints.pop(key.name, None)
            self._dirty[key.name] = None
        elif value is None:
            yield Deleted(Kind(key.kind), key.name)
        elif not isinstance(value, Endpoints):
            yield Applied(value)

    def _service(self, name: NamespacedName, service: Service | None) -> None:
        if service is None:
            self._services.pop(name, None)
        else:
            self._services[name] = service
        self._selection.service(name, service)
        self._dirty[name] = None

    def _slice(self, name: NamespacedName, new: EndpointSlice | None) -> None:
        old = self._real.pop(name, None)
        if old is not None:
            self._real_of[old.service].discard(name)
            if not self._real_of[old.service]:
                del self._real_of[old.service]
            self._dirty[old.service] = None
        if new is not None:
            self._real[name] = new
            self._real_of.setdefault(new.service, set()).add(name)
            self._dirty[new.service] = None

    def _pod(self, name: NamespacedName, new: Pod | None) -> None:
        old = self._pods.pop(name, None)
        if old is not None:
            self._dirty.update(dict.fromkeys(self._selection.services_of(old)))
            if old.node:
                self._pods_on[old.node].discard(name)
        if new is not None:
            self._pods[name] = new
            self._dirty.update(dict.fromkeys(self._selection.services_of(new)))
            if new.node:
                self._pods_on.setdefault(new.node, set()).add(name)
        self._selection.pod(name, old, new)

    def _node(self, name: str, new: Node | None) -> None:
        zone = new.zone if new is not None else None
        if self._zones.pop(name, None) == zone:
            if zone is not None:
                self._zones[name] = zone
            return
        if zone is not None:
            self._zones[name] = zone
        for pod in sorted(self._pods_on.get(name, ())):
            self._dirty.update(dict.fromkeys(self._selection.services_of(self._pods[pod])))

    def _slices(self, name: NamespacedName) -> Iterator[Event]:
        old = self._made.pop(name, {})
        new = {each.name: each for each in self._wanted(name)}
        if new:
            self._made[name] = new
        for gone in sorted(old.keys() - new.keys()):
            yield Deleted(Kind.ENDPOINT_SLICE, gone)
        for key, value in new.items():
            if old.get(key) != value:
                yield Applied(value)

    def _wanted(self, name: NamespacedName) -> tuple[EndpointSlice, ...]:
        """Return the slices that are not in the manifests themselves."""
        if name in self._real_of:
            return ()
        if (endpoints := self._endpoints.get(name)) is not None:
            return endpoints.slices
        service = self._services.get(name)
        if service is None:
            return ()
        pods = [self._pods[each] for each in self._selection.pods_of(service)]
        return pod_slices(service, pods, self._zones)
