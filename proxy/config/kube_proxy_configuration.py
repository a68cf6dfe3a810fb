"""The shape of ``kind: KubeProxyConfiguration``: kube-proxy's file, as kubeadm writes it.

Lives here: its fields and their types, nothing else; what they mean here is in
kube_proxy_meaning.py. Source: k8s.io/kube-proxy/config/v1alpha1 (types.go) of v1.37.
"""

from msgspec import Struct

from vipd.proxy.config.fields import spelled

API_VERSION = "kubeproxy.config.k8s.io/v1alpha1"
KIND = "KubeProxyConfiguration"


class ClientConnection(Struct, frozen=True, rename=spelled):
    """``clientConnection``."""

    kubeconfig: str = ""
    accept_content_types: str = ""
    content_type: str = ""
    qps: float = 0
    burst: int = 0


class LogFormatOptions(Struct, frozen=True, rename=spelled):
    """``logging.options.text`` and ``.json``; sizes are quantities of the Kubernetes API."""

    split_stream: bool = False
    info_buffer_size: str | int = "0"


class LogOptions(Struct, frozen=True, rename=spelled):
    """``logging.options``."""

    text: LogFormatOptions = LogFormatOptions()
    json: LogFormatOptions = LogFormatOptions()


class VModule(Struct, frozen=True, rename=spelled):
    """An entry of ``logging.vmodule``."""

    file_pattern: str = ""
    verbosity: int = 0


class Logging(Struct, frozen=True, rename=spelled):
    """``logging``."""

    format: str = ""
    flush_frequency: str | int = 0
    verbosity: int = 0
    vmodule: tuple[VModule, ...] = ()
    options: LogOptions = LogOptions()


class Iptables(Struct, frozen=True, rename=spelled):
    """``iptables``, of which masqueradeBit and masqueradeAll are mode ipvs's, too."""

    masquerade_bit: int = 14
    masquerade_all: bool = False
    localhost_node_ports: bool = True
    snat_node_internal_ip: bool = False
    """Seen in types.go of a development branch only."""
    sync_period: str = "0s"
    min_sync_period: str = "0s"


class Ipvs(Struct, frozen=True, rename=spelled):
    """``ipvs``."""

    sync_period: str = "0s"
    min_sync_period: str = "0s"
    scheduler: str = ""
    exclude_cidrs: tuple[str, ...] = ()
    strict_arp: bool = False
    tcp_timeout: str = "0s"
    tcp_fin_timeout: str = "0s"
    udp_timeout: str = "0s"


class Nftables(Struct, frozen=True, rename=spelled):
    """``nftables``."""

    masquerade_bit: int = 14
    masquerade_all: bool = False
    sync_period: str = "0s"
    min_sync_period: str = "0s"


class Winkernel(Struct, frozen=True, rename=spelled):
    """``winkernel``."""

    network_name: str = ""
    source_vip: str = ""
    enable_dsr: bool = False
    root_hns_endpoint_name: str = ""
    forward_health_check_vip: bool = False


class DetectLocal(Struct, frozen=True, rename=spelled):
    """``detectLocal``."""

    bridge_interface: str = ""
    interface_name_prefix: str = ""


class Conntrack(Struct, frozen=True, rename=spelled):
    """``conntrack``."""

    max_per_core: int = 0
    min: int = 0
    tcp_established_timeout: str = "0s"
    tcp_close_wait_timeout: str = "0s"
    tcp_be_liberal: bool = False
    udp_timeout: str = "0s"
    udp_stream_timeout: str = "0s"


class KubeProxyConfiguration(Struct, frozen=True, rename=spelled):
    """The file's shape. No default here counts: what is not said is read as not said."""

    api_version: str = API_VERSION
    kind: str = KIND
    feature_gates: dict[str, bool] = {}
    client_connection: ClientConnection = ClientConnection()
    logging: Logging = Logging()
    hostname_override: str = ""
    bind_address: str = ""
    healthz_bind_address: str = ""
    metrics_bind_address: str = ""
    bind_address_hard_fail: bool = False
    enable_profiling: bool = False
    show_hidden_metrics_for_version: str = ""
    mode: str = ""
    iptables: Iptables = Iptables()
    ipvs: Ipvs = Ipvs()
    nftables: Nftables = Nftables()
    winkernel: Winkernel = Winkernel()
    detect_local_mode: str = ""
    detect_local: DetectLocal = DetectLocal()
    cluster_cidr: str = ""
    node_port_addresses: tuple[str, ...] = ()
    oom_score_adj: int | None = None
    conntrack: Conntrack = Conntrack()
    config_sync_period: str = "0s"
    port_range: str = ""
    windows_run_as_service: bool = False
