"""Which namespaces there are: those that are told, and those that have a service.

Lives here: the count. Pure. Must not: know what stands in them.
"""

from vipd.dns.names import is_label, label_wire


class Namespaces:
    """Names of namespaces, as labels behind their length.

    `exposed` are those that count; None: all.
    """

    def __init__(self, exposed: frozenset[str] | None) -> None:
        self._exposed = exposed
        self._services: dict[bytes, int] = {}
        """Services of each namespace that has any."""
        self._told: frozenset[bytes] = frozenset()

    def __contains__(self, label: bytes) -> bool:
        return label in self._services or label in self._told

    def exposes(self, name: str) -> bool:
        """Return whether what stands in a namespace has names."""
        return self._exposed is None or name in self._exposed

    def enter(self, name: str) -> None:
        """Count a service."""
        label = label_wire(name)
        self._services[label] = self._services.get(label, 0) + 1

    def leave(self, name: str) -> None:
        """Count a service no more."""
        label = label_wire(name)
        self._services[label] -= 1
        if not self._services[label]:
            del self._services[label]

    def tell(self, names: frozenset[str] | None) -> bool:
        """Take the names of all namespaces; None: those that have a service are all.

        Return whether the names are others.
        """
        known = frozenset() if names is None else names
        found = frozenset([label_wire(one) for one in known if self.exposes(one) and is_label(one)])
        changed = found != self._told
        self._told = found
        return changed
