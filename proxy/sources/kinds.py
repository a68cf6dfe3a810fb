"""Kinds that are no kinds: a typo in `kind` or `apiVersion`, which would be passed over otherwise.

Lives here: which names are so near to one that is read that it must have been meant. Pure. Must
not: guess about groups of others, which may have a Service of their own.
"""

from types import MappingProxyType

from vipd.proxy.decode import Head

_READ = MappingProxyType(
    {
        "Service": "v1",
        "Endpoints": "v1",
        "Pod": "v1",
        "Node": "v1",
        "Namespace": "v1",
        "EndpointSlice": "discovery.k8s.io/v1",
        "ServiceCIDR": "networking.k8s.io/v1",
    }
)
_BUILT_IN = frozenset({"", "apps", "batch", "extensions", "autoscaling", "policy"})
"""Groups of Kubernetes itself that have no dot in their name."""
_NEAR = 0.7
"""No two kinds of these groups are as near to one another (ServiceAccount and Service: 0.67)."""


def mistake(head: Head) -> tuple[str, str] | None:
    """Return field and reason where an object cannot be what its author meant, else None."""
    if head.read:
        return None
    if head.api_version in _READ.values():
        from difflib import get_close_matches  # most start without

        near = get_close_matches(head.kind[:60], _READ, n=1, cutoff=_NEAR)
        if not near:
            return None
        meant = f"{near[0]} of {_READ[near[0]]}"
        return "kind", f"{head.kind[:60]!r} is no kind of {head.api_version}; is {meant} meant?"
    version = _READ.get(head.kind)
    group = head.api_version.rpartition("/")[0]
    if version is None or not (group in _BUILT_IN or group.endswith(".k8s.io")):
        return None
    return "apiVersion", f"{head.api_version[:60]!r}: {head.kind} is read of {version} only"
