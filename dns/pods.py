"""Names of Pods: an address with dashes under <namespace>.pod.<domain>.

Lives here: the three ways of answering them (specification 1.0.1, 2.6; version 1.1.0 has none).
Pure. Must not: know which namespaces there are.
"""

from typing import Literal

from vipd.dns.facts import PodFacts
from vipd.dns.names import address_in
from vipd.dns.records import EMPTY, Node, RRset, of_type
from vipd.proxy.names import NamespacedName

PodMode = Literal["disabled", "insecure", "verified"]


class PodNames:
    """The Pods of the cluster, as far as the mode needs them."""

    def __init__(self, mode: PodMode) -> None:
        self.mode = mode
        self._pods: dict[NamespacedName, PodFacts] = {}
        self._users: dict[tuple[bytes, bytes], int] = {}
        """How many Pods of a namespace have an address."""

    def put(self, facts: PodFacts) -> bool:
        """Take a Pod; return whether any name changes."""
        if self.mode != "verified" or self._pods.get(facts.key) == facts:
            return False
        self.drop(facts.key)
        self._pods[facts.key] = facts
        for key in _keys(facts):
            self._users[key] = self._users.get(key, 0) + 1
        return True

    def drop(self, name: NamespacedName) -> bool:
        """Forget a Pod; return whether there was one."""
        old = self._pods.pop(name, None)
        if old is None:
            return False
        for key in _keys(old):
            if self._users[key] == 1:
                del self._users[key]
            else:
                self._users[key] -= 1
        return True

    def find(self, namespace: bytes, label: bytes, kind: int, ttl: int) -> Node | None:
        """Return what stands at a Pod's name in a namespace that exists, None if there is none.

        Not to be asked where the mode is "disabled".
        """
        packed = address_in(label)
        if packed is None:
            return None
        if self.mode == "verified" and (namespace, packed) not in self._users:
            return None
        data = of_type((packed,), kind)
        return Node(RRset(kind, ttl, data)) if data else EMPTY


def _keys(facts: PodFacts) -> set[tuple[bytes, bytes]]:
    namespace = facts.namespace.encode()
    return {(namespace, packed) for packed in facts.addresses}
