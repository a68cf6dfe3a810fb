"""Which Services select which Pods, without looking at all of them.

Lives here: the indexes by label. Must not: know what follows from a selection.
A service stands under one pair of its selector, the one that the fewest services in the namespace
stand under; a pod under all of its labels.
Source: labels.Set.AsSelectorPreValidated (equality only); an empty selector selects nothing.
"""

from vipd.proxy.model import Pod, Service, ServiceType
from vipd.proxy.names import NamespacedName

_Place = tuple[str, str, str]
"""Namespace, label and value."""


class Selection:
    """The selectors of all services and the labels of all pods."""

    def __init__(self) -> None:
        self._selectors: dict[NamespacedName, frozenset[tuple[str, str]]] = {}
        self._place: dict[NamespacedName, _Place] = {}
        self._services: dict[_Place, set[NamespacedName]] = {}
        self._pods: dict[_Place, dict[NamespacedName, frozenset[tuple[str, str]]]] = {}

    def service(self, name: NamespacedName, new: Service | None) -> None:
        """Remember a service, or forget it (None)."""
        self._selectors.pop(name, None)
        if (place := self._place.pop(name, None)) is not None:
            self._services[place].discard(name)
            if not self._services[place]:
                del self._services[place]
        if new is None or not new.selector or new.type is ServiceType.EXTERNAL_NAME:
            return
        places = [(name.namespace, *pair) for pair in new.selector]
        place = min(places, key=lambda each: len(self._services.get(each, ())))
        self._selectors[name] = frozenset(new.selector)
        self._place[name] = place
        self._services.setdefault(place, set()).add(name)

    def pod(self, name: NamespacedName, old: Pod | None, new: Pod | None) -> None:
        """Remember a pod instead of its form before."""
        for pair in old.labels if old is not None else ():
            place = (name.namespace, *pair)
            del self._pods[place][name]
            if not self._pods[place]:
                del self._pods[place]
        if new is not None:
            labels = frozenset(new.labels)
            for pair in new.labels:
                self._pods.setdefault((name.namespace, *pair), {})[name] = labels

    def services_of(self, pod: Pod) -> list[NamespacedName]:
        """Return the services that select the pod, by name."""
        labels = frozenset(pod.labels)
        return sorted(
            service
            for pair in pod.labels
            for service in self._services.get((pod.name.namespace, *pair), ())
            if self._selectors[service] <= labels
        )

    def pods_of(self, service: Service) -> list[NamespacedName]:
        """Return the pods that the service selects, by name."""
        selector = self._selectors.get(service.name)
        if selector is None:
            return []
        candidates = min(
            (self._pods.get((service.name.namespace, *pair), {}) for pair in service.selector),
            key=len,
        )
        return sorted(name for name, labels in candidates.items() if selector <= labels)
