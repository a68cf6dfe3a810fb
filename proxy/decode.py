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

from vipd.proxy import decode_endpoints, decode_raw, decode_service, decode_topology
from vipd.proxy.decode_endpoints import Endpoints
from vipd.proxy.decode_fields import FieldError
from vipd.proxy.errors import ManifestError
from vipd.proxy.events import Kind
from vipd.proxy.model import KubernetesObject
from vipd.proxy.names import NamespacedName

Decoded = KubernetesObject | Endpoints
MAX_OBJECT_BYTES = 16 << 20
"""Size of one object's JSON; the API server's own limit for a request is 3 MiB."""
CLUSTER_WIDE = frozenset({"Node", "Namespace", "ServiceCIDR"})
"""The kinds read that have no namespace."""

R = TypeVar("R")
_Convert = Callable[[bytes | msgspec.Raw], Decoded | None]


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


def head_of(
    raw: bytes | msgspec.Raw, origin: str, api_version: str = "", kind: str = ""
) -> Head:
    """Return kind and name of an object, whatever the rest of it is.

    `api_version` and `kind` are those of a typed list (ServiceList), whose items leave them out.
    Raise ManifestError where `raw` is no JSON object or names no kind.
    """
    try:
        if len(raw) > MAX_OBJECT_BYTES:  # type: ignore[arg-type]
            raise FieldError("", f"is larger than {MAX_OBJECT_BYTES >> 20} MiB")  # noqa: TRY301
        found = decode_raw.decode_raw(_HEAD, raw)
    except FieldError as error:
        raise ManifestError(origin, kind, error.field, error.why) from error
    kind = _text(found.kind) or kind
    api_version = _text(found.api_version) or api_version
    head = Head(api_version, kind, _name(found.metadata, kind))
    if not kind:
        raise ManifestError(origin, str(head), "kind", "is missing")
    if not api_version:
        raise ManifestError(origin, str(head), "apiVersion", "is missing")
    return head
