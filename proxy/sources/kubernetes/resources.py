"""What is read from the API server: paths and selectors.

Source: kube-proxy v1.36 (cmd/kube-proxy/app/server.go) for the selectors.
"""

from msgspec import Struct

from vipd.proxy.events import Kind

ANOTHER_PROXY = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"


class Resource(Struct, frozen=True):
    """One kind of object, as it is listed and watched."""

    kind: Kind
    path: str
    """Without a namespace: of the whole cluster."""
    labels: str = ""
    fields: str = ""
    needed: bool = True
    """Whether nothing may be concluded before the first list of it is complete."""

    @property
    def plural(self) -> str:
        """The name that roles and messages have for it, such as ``endpointslices``."""
        return self.path.rpartition("/")[2]


class Wanted(Struct, frozen=True, kw_only=True):
    """What beside the dataplane the objects are for."""

    names: bool = False
    """The DNS server: also headless services, and those of other proxies."""
    pods: bool = False
    """The DNS server answers only for pods that exist."""


def resources(node: str, wanted: Wanted) -> tuple[Resource, ...]:
    """Return what a node of this name reads; without a name, no Node."""
    services = Resource(Kind.SERVICE, "/api/v1/services")
    slices = Resource(Kind.ENDPOINT_SLICE, "/apis/discovery.k8s.io/v1/endpointslices")
    if not wanted.names:
        services = Resource(
            services.kind, services.path, f"!{ANOTHER_PROXY}", "spec.clusterIP!=None"
        )
        slices = Resource(slices.kind, slices.path, f"!{HEADLESS}")
    found = [services, slices]
    if node:
        found.append(Resource(Kind.NODE, "/api/v1/nodes", fields=f"metadata.name={node}"))
    # ServiceCIDR is served since v1.33; without it the configured ranges stand.
    found.append(
        Resource(Kind.SERVICE_CIDR, "/apis/networking.k8s.io/v1/servicecidrs", needed=False)
    )
    if wanted.names:
        found.append(Resource(Kind.NAMESPACE, "/api/v1/namespaces", needed=False))
    if wanted.pods:
        found.append(Resource(Kind.POD, "/api/v1/pods", needed=False))
    return tuple(found)
