"""The configuration that counts, and how it is told.

Lives here: `Config`, and the file that would say the same. Must not: read, check or decide.
"""

from msgspec import Struct, to_builtins

from vipd.dns.settings import DnsSettings
from vipd.proxy.config.vipd_configuration import API_VERSION, KIND
from vipd.proxy.durations import as_duration
from vipd.proxy.names import Address
from vipd.proxy.settings import (
    ConntrackSettings,
    DataplaneSettings,
    DetectLocal,
    HttpSettings,
    NodeSettings,
)


class Config(Struct, frozen=True, kw_only=True):
    """Everything the daemon was told, checked. Holds no credentials: where they are, at most."""

    mode: str
    manifests: tuple[str, ...]
    kubeconfig: str
    """Empty, and no manifests: as a pod of the cluster."""
    socket: str
    node: NodeSettings
    dataplane: DataplaneSettings = DataplaneSettings()
    dns: DnsSettings = DnsSettings()
    conntrack: ConntrackSettings | None = None
    """None: connection tracking is left as it is."""
    http: HttpSettings = HttpSettings()
    oom_score_adjust: int | None = None
    """What this process has as oom_score_adj; None: as it was started."""
    log_format: str = "text"
    """How log lines are written: ``text`` or ``json``."""


def as_file(config: Config) -> dict[str, object]:
    """Return the VipdConfiguration that says all of it, as JSON values.

    Read again it is the same configuration. What is left to the kernel or to chance is not in it.
    """
    node, ipvs, userspace = config.node, config.dataplane.ipvs, config.dataplane.userspace
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "mode": config.mode,
        **({"manifests": list(config.manifests)} if config.manifests else {}),
        **({"kubeconfig": config.kubeconfig} if config.kubeconfig else {}),
        "nodeName": node.node_name,
        "nodeIPs": list(map(str, node.node_ips)),
        "clusterCIDRs": list(map(str, node.cluster_cidrs)),
        "serviceCIDRs": list(map(str, node.service_cidrs)),
        "detectLocalMode": node.detect_local.value,
        "detectLocal": _detect_local(node),
        "masqueradeAll": node.masquerade_all,
        "masqueradeBit": node.masquerade_bit,
        "nodePortAddresses": node_port_addresses(node),
        "serveExternalIPs": node.serve_external_ips,
        "ipvs": {
            "scheduler": ipvs.scheduler,
            "tcpTimeout": as_duration(ipvs.tcp_timeout),
            "tcpFinTimeout": as_duration(ipvs.tcp_fin_timeout),
            "udpTimeout": as_duration(ipvs.udp_timeout),
            "strictARP": ipvs.strict_arp,
        },
        "userspace": {
            "workers": userspace.workers,
            "transparent": userspace.transparent,
            "transparentBit": userspace.transparent_bit,
        },
        "drainSeconds": config.dataplane.drain_seconds,
        "dns": to_builtins(config.dns),
        **({} if config.conntrack is None else {"conntrack": _conntrack(config.conntrack)}),
        "http": {
            "healthz": place(config.http.healthz),
            "metrics": place(config.http.metrics),
            "mustBind": config.http.must_bind,
            "countsEndpoints": config.http.counts_endpoints,
        },
        **({} if config.oom_score_adjust is None else {"oomScoreAdj": config.oom_score_adjust}),
        "logFormat": config.log_format,
        "socket": config.socket,
    }


def _detect_local(node: NodeSettings) -> dict[str, object]:
    match node.detect_local:
        case DetectLocal.BRIDGE_INTERFACE:
            return {"bridgeInterface": node.local_interface}
        case DetectLocal.INTERFACE_NAME_PREFIX:
            return {"interfaceNamePrefix": node.local_interface}
        case _:
            return {}


def node_port_addresses(node: NodeSettings) -> list[str]:
    """Return the ranges of own addresses that answer node ports, with the word ``primary``."""
    ranges = node.node_port_addresses
    primary = ["primary"] if ranges is None or node.node_port_primary else []
    return [*primary, *map(str, ranges or ())]


def _conntrack(told: ConntrackSettings) -> dict[str, object]:
    return {
        "maxPerCore": told.max_per_core,
        "min": told.min,
        "tcpEstablishedTimeout": as_duration(told.tcp_established_seconds),
        "tcpCloseWaitTimeout": as_duration(told.tcp_close_wait_seconds),
        "tcpBeLiberal": told.tcp_be_liberal,
        "udpTimeout": as_duration(told.udp_seconds),
        "udpStreamTimeout": as_duration(told.udp_stream_seconds),
    }


def place(listens: tuple[Address, int] | None) -> str:
    """Return ``ADDRESS:PORT``, empty for nowhere."""
    if listens is None:
        return ""
    address, port = listens
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
