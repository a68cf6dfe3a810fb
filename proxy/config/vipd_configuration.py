"""The shape of ``kind: VipdConfiguration``: every setting of vipd, with its default.

Lives here: fields and sections, as files spell them. All places that say something (files of
either kind, flags) are brought to these fields. Must not: read files, or check values.
"""

from msgspec import Struct

from vipd.backends.registry import AUTO
from vipd.dns.settings import DnsSettings
from vipd.proxy.config.fields import spelled
from vipd.proxy.durations import as_duration
from vipd.proxy.settings import (
    ConntrackSettings,
    DataplaneSettings,
    DetectLocal,
    HttpSettings,
    UserspaceSettings,
)

API_VERSION = "vipd/v1alpha1"
KIND = "VipdConfiguration"
DEFAULT_SOCKET = "/run/vipd/vipd.sock"
HEALTHZ_PORT, METRICS_PORT = 10256, 10249
"""kube-proxy's."""
_CONNTRACK = ConntrackSettings()


class DetectLocalSection(Struct, frozen=True, rename=spelled):
    """``detectLocal``: what the interface modes look for."""

    bridge_interface: str = ""
    """Name of the bridge that pods hang on, for BridgeInterface."""
    interface_name_prefix: str = ""
    """Prefix of the names of pod interfaces, for InterfaceNamePrefix."""


class IpvsSection(Struct, frozen=True, rename=spelled):
    """``ipvs``: the fields of kube-proxy's section of that name; times as ``15m0s``."""

    scheduler: str = ""
    """Empty: rr."""
    tcp_timeout: str = "0s"
    tcp_fin_timeout: str = "0s"
    udp_timeout: str = "0s"
    strict_arp: bool = False


class UserspaceSection(Struct, frozen=True, rename=spelled):
    """``userspace``: settings of that mode."""

    workers: int = 0
    """0: one for each processor."""
    transparent: bool = False
    """Whether endpoints on this node see their clients' addresses."""
    transparent_bit: int = UserspaceSettings().transparent_bit
    """Bit of the packet mark that their answers get."""


class ConntrackSection(Struct, frozen=True, rename=spelled):
    """``conntrack``: the fields of kube-proxy's section of that name, with its defaults.

    Where nobody says any of them, connection tracking is left as it is.
    """

    max_per_core: int = _CONNTRACK.max_per_core
    min: int = _CONNTRACK.min
    tcp_established_timeout: str = as_duration(_CONNTRACK.tcp_established_seconds)
    tcp_close_wait_timeout: str = as_duration(_CONNTRACK.tcp_close_wait_seconds)
    tcp_be_liberal: bool = False
    udp_timeout: str = "0s"
    udp_stream_timeout: str = "0s"


class HttpSection(Struct, frozen=True, rename=spelled):
    """``http``: where the daemon answers over HTTP; ``ADDRESS:PORT``, or empty for nowhere."""

    healthz: str = f"127.0.0.1:{HEALTHZ_PORT}"
    """In a pod of the cluster and with a KubeProxyConfiguration every address, as in kube-proxy:
    load balancers and the kubelet ask there."""
    metrics: str = f"127.0.0.1:{METRICS_PORT}"
    must_bind: bool = False
    """End where one of them cannot be listened on, instead of trying again."""
    counts_endpoints: bool = HttpSettings().counts_endpoints
    """Whether /metrics has new connections for each service and endpoint."""


class VipdConfiguration(Struct, rename=spelled):
    """The file's shape."""

    api_version: str = API_VERSION
    kind: str = KIND
    mode: str = AUTO
    """Dataplane, or ``auto``, the default: the first that works on this host."""
    manifests: tuple[str, ...] = ()
    """Files and folders with manifests; relative to the current directory."""
    kubeconfig: str = ""
    """File that leads to the API server. Default without manifests: what a pod is given."""
    node_name: str | None = None
    """Default: the host name in lower case."""
    node_ips: tuple[str, ...] = ()
    """This node's addresses. Default, for each family: those of its Node object."""
    cluster_cidrs: tuple[str, ...] = ()
    """Pod networks, at most one of each family."""
    service_cidrs: tuple[str, ...] = ()
    """Ranges of cluster IPs; unallocated addresses in them are dropped."""
    detect_local_mode: DetectLocal = DetectLocal.CLUSTER_CIDR
    detect_local: DetectLocalSection = DetectLocalSection()
    masquerade_all: bool = False
    masquerade_bit: int = 14
    node_port_addresses: tuple[str, ...] = ("primary",)
    """CIDRs of own addresses that answer node ports, ``all``, or ``primary``, the default."""
    serve_external_ips: bool = True
    """Whether ``spec.externalIPs`` of Services are served: whoever may write a Service may take any
    address with them (CVE-2020-8554)."""
    ipvs: IpvsSection = IpvsSection()
    userspace: UserspaceSection = UserspaceSection()
    drain_seconds: int = DataplaneSettings().drain_seconds
    dns: DnsSettings = DnsSettings()
    conntrack: ConntrackSection = ConntrackSection()
    http: HttpSection = HttpSection()
    oom_score_adj: int | None = None
    """What this process has as oom_score_adj; not said: as it was started."""
    log_format: str = "text"
    """How log lines are written: ``text`` or ``json``."""
    socket: str = DEFAULT_SOCKET
    """Path of the control socket."""
