"""The decode edge: the JSON of one Kubernetes object becomes a checked object of the model.

Lives here: which kinds are read, how each becomes the model's type, what one field of an object
says about another. Must not: read files or sockets (sources/), keep anything between two objects.
Every function raises ManifestError, and nothing else, whatever the bytes are.
Source: behaviour of kube-proxy v1.36/1.37 (which address, which default), API validation v1.37.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

import msgspec
from msgspec import Struct
from msgspec.json import Decoder

from vipd.proxy import decode_raw as raws
from vipd.proxy.decode_endpoints import Endpoints, endpoint_slice, endpoints
from vipd.proxy.decode_fields import FieldError, is_name
from vipd.proxy.decode_raw import decode_raw
from vipd.proxy.decode_service import service
from vipd.proxy.decode_topology import namespace, node, pod, service_cidr
from vipd.proxy.errors import ManifestError
from vipd.proxy.events import Kind
from vipd.proxy.model import EndpointSlice, Flaw, KubernetesObject, Service
from vipd.proxy.names import NamespacedName

Decoded = KubernetesObject | Endpoints
MAX_OBJECT_BYTES = 16 << 20
"""Size of one object's JSON; the API server's own limit for a request is 3 MiB."""
CLUSTER_WIDE = frozenset({"Node", "Namespace", "ServiceCIDR"})
"""The kinds read that have no namespace."""

MOST_FLAWS = 5
"""Entries of one object that are named one by one."""

Bytes = bytes | msgspec.Raw
"""The JSON of one object; a Raw is a piece of a bigger document, not copied."""
T = TypeVar("T")
R = TypeVar("R")


class Head(Struct, frozen=True):
    """What an object says it is. Fields that are absent or of a wrong type are empty."""

    api_version: str
    kind: str
    name: NamespacedName
    """Namespace ``default`` where a namespaced object names none, empty for a cluster-wide one."""

    @property
    def read(self) -> bool:
        """Whether vipd reads objects of this kind and version."""
        return (self.api_version, self.kind) in _CONVERT

    def __str__(self) -> str:
        if not self.name.name:
            return self.kind
        name = str(self.name) if self.name.namespace else self.name.name
        return f"{self.kind} {name}".lstrip()


class _RawHead(Struct, rename="camel", gc=False):
    api_version: msgspec.Raw = msgspec.Raw()
    kind: msgspec.Raw = msgspec.Raw()
    metadata: msgspec.Raw = msgspec.Raw()


class _RawName(Struct, gc=False):
    name: msgspec.Raw = msgspec.Raw()
    namespace: msgspec.Raw = msgspec.Raw()


_HEAD = Decoder(_RawHead)
_NAME = Decoder(_RawName)
_TEXT = Decoder(str)


def head_of(raw: Bytes, origin: str, api_version: str = "", kind: str = "") -> Head:
    """Return kind and name of an object, whatever the rest of it is.

    `api_version` and `kind` are those of a typed list (ServiceList), whose items leave them out.
    Raise ManifestError where `raw` is no JSON object or names no kind.
    """
    if memoryview(raw).nbytes > MAX_OBJECT_BYTES:
        raise ManifestError(origin, kind, "", f"is larger than {MAX_OBJECT_BYTES >> 20} MiB")
    try:
        found = decode_raw(_HEAD, raw)
    except FieldError as error:
        raise ManifestError(origin, kind, error.field, error.why) from error
    kind = _text(found.kind) or kind
    api_version = _text(found.api_version) or api_version
    head = Head(api_version, kind, _name(found.metadata, kind))
    for field, value in (("kind", kind), ("apiVersion", api_version)):
        if not value:
            raise ManifestError(origin, str(head), field, "is missing or no text")
    return head


def decode(raw: Bytes, origin: str, head: Head | None = None) -> Decoded | None:
    """Return the object, or None if vipd has no use for it.

    That is another kind, or a slice of domain names or of no service.

    `origin` is where it comes from, for the message; `head` saves a look at what is known already.
    """
    head = head or head_of(raw, origin)
    convert = _CONVERT.get((head.api_version, head.kind))
    return convert(raw, origin, head) if convert else None


def decode_kind(kind: Kind, raw: Bytes, origin: str) -> KubernetesObject | None:
    """Return an object that is known to be of this kind, as in a watch.

    None: a slice of domain names or of no service.
    """
    return _KINDS[kind](raw, origin, None)


def flaws(value: Decoded | None, origin: str, thing: str) -> ManifestError | None:
    """Return what was left out of an object, as one error; None where nothing was."""
    found: tuple[Flaw, ...] = ()
    if isinstance(value, Service | EndpointSlice):
        found = value.flaws
    elif isinstance(value, Endpoints):  # its slices of two families have the same ports
        found = tuple(dict.fromkeys(flaw for one in value.slices for flaw in one.flaws))
    if not found:
        return None
    first, *others = found
    named = [f"{one.field}: {one.why}" for one in others[: MOST_FLAWS - 1]]
    more = len(found) - MOST_FLAWS
    why = "; ".join((first.why, *named, *([f"and {more} more"] if more > 0 else [])))
    return ManifestError(origin, thing, first.field, f"{why} (left out; the rest is served)")


def _reader(
    kind: str, decoder: Decoder[T], convert: Callable[[T], R]
) -> Callable[[Bytes, str, Head | None], R]:
    def read(raw: Bytes, origin: str, head: Head | None) -> R:
        try:
            if memoryview(raw).nbytes > MAX_OBJECT_BYTES:
                why = f"is larger than {MAX_OBJECT_BYTES >> 20} MiB"
                raise FieldError("", why)  # noqa: TRY301 - becomes the same error as all others
            return convert(decode_raw(decoder, raw))
        except FieldError as error:
            thing = str(head or _head_or_none(raw, kind) or kind)
            raise ManifestError(origin, thing, error.field, error.why) from error

    return read


def _head_or_none(raw: Bytes, kind: str) -> Head | None:
    try:
        return head_of(raw, "", "-", kind)
    except ManifestError:
        return None


def _text(raw: msgspec.Raw) -> str:
    """Return a JSON string's text, empty for anything else."""
    try:
        return decode_raw(_TEXT, raw)
    except FieldError:
        return ""


