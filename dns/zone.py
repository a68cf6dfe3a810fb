"""The names of the cluster: fed with facts, asked with lower-case names in wire form.

Lives here: the tree from the cluster domains down to the services, and what a change outdates.
Pure. Must not: know messages (answer.py), or what stands at a service's names (service_names.py).
"""

from msgspec import Struct

from vipd.dns.apex import SVC, Apex
from vipd.dns.facts import Kind, PodFacts, ServiceFacts
from vipd.dns.lookup import Ending, Found
from vipd.dns.names import label_wire, reverse_name, starts, starts_if_good, wire
from vipd.dns.namespaces import Namespaces
from vipd.dns.pods import PodMode, PodNames
from vipd.dns.prebuilt import Prebuilt
from vipd.dns.records import EMPTY, Node, Type
from vipd.dns.reverse import ReverseNames
from vipd.dns.reverse_zone import ReverseZone
from vipd.dns.service_names import ServiceNames
from vipd.proxy.names import Address, NamespacedName, Network

_POD = label_wire("pod")


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
        self._addresses = ReverseNames(settings.reverse)
        first = Apex(wire(settings.domains[0]), *ttls, own, reverse=True)
        self._reverse = ReverseZone(self._addresses, first)
        self._services: dict[bytes, ServiceNames] = {}
        self._namespaces = Namespaces(settings.exposed)
        self._pods = PodNames(settings.pods)
        self.serial = 1

    def put(self, facts: ServiceFacts) -> bool:
        """Take a service as it is now. Return whether any record may be another."""
        if not self._namespaces.exposes(facts.namespace):
            return False
        key = _key(facts.namespace, facts.name)
        service = self._services.get(key)
        if service is None:
            service = self._services[key] = ServiceNames(key, facts)
            self._namespaces.enter(facts.namespace)
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
        self._namespaces.leave(name.namespace)
        self._outdate(service, service.addresses, ())
        return True

    def put_pod(self, facts: PodFacts) -> bool:
        """Take a pod as it is now (matters where pods are "verified"). Return as `put`."""
        return self._pods.put(facts)

    def drop_pod(self, name: NamespacedName) -> bool:
        """Forget a pod. Return whether there was one."""
        return self._pods.drop(name)

    def namespaces(self, names: frozenset[str] | None) -> bool:
        """Take the names of all namespaces; None: those exist that have a service (the default).

        A namespace that has a service exists in any case. Return whether the names are others.
        """
        return self._namespaces.tell(names)

    def stamp(self, now: int) -> None:
        """Raise the serial to when anything was changed last (seconds since 1970).

        It never goes back (RFC 1982).
        """
        now &= 0xFFFFFFFF
        if 0 < (now - self.serial) & 0xFFFFFFFF < 1 << 31:
            self.serial = now

    @property
    def serial(self) -> int:
        """Of the SOA records. To be set only to what it was before a restart; see `stamp`."""
        return self._serial

    @serial.setter
    def serial(self, serial: int) -> None:
        self._serial = serial
        for apex in (*self._apexes, self._reverse.apex):
            apex.renew(serial)

    @property
    def services(self) -> int:
        """How many services have names."""
        return len(self._services)

    def is_ours(self, key: bytes) -> bool:
        """Return whether the zone answers for this name: such a name is never forwarded."""
        return self.find(key, Type.ANY).ending is not Ending.NOT_OURS

    def lacks(self, key: bytes) -> tuple[Apex, int] | None:
        """Return the zone of a name that belongs to a service which there is not, of no type.

        With it comes where the zone's name begins. None: it may be another name, or no name at all;
        `find` says. Search lists turn names of others into such ones, so most questions may be so.
        """
        for apex in self._apexes:
            if key.endswith(apex.domain):  # of nested domains the inner one, as in `find`
                if not (key.endswith(apex.services) and self.synced):
                    return None
                labels = starts_if_good(key)
                begins = len(key) - len(apex.services)
                if labels is None or begins not in labels:
                    return None
                depth = labels.index(begins)
                if depth < 2 or key[labels[depth - 2] : begins] in self._services:
                    return None
                return apex, begins + len(SVC)
        return None

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
            return self._reverse.find(key, kind, synced=self.synced) or _NOT_OURS
        return _NOT_OURS

    def _in_domain(self, key: bytes, labels: list[int], kind: int, apex: Apex) -> Found:
        """Look below a cluster domain; `labels` begin there, the last is the domain's first."""
        offset, depth = labels[-1], len(labels) - 1
        if not depth:
            return Found(Ending.NODE, apex.own(kind), apex, offset)
        top = key[labels[-2] : offset]
        services: tuple[ServiceNames, ...] = ()
        if top not in (SVC, _POD):
            parts = [key[labels[i - 1] : labels[i]] for i in range(depth, 0, -1)]
            node = apex.fixed(parts, kind)
        elif depth == 1:
            node = EMPTY
        elif not self.synced:
            return Found(Ending.NOT_READY, EMPTY, apex, offset)
        elif top == _POD:
            node = self._pod(key, labels, kind)
        elif depth == 2:
            node = EMPTY if key[labels[0] : labels[1]] in self._namespaces else None
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
        if self._pods.mode == "disabled" or namespace not in self._namespaces:
            return None
        if len(labels) == 3:
            return EMPTY
        if len(labels) > 4:
            return None
        label = key[labels[0] + 1 : labels[1]]
        return self._pods.find(namespace[1:], label, kind, self.settings.ttl)

    def _outdate(
        self, service: ServiceNames, before: tuple[bytes, ...], after: tuple[bytes, ...]
    ) -> None:
        """Drop the replies made of a service, and let its addresses have their names."""
        self.prebuilt.drop(service.take_questions())
        old, new = set(before), set(after)
        for packed in before:
            if packed not in new and service in self._addresses.services(packed):
                self._addresses.remove(packed, service)
        always = service.kind is Kind.CLUSTER
        for packed in after:
            if packed not in old and (always or self._addresses.covers(packed)):
                self._addresses.add(packed, service)
                self.prebuilt.drop((reverse_name(packed) + _PTR_IN,))


def _key(namespace: str, name: str) -> bytes:
    return label_wire(name) + label_wire(namespace)


_PTR_IN = b"\x00\x0c\x00\x01"
