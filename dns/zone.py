"""The names of the cluster: fed with facts, asked with lower-case names in wire form.

Lives here: the tree from the cluster domains down to the services, and what a change outdates.
Pure. Must not: know messages (answer.py), or what stands at a service's names (service_names.py).
"""

from msgspec import Struct

from vipd.dns.apex import Apex
from vipd.dns.facts import Kind, PodFacts, ServiceFacts
from vipd.dns.lookup import Ending, Found
from vipd.dns.names import LONGEST_NAME, is_label, label_wire, reverse_name, starts, wire
from vipd.dns.pods import PodMode, PodNames
from vipd.dns.prebuilt import Prebuilt
from vipd.dns.records import EMPTY, Node, RRset, Type
from vipd.dns.reverse import At, Place, ReverseNames
from vipd.dns.service_names import ServiceNames
from vipd.proxy.names import Address, NamespacedName, Network

_SVC, _POD = label_wire("svc"), label_wire("pod")


class ZoneSettings(Struct, frozen=True, kw_only=True):
    """What is answered, whatever the cluster holds."""

    domains: tuple[str, ...] = ("cluster.local",)
    """Cluster domains; all hold the same names. Names in PTR records end in the first."""
    ttl: int = 5
    """Seconds, 0 to 3600."""
    negative_ttl: int = 5
    """Seconds, 0 to 3600: how long clients may remember that there is no such name or record."""
    pods: PodMode = "disabled"
    reverse: tuple[Network, ...] = ()
    """Cluster and pod networks: all addresses in them are answered for, existing or not."""
    name_server_addresses: tuple[Address, ...] = ()
    """Of ns.dns.<domain>."""
    exposed: frozenset[str] | None = None
    """Namespaces whose services have names; None is all."""


_NOT_OURS = Found(Ending.NOT_OURS)


