"""A name taken apart: which Service, Pod or address it may stand for.

Lives here: that, everything that DNS answers from, and a zone with the little of it that matters
for the name. Pure. Must not: say what is wrong with it (hints.py).
"""

from collections.abc import Mapping
from ipaddress import ip_address
from typing import NamedTuple

from vipd.dns.facts import PodFacts, facts_of
from vipd.dns.forward.configured import Configured
from vipd.dns.names import IN_ADDR, IP6, reverse_part, starts, wire
from vipd.dns.origins import Behind, endpoints
from vipd.dns.settings import DnsSettings, zone_settings
from vipd.dns.zone import Zone
from vipd.proxy.model import Service
from vipd.proxy.names import Address, NamespacedName
from vipd.proxy.snapshot import Snapshot


class Known(NamedTuple):
    """All that DNS answers from."""

    snapshot: Snapshot
    settings: DnsSettings
    """With `reverse` filled in."""
    namespaces: frozenset[str] = frozenset()
    """Of Namespace objects."""
    pods: Mapping[NamespacedName, PodFacts] | None = None
    """None: not kept, as no name depends on them."""
    synced: bool = True
    configured: Configured | None = None
    """What is done with names of others; None: not known."""


class AskedName:
    """A name taken apart: the Service, Pod or address that it may stand for."""

    def __init__(self, key: bytes, known: Known) -> None:
        self.key, self.known = key, known
        self.labels = [key[at + 1 : at + 1 + key[at]] for at in starts(key)]
        self.domain = ""
        self.under: tuple[str, ...] = ()
        """Labels below the cluster domain, the nearest to it first."""
        for domain in sorted(known.settings.domains, key=len, reverse=True):
            suffix = wire(domain)
            if key.endswith(suffix) and len(key) - len(suffix) in (0, *starts(key)):
                self.domain = domain
                depth = len(starts(suffix))
                labels = self.labels[: len(self.labels) - depth]
                self.under = tuple([one.decode("latin-1") for one in reversed(labels)])
                break
        self.address = address_of(key)
        self.service: Service | None = None
        if self.under[:1] == ("svc",) and len(self.under) > 2:
            named = NamespacedName(self.under[1], self.under[2])
            self.service = known.snapshot.services.get(named)
        self.below = [one.encode("latin-1") for one in self.under[3:]]

    @property
    def kind(self) -> str:
        """`svc`, `pod`, or something else directly below the domain."""
        return self.under[0] if self.under else ""

    @property
    def namespace(self) -> str:
        """That of the Service or Pod; empty: none is named."""
        return self.under[1] if len(self.under) > 1 else ""

    def behind(self, service: Service) -> list[Behind]:
        """Return the endpoints of a Service."""
        return endpoints(self.known.snapshot.slices.get(service.name, ()))

    def of_address(self) -> list[Service]:
        """Return the Services that have the address, as cluster IP or as any endpoint's."""
        found = [
            service
            for service in self.known.snapshot.services.values()
            if self.address in service.cluster_ips
            or any(one.endpoint.address == self.address for one in self.behind(service))
        ]
        return sorted(found, key=lambda one: one.name)

    def has_namespace(self, name: str) -> bool:
        """Return whether there is such a namespace. Costs O(services) where no object says so."""
        if name in self.known.namespaces:
            return True
        return any(one.namespace == name for one in self.known.snapshot.services)

    def zone(self) -> Zone:
        """Return a zone with what matters for the name, and no more."""
        zone = Zone(zone_settings(self.known.settings))
        there = [self.service] if self.service else self.of_address() if self.address else []
        for one in there:
            facts = facts_of(one, self.known.snapshot.slices.get(one.name, ()))
            if facts is not None:
                zone.put(facts)
        if self.namespace and self.has_namespace(self.namespace):
            zone.namespaces(frozenset({self.namespace}))
        for pod in (self.known.pods or {}).values() if self.kind == "pod" else ():
            if pod.namespace == self.namespace:
                zone.put_pod(pod)
        zone.synced = self.known.synced
        return zone


def address_of(key: bytes) -> Address | None:
    """Return the address whose reverse name it is."""
    for suffix, count, unit in ((IN_ADDR, 4, 8), (IP6, 32, 4)):
        at = starts(key)
        if key.endswith(suffix) and len(at) == count + 2:
            value = 0
            for one in reversed(at[:count]):
                part = reverse_part(key[one + 1 : one + 1 + key[one]], octet=unit == 8)
                if part is None:
                    return None
                value = value << unit | part
            return ip_address(value.to_bytes(unit * count // 8))
    return None
