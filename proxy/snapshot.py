"""The snapshot: every object that was told of, immutable; `fold` makes the next one from events.

Lives here: the snapshot and what an event touches. Must not: conclude anything about addresses or
endpoints (resolve.py does), nor do I/O. The order of events about different objects is immaterial.
"""

from collections.abc import Iterable

from immutables import Map
from msgspec import Struct, structs

from vipd.proxy.events import Applied, Deleted, Event, Kind, OwnAddresses, name_of
from vipd.proxy.model import EndpointSlice, Node, Service, ServiceCIDR
from vipd.proxy.names import Address, NamespacedName


class Snapshot(Struct, frozen=True):
    """All objects. `slices` are grouped by the service they belong to, sorted by name."""

    services: Map[NamespacedName, Service] = Map()
    slices: Map[NamespacedName, tuple[EndpointSlice, ...]] = Map()
    slice_owners: Map[NamespacedName, NamespacedName] = Map()
    """Slice name → service name, to find a slice by its own name."""
    nodes: Map[str, Node] = Map()
    service_cidrs: Map[str, ServiceCIDR] = Map()
    own_addresses: tuple[Address, ...] = ()


class Touched(Struct, frozen=True):
    """What a fold changed: names of services, and whether the node-wide facts may have changed."""

    services: frozenset[NamespacedName] = frozenset()
    nodes: frozenset[str] = frozenset()
    service_cidrs: bool = False
    own_addresses: bool = False


def fold(snapshot: Snapshot, events: Iterable[Event]) -> tuple[Snapshot, Touched]:
    """Return the snapshot after the events, and what they touched.

    An event that changes nothing touches nothing. Costs O(events), not O(snapshot).
    """
    services = snapshot.services.mutate()
    slices = snapshot.slices.mutate()
    owners = snapshot.slice_owners.mutate()
    nodes = snapshot.nodes.mutate()
    cidrs = snapshot.service_cidrs.mutate()
    touched: set[NamespacedName] = set()
    touched_nodes: set[str] = set()
    touched_cidrs = False
    own_addresses = snapshot.own_addresses

    def take_slice(name: NamespacedName) -> None:
        owner = owners.pop(name, None)
        if owner is None:
            return
        touched.add(owner)
        rest = tuple(one for one in slices[owner] if one.name != name)
        if rest:
            slices[owner] = rest
        else:
            del slices[owner]

    def put_slice(new: EndpointSlice) -> None:
        group = slices.get(new.service, ())
        if new in group:
            return
        take_slice(new.name)
        others = slices.get(new.service, ())
        # Almost every service has one slice: do not sort what has one member.
        slices[new.service] = tuple(sorted((*others, new), key=_by_name)) if others else (new,)
        owners[new.name] = new.service
        touched.add(new.service)

    for event in events:
        match event:
            case Applied(Service() as service):
                if services.get(service.name) != service:
                    services[service.name] = service
                    touched.add(service.name)
            case Applied(EndpointSlice() as one):
                put_slice(one)
            case Applied(Node() as node):
                known = nodes.get(node.name)
                if known != node:
                    nodes[node.name] = node
                    # No service depends on `leaving`.
                    if known is None or structs.replace(known, leaving=node.leaving) != node:
                        touched_nodes.add(node.name)
            case Applied(ServiceCIDR() as cidr):
                if cidrs.get(cidr.name) != cidr:
                    cidrs[cidr.name] = cidr
                    touched_cidrs = True
            case OwnAddresses(addresses):
                own_addresses = addresses
            case Deleted(Kind.SERVICE, name):
                if services.pop(name, None) is not None:
                    touched.add(name)
            case Deleted(Kind.ENDPOINT_SLICE, name):
                take_slice(name)
            case Deleted(Kind.NODE, name):
                if nodes.pop(name.name, None) is not None:
                    touched_nodes.add(name.name)
            case Deleted(Kind.SERVICE_CIDR, name):
                touched_cidrs |= cidrs.pop(name.name, None) is not None
            case _:
                pass  # pods and namespaces are the sources' matter; Synced and Problem the daemon's

    after = Snapshot(
        services=services.finish(),
        slices=slices.finish(),
        slice_owners=owners.finish(),
        nodes=nodes.finish(),
        service_cidrs=cidrs.finish(),
        own_addresses=own_addresses,
    )
    return after, Touched(
        frozenset(touched),
        frozenset(touched_nodes),
        touched_cidrs,
        own_addresses != snapshot.own_addresses,
    )


def _by_name(one: EndpointSlice) -> NamespacedName:
    return name_of(one)