class Zone:
    """All names of the cluster. A change costs the names of the one service that changed."""

    def __init__(self, settings: ZoneSettings | None = None) -> None:
        self.settings = settings = settings or ZoneSettings()
        self.prebuilt = Prebuilt()
        """Replies made of what is here; those that a change outdates are dropped from it."""
        self.synced = False
        """Whether everything that existed at the start was put."""
        domains = sorted(map(wire, settings.domains), key=len, reverse=True)
        if b"\x00" in domains:
            raise ValueError("a cluster domain is the root: every name would be the cluster's")
        own = tuple([each.packed for each in settings.name_server_addresses])
        ttls = settings.ttl, settings.negative_ttl
        self._apexes = [Apex(domain, *ttls, own) for domain in domains]
        self._first = wire(settings.domains[0])
        self._reverse_apex = Apex(self._first, *ttls, own, reverse=True)
        self._services: dict[bytes, ServiceNames] = {}
        self._populated: dict[bytes, int] = {}
        """Services of each namespace."""
        self._namespaces: frozenset[bytes] = frozenset()
        self._reverse = ReverseNames(settings.reverse)
        self._pods = PodNames(settings.pods)
        self._changed = True
        self.serial = 1

    def put(self, facts: ServiceFacts) -> bool:
        """Take a service as it is now. Return whether any record may be another."""
        if self.settings.exposed is not None and facts.namespace not in self.settings.exposed:
            return False
        key = _key(facts.namespace, facts.name)
        service = self._services.get(key)
        if service is None:
            service = self._services[key] = ServiceNames(key, facts)
            namespace = label_wire(facts.namespace)
            self._populated[namespace] = self._populated.get(namespace, 0) + 1
            self._outdate(service, (), service.addresses)
        elif service.has(facts):
            return False
        else:
            before = service.addresses
            same_kind = service.kind is facts.kind
            if not same_kind:
                self._outdate(service, before, ())
            service.take(facts)
            self._outdate(service, before if same_kind else (), service.addresses)
        return True

    def drop(self, name: NamespacedName) -> bool:
        """Forget a service. Return whether there was one."""
        service = self._services.pop(_key(name.namespace, name.name), None)
        if service is None:
            return False
        namespace = label_wire(name.namespace)
        self._populated[namespace] -= 1
        if not self._populated[namespace]:
            del self._populated[namespace]
        self._outdate(service, service.addresses, ())
        return True

    def put_pod(self, facts: PodFacts) -> bool:
        """Take a pod as it is now (matters where pods are "verified"). Return as `put`."""
        changed = self._pods.put(facts)
        self._changed |= changed
        return changed

    def drop_pod(self, name: NamespacedName) -> bool:
        """Forget a pod. Return whether there was one."""
        changed = self._pods.drop(name)
        self._changed |= changed
        return changed

    def namespaces(self, names: frozenset[str] | None) -> bool:
        """Take the names of all namespaces; None: those exist that have a service (the default).

        A namespace that has a service exists in any case. Return whether the names are others.
        """
        exposed = self.settings.exposed
        known = frozenset() if names is None else names if exposed is None else names & exposed
        found = frozenset([label_wire(name) for name in known if is_label(name)])
        changed = found != self._namespaces
        self._namespaces = found
        self._changed |= changed
        return changed

    def stamp(self, now: int) -> None:
        """Raise the serial to `now` (seconds since 1970) if anything changed since the last call.

        To be called after each batch of changes. The serial never goes back (RFC 1982), and stands
        still only within a second.
        """
        now &= 0xFFFFFFFF
        if self._changed and 0 < (now - self.serial) & 0xFFFFFFFF < 1 << 31:
            self.serial = now
        self._changed = False

    @property
    def serial(self) -> int:
        """Of the SOA records. To be set only to what it was before a restart; see `stamp`."""
        return self._serial

    @serial.setter
    def serial(self, serial: int) -> None:
        self._serial = serial
        for apex in (*self._apexes, self._reverse_apex):
            apex.renew(serial)

    @property
    def services(self) -> int:
        """How many services have names."""
        return len(self._services)

    def is_ours(self, key: bytes) -> bool:
        """Return whether the zone answers for this name: such a name is never forwarded."""
        return self.find(key, Type.ANY).ending is not Ending.NOT_OURS

    def find(self, key: bytes, kind: int) -> Found:
        """Return what stands at a name for a type of record.

        A CNAME may be found for any type. `key` is a well-formed wire name in lower case.
        """
        for apex in self._apexes:
            if key.endswith(apex.domain):
                labels = starts(key)
                offset = len(key) - len(apex.domain)
                if offset in labels or not offset:
                    depth = labels.index(offset) if offset else 0
                    return self._in_domain(key, labels[: depth + 1], kind, apex)
        if key.endswith(b"\x04arpa\x00"):
            place = self._reverse.place(key)
            if place is not None:
                return self._in_reverse(place, kind)
        return _NOT_OURS

    def _in_domain(self, key: bytes, labels: list[int], kind: int, apex: Apex) -> Found:
        """Look below a cluster domain; `labels` begin there, the last is the domain's first."""
        offset, depth = labels[-1], len(labels) - 1
        if not depth:
            return Found(Ending.NODE, apex.own(kind), apex, offset)
        top = key[labels[-2] : offset]
        services: tuple[ServiceNames, ...] = ()
        if top not in (_SVC, _POD):
            parts = [key[labels[i - 1] : labels[i]] for i in range(depth, 0, -1)]
            node = apex.fixed(parts, kind)
        elif depth == 1:
            node = EMPTY
        elif not self.synced:
            return Found(Ending.NOT_READY, EMPTY, apex, offset)
        elif top == _POD:
            node = self._pod(key, labels, kind)
        elif depth == 2:
            node = EMPTY if self._has_namespace(key[labels[0] : labels[1]]) else None
        else:
            start = labels[-4]
            service = self._services.get(key[start : labels[-2]])
            if service is None:
                return Found(Ending.NO_NAME, EMPTY, apex, offset)
            below = [key[labels[i - 1] + 1 : labels[i]] for i in range(depth - 3, 0, -1)]
            node = service.find(below, kind, key[start:], self.settings.ttl)
            services = (service,)
        if node is None:
            return Found(Ending.NO_NAME, EMPTY, apex, offset)
        return Found(Ending.NODE, node, apex, offset, services)

    def _pod(self, key: bytes, labels: list[int], kind: int) -> Node | None:
        namespace = key[labels[-3] : labels[-2]]
        if self._pods.mode == "disabled" or not self._has_namespace(namespace):
            return None
        if len(labels) == 3:
            return EMPTY
        if len(labels) > 4:
            return None
        label = key[labels[0] + 1 : labels[1]]
        return self._pods.find(namespace[1:], label, kind, self.settings.ttl)

    def _has_namespace(self, namespace: bytes) -> bool:
        return namespace in self._populated or namespace in self._namespaces

    def _in_reverse(self, place: Place, kind: int) -> Found:
        apex, offset = self._reverse_apex, place.apex
        if offset == 0 and kind in (Type.SOA, Type.NS):
            return Found(Ending.NODE, apex.own(kind), apex, offset)
        if not self.synced and place.at is not At.APEX:
            return Found(Ending.NOT_READY, EMPTY, apex, offset)
        if place.at is At.NOTHING:
            return Found(Ending.NO_NAME, EMPTY, apex, offset)
        if place.at is not At.ADDRESS:
            return Found(Ending.NODE, EMPTY, apex, offset)
        services = self._reverse.services(place.packed)
        names = [name for one in services for name in self._names(one, place.packed)]
        data = tuple([name for name in names if len(name) <= LONGEST_NAME])
        node = EMPTY
        if kind == Type.PTR and data:
            node = Node(RRset(Type.PTR, self.settings.ttl, data))
        return Found(Ending.NODE, node, apex, offset, services)

    def _names(self, service: ServiceNames, packed: bytes) -> list[bytes]:
        """Return the names that an address has because of a service."""
        origin = service.key + _SVC + self._first
        if service.kind is not Kind.HEADLESS:
            return [origin]
        return [b"%c%b%b" % (len(it), it, origin) for it in service.labels_of(packed)]

    def _outdate(
        self, service: ServiceNames, before: tuple[bytes, ...], after: tuple[bytes, ...]
    ) -> None:
        """Drop the replies made of a service, and let its addresses have their names."""
        self._changed = True
        self.prebuilt.drop(service.take_questions())
        old, new = set(before), set(after)
        for packed in before:
            if packed not in new and service in self._reverse.services(packed):
                self._reverse.remove(packed, service)
        always = service.kind is Kind.CLUSTER
        for packed in after:
            if packed not in old and (always or self._reverse.covers(packed)):
                self._reverse.add(packed, service)
                self.prebuilt.drop((reverse_name(packed) + _PTR_IN,))


def _key(namespace: str, name: str) -> bytes:
    return label_wire(name) + label_wire(namespace)


_PTR_IN = b"\x00\x0c\x00\x01"
