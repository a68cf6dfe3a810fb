"""What sources say: this object is now so, that one is gone, the first list is complete.

Lives here: the events and which services each touches directly. Must not: decide what follows from
them (snapshot.py folds them, resolve.py concludes).
"""

from enum import Enum

from msgspec import Struct

from vipd.proxy.errors import ManifestError
from vipd.proxy.model import EndpointSlice, KubernetesObject, Node, Pod, Service, ServiceCIDR
from vipd.proxy.names import Address, NamespacedName


class Kind(Enum):
    """The kinds of objects that vipd reads; the value is the API's ``kind``."""

    SERVICE = "Service"
    ENDPOINT_SLICE = "EndpointSlice"
    POD = "Pod"
    NODE = "Node"
    NAMESPACE = "Namespace"
    SERVICE_CIDR = "ServiceCIDR"


class Applied(Struct, frozen=True):
    """The object is new or changed and is now exactly this."""

    object: KubernetesObject


class Deleted(Struct, frozen=True):
    """The object is gone. `name` of a cluster-wide object has an empty namespace."""

    kind: Kind
    name: NamespacedName


class Synced(Struct, frozen=True):
    """The source has now told everything that existed when it started."""


class Problem(Struct, frozen=True):
    """Something could not be read. It stays a problem until `cleared` comes for the same `key`.

    `key` tells problems apart (a file, or a file and an object); `error` is None when cleared.
    """

    key: str
    error: ManifestError | None


class OwnAddresses(Struct, frozen=True):
    """The addresses of this node's interfaces are now these: sorted, without loopback's."""

    addresses: tuple[Address, ...]


Event = Applied | Deleted | Synced | Problem | OwnAddresses


def kind_of(thing: KubernetesObject) -> Kind:
    """Return the kind of an object."""
    match thing:
        case Service():
            return Kind.SERVICE
        case EndpointSlice():
            return Kind.ENDPOINT_SLICE
        case Pod():
            return Kind.POD
        case Node():
            return Kind.NODE
        case ServiceCIDR():
            return Kind.SERVICE_CIDR
        case _:
            return Kind.NAMESPACE


def name_of(thing: KubernetesObject) -> NamespacedName:
    """Return namespace and name; the namespace is empty for cluster-wide objects."""
    if isinstance(thing.name, NamespacedName):
        return thing.name
    return NamespacedName("", thing.name)
