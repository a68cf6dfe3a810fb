"""/configz: the configuration in effect, as kube-proxy tells it, and as vipd has it.

Lives here: the two forms. Pure. Must not: tell a credential; of a kubeconfig only the path is known
here.
Source: kubeproxy.config.k8s.io/v1alpha1 (staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go).
"""

from collections.abc import Iterable

import msgspec

from vipd.proxy.config import Config
from vipd.proxy.names import Address, Network

COMPONENT = "kubeproxy.config.k8s.io"
"""The name under which tools look for kube-proxy's configuration."""


def configz(config: Config, mode: str) -> bytes:
    """Return the document for a configuration and the mode that serves."""
    told = {COMPONENT: _kube_proxy(config, mode), "vipd": _plain(config)}
    return msgspec.json.encode(told)


def _plain(config: Config) -> object:
    return msgspec.to_builtins(config, str_keys=True, enc_hook=_text)


def _text(value: object) -> object:
    if isinstance(value, Address | Network):
        return str(value)
    raise NotImplementedError(f"no JSON for {type(value).__name__}")


def _kube_proxy(config: Config, mode: str) -> dict[str, object]:
    """Return the fields of kube-proxy's configuration that vipd has, as v1alpha1 spells them."""
    node, conntrack, ipvs = config.node, config.conntrack, config.dataplane.ipvs
    masquerade = {"masqueradeBit": node.masquerade_bit, "masqueradeAll": node.masquerade_all}
    ranges = node.node_port_addresses
    told: dict[str, object] = {
        "apiVersion": f"{COMPONENT}/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode,
        "hostnameOverride": node.node_name,
        "clientConnection": {"kubeconfig": config.kubeconfig},
        "healthzBindAddress": _place(config.http.healthz),
        "metricsBindAddress": _place(config.http.metrics),
        "bindAddressHardFail": config.http.must_bind,
        "clusterCIDR": _joined(node.cluster_cidrs),
        "detectLocalMode": node.detect_local.value,
        "nodePortAddresses": ["primary"] if ranges is None else [str(one) for one in ranges],
        "iptables": masquerade,
        "nftables": masquerade,
        "ipvs": {
            "scheduler": ipvs.scheduler,
            "strictARP": ipvs.strict_arp,
            "tcpTimeout": _duration(ipvs.tcp_timeout),
            "tcpFinTimeout": _duration(ipvs.tcp_fin_timeout),
            "udpTimeout": _duration(ipvs.udp_timeout),
        },
    }
    if config.oom_score_adjust is not None:
        told["oomScoreAdj"] = config.oom_score_adjust
    if conntrack is not None:
        told["conntrack"] = {
            "maxPerCore": conntrack.max_per_core,
            "min": conntrack.min,
            "tcpBeLiberal": conntrack.tcp_be_liberal,
            "tcpEstablishedTimeout": _duration(conntrack.tcp_established_seconds),
            "tcpCloseWaitTimeout": _duration(conntrack.tcp_close_wait_seconds),
            "udpTimeout": _duration(conntrack.udp_seconds),
            "udpStreamTimeout": _duration(conntrack.udp_stream_seconds),
        }
    return told


def _place(place: tuple[Address, int] | None) -> str:
    if place is None:
        return ""
    address, port = place
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _joined(networks: Iterable[Network]) -> str:
    return ",".join(map(str, networks))


def _duration(seconds: int) -> str:
    """Return a time as Go writes it: ``24h0m0s``."""
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours:
        return f"{hours}h{minutes}m{seconds % 60}s"
    return f"{minutes}m{seconds % 60}s" if minutes else f"{seconds}s"
