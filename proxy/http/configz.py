"""/configz: the configuration in effect, as kube-proxy tells it, and as vipd has it.

Lives here: the two forms. Pure. Must not: tell a credential; of a kubeconfig only the path is known
here.
Source: kubeproxy.config.k8s.io/v1alpha1 (staging/src/k8s.io/kube-proxy/config/v1alpha1/types.go).
"""

from collections.abc import Iterable

import msgspec

from vipd.proxy.config import Config
from vipd.proxy.config.effective import node_port_addresses, place
from vipd.proxy.durations import as_duration
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
    told: dict[str, object] = {
        "apiVersion": f"{COMPONENT}/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode,
        "hostnameOverride": node.node_name,
        "clientConnection": {"kubeconfig": config.kubeconfig},
        "healthzBindAddress": place(config.http.healthz),
        "metricsBindAddress": place(config.http.metrics),
        "bindAddressHardFail": config.http.must_bind,
        "clusterCIDR": _joined(node.cluster_cidrs),
        "detectLocalMode": node.detect_local.value,
        "nodePortAddresses": node_port_addresses(node),
        "iptables": masquerade,
        "nftables": masquerade,
        "ipvs": {
            "scheduler": ipvs.scheduler,
            "strictARP": ipvs.strict_arp,
            "tcpTimeout": as_duration(ipvs.tcp_timeout),
            "tcpFinTimeout": as_duration(ipvs.tcp_fin_timeout),
            "udpTimeout": as_duration(ipvs.udp_timeout),
        },
    }
    if config.oom_score_adjust is not None:
        told["oomScoreAdj"] = config.oom_score_adjust
    if conntrack is not None:
        told["conntrack"] = {
            "maxPerCore": conntrack.max_per_core,
            "min": conntrack.min,
            "tcpBeLiberal": conntrack.tcp_be_liberal,
            "tcpEstablishedTimeout": as_duration(conntrack.tcp_established_seconds),
            "tcpCloseWaitTimeout": as_duration(conntrack.tcp_close_wait_seconds),
            "udpTimeout": as_duration(conntrack.udp_seconds),
            "udpStreamTimeout": as_duration(conntrack.udp_stream_seconds),
        }
    return told


def _joined(networks: Iterable[Network]) -> str:
    return ",".join(map(str, networks))