def _name(metadata: msgspec.Raw, kind: str) -> NamespacedName:
    try:
        found = decode_raw(_NAME, metadata)
    except FieldError:
        return NamespacedName("", "")
    name, space = _text(found.name), _text(found.namespace)
    if not is_name(name) or (space and not is_name(space)):
        return NamespacedName("", "")
    if kind in CLUSTER_WIDE:
        return NamespacedName("", name)
    return NamespacedName(space or "default", name)


_service = _reader("Service", Decoder(raws.RawService), service)
_slice = _reader("EndpointSlice", Decoder(raws.RawSlice), endpoint_slice)
_endpoints = _reader("Endpoints", Decoder(raws.RawEndpoints), endpoints)
_pod = _reader("Pod", Decoder(raws.RawPod), pod)
_node = _reader("Node", Decoder(raws.RawNode), node)
_namespace = _reader("Namespace", Decoder(raws.RawNamespace), namespace)
_service_cidr = _reader("ServiceCIDR", Decoder(raws.RawServiceCIDR), service_cidr)

_KINDS: Mapping[Kind, Callable[[Bytes, str, Head | None], KubernetesObject | None]] = (
    MappingProxyType(
        {
            Kind.SERVICE: _service,
            Kind.ENDPOINT_SLICE: _slice,
            Kind.POD: _pod,
            Kind.NODE: _node,
            Kind.NAMESPACE: _namespace,
            Kind.SERVICE_CIDR: _service_cidr,
        }
    )
)
_CONVERT: Mapping[tuple[str, str], Callable[[Bytes, str, Head | None], Decoded | None]] = (
    MappingProxyType(
        {
            ("v1", "Service"): _service,
            ("v1", "Endpoints"): _endpoints,
            ("v1", "Pod"): _pod,
            ("v1", "Node"): _node,
            ("v1", "Namespace"): _namespace,
            ("discovery.k8s.io/v1", "EndpointSlice"): _slice,
            ("networking.k8s.io/v1", "ServiceCIDR"): _service_cidr,
        }
    )
)
