"""What stands at names of addresses: one zone for each network that is answered for.

Lives here: look-ups, and the PTR records made of services. Pure. Must not: know which names there
are in the cluster domains (zone.py), or which addresses services have (reverse.py).
"""

from vipd.dns.apex import SVC, Apex
from vipd.dns.facts import Kind
from vipd.dns.lookup import Ending, Found
from vipd.dns.names import LONGEST_NAME
from vipd.dns.records import EMPTY, Node, RRset, Type
from vipd.dns.reverse import At, ReverseNames
from vipd.dns.service_names import ServiceNames


class ReverseZone:
    """Names of addresses. PTR records end in the domain of `apex`."""

    def __init__(self, addresses: ReverseNames, apex: Apex) -> None:
        self.addresses, self.apex = addresses, apex

    def find(self, key: bytes, kind: int, *, synced: bool) -> Found | None:
        """Return what stands at a name below arpa, None where others answer for it."""
        place = self.addresses.place(key)
        if place is None:
            return None
        apex, offset = self.apex, place.apex
        if offset == 0 and kind in (Type.SOA, Type.NS):
            return Found(Ending.NODE, apex.own(kind), apex, offset)
        if not synced and place.at is not At.APEX:
            return Found(Ending.NOT_READY, EMPTY, apex, offset)
        if place.at is At.NOTHING:
            return Found(Ending.NO_NAME, EMPTY, apex, offset)
        if place.at is not At.ADDRESS:
            return Found(Ending.NODE, EMPTY, apex, offset)
        services = self.addresses.services(place.packed)
        names = [name for one in services for name in self._names(one, place.packed)]
        data = tuple([name for name in names if len(name) <= LONGEST_NAME])
        node = EMPTY
        if kind == Type.PTR and data:
            node = Node(RRset(Type.PTR, apex.ttl, data))
        return Found(Ending.NODE, node, apex, offset, services)

    def _names(self, service: ServiceNames, packed: bytes) -> list[bytes]:
        """Return the names that an address has because of a service."""
        origin = service.key + SVC + self.apex.domain
        if service.kind is not Kind.HEADLESS:
            return [origin]
        return [b"%c%b%b" % (len(it), it, origin) for it in service.labels_of(packed)]
