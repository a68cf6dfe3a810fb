"""What the command line says, in the words of the configuration file.

Lives here: the flags of `vipd run`, vipd's own and kube-proxy's, and which field each of them is.
Must not: parse a command line (cli/options.py), or check a value.
"""

from msgspec import Struct

from vipd.proxy.config.fields import Said, Sayings
from vipd.proxy.config.notes import Note
from vipd.proxy.durations import whole_seconds
from vipd.proxy.errors import ConfigError


class Flags(Struct, frozen=True, kw_only=True):
    """What the command line said; None is not said. Texts as typed, lists comma separated."""

    config: str | None = None
    manifests: tuple[str, ...] = ()
    kubeconfig: str | None = None
    mode: str | None = None
    node_name: str | None = None
    node_ip: str | None = None
    bind_address: str | None = None
    cluster_cidr: str | None = None
    service_cidr: str | None = None
    node_port_addresses: str | None = None
    detect_local_mode: str | None = None
    pod_bridge_interface: str | None = None
    pod_interface_name_prefix: str | None = None
    masquerade_all: bool | None = None
    iptables_masquerade_bit: int | None = None
    ipvs_scheduler: str | None = None
    ipvs_strict_arp: bool | None = None
    ipvs_tcp_timeout: str | None = None
    ipvs_tcpfin_timeout: str | None = None
    ipvs_udp_timeout: str | None = None
    conntrack_max_per_core: int | None = None
    conntrack_min: int | None = None
    conntrack_tcp_timeout_established: str | None = None
    conntrack_tcp_timeout_close_wait: str | None = None
    conntrack_tcp_be_liberal: bool | None = None
    conntrack_udp_timeout: str | None = None
    conntrack_udp_timeout_stream: str | None = None
    healthz_bind_address: str | None = None
    healthz_port: int | None = None
    metrics_bind_address: str | None = None
    metrics_port: int | None = None
    bind_address_hard_fail: bool | None = None
    oom_score_adj: int | None = None
    feature_gates: str | None = None
    drain: str | None = None
    socket: str | None = None
    log_format: str | None = None
    dns_listen: tuple[str, ...] = ()
    cluster_domain: tuple[str, ...] = ()
    dns_allow: tuple[str, ...] = ()
    dns_workers: int | None = None
    without_effect: tuple[tuple[str, str], ...] = ()
    """Flags of kube-proxy that were given and change nothing: name, and what happens instead."""


EXTERNAL_IPS_GATE = "AllowServiceExternalIPs"
"""The one feature gate of kube-proxy that is a setting here (KEP-5707)."""
INSTEAD_OF_GATE = "there is no such gate; what vipd has is there for good"

# attribute → (flag, field of VipdConfiguration)
_TEXTS = {
    "mode": ("--mode", "mode"),
    "node_name": ("--node-name", "nodeName"),
    "detect_local_mode": ("--detect-local-mode", "detectLocalMode"),
    "pod_bridge_interface": ("--pod-bridge-interface", "detectLocal.bridgeInterface"),
    "pod_interface_name_prefix": (
        "--pod-interface-name-prefix",
        "detectLocal.interfaceNamePrefix",
    ),
    "ipvs_scheduler": ("--ipvs-scheduler", "ipvs.scheduler"),
    "ipvs_tcp_timeout": ("--ipvs-tcp-timeout", "ipvs.tcpTimeout"),
    "ipvs_tcpfin_timeout": ("--ipvs-tcpfin-timeout", "ipvs.tcpFinTimeout"),
    "ipvs_udp_timeout": ("--ipvs-udp-timeout", "ipvs.udpTimeout"),
    "conntrack_tcp_timeout_established": (
        "--conntrack-tcp-timeout-established",
        "conntrack.tcpEstablishedTimeout",
    ),
    "conntrack_tcp_timeout_close_wait": (
        "--conntrack-tcp-timeout-close-wait",
        "conntrack.tcpCloseWaitTimeout",
    ),
    "conntrack_udp_timeout": ("--conntrack-udp-timeout", "conntrack.udpTimeout"),
    "conntrack_udp_timeout_stream": (
        "--conntrack-udp-timeout-stream",
        "conntrack.udpStreamTimeout",
    ),
    "socket": ("--socket", "socket"),
    "log_format": ("--log-format", "logFormat"),
}
"""Texts; an empty one says nothing, as in kube-proxy."""
_VALUES = {
    "masquerade_all": ("--masquerade-all", "masqueradeAll"),
    "ipvs_strict_arp": ("--ipvs-strict-arp", "ipvs.strictARP"),
    "conntrack_max_per_core": ("--conntrack-max-per-core", "conntrack.maxPerCore"),
    "conntrack_min": ("--conntrack-min", "conntrack.min"),
    "conntrack_tcp_be_liberal": ("--conntrack-tcp-be-liberal", "conntrack.tcpBeLiberal"),
    "bind_address_hard_fail": ("--bind-address-hard-fail", "http.mustBind"),
    "oom_score_adj": ("--oom-score-adj", "oomScoreAdj"),
    "dns_workers": ("--workers", "dns.workers"),
}
_LISTS = {
    "node_ip": ("--node-ip", "nodeIPs"),
    "cluster_cidr": ("--cluster-cidr", "clusterCIDRs"),
    "service_cidr": ("--service-cidr", "serviceCIDRs"),
    "node_port_addresses": ("--nodeport-addresses", "nodePortAddresses"),
}
"""Texts with commas."""
_REPEATED = {
    "manifests": ("--manifests", "manifests"),
    "dns_listen": ("--dns-listen", "dns.listen"),
    "cluster_domain": ("--cluster-domain", "dns.domains"),
    "dns_allow": ("--allow", "dns.allow"),
}


def sayings(flags: Flags, wrong: list[ConfigError]) -> dict[str, Said]:
    """Return what the flags say, but for those whose meaning depends on the mode.

    What cannot be read is added to `wrong`.
    """
    found: dict[str, Said] = {}
    for table in (_TEXTS, _REPEATED):
        for attribute, (flag, path) in table.items():
            if value := getattr(flags, attribute):
                found[path] = Said(value, flag)
    for attribute, (flag, path) in _VALUES.items():
        if (value := getattr(flags, attribute)) is not None:
            found[path] = Said(value, flag)
    for attribute, (flag, path) in _LISTS.items():
        if (text := getattr(flags, attribute)) is not None:
            found[path] = Said(listed(text), flag)
    if flags.kubeconfig:
        found["kubeconfig"] = Said(flags.kubeconfig, "--kubeconfig")
    if flags.drain is not None:
        try:
            found["drainSeconds"] = Said(whole_seconds(flags.drain), "--drain")
        except ValueError as error:
            wrong.append(ConfigError("--drain", str(error)))
    if flags.bind_address and "nodeIPs" not in found and not is_unspecified(flags.bind_address):
        found["nodeIPs"] = Said([flags.bind_address], "--bind-address")
    for gate, is_on in gates(flags.feature_gates or "", wrong).items():
        if gate == EXTERNAL_IPS_GATE:
            found["serveExternalIPs"] = Said(is_on, "--feature-gates")
    found.update(_http("healthz", flags.healthz_bind_address, flags.healthz_port))
    found.update(_http("metrics", flags.metrics_bind_address, flags.metrics_port))
    return found


def _http(name: str, address: str | None, port: int | None) -> Sayings:
    """Return where a server listens; a port alone is of use only where it is 0, as in kube-proxy:
    another counts where the address has none.
    """
    path = f"http.{name}"
    if port == 0:
        return {path: Said("", f"--{name}-port")}
    if address is None:
        return {}
    text = f"{_bracketed(address)}:{port}" if port and has_no_port(address) else address
    return {path: Said(text, f"--{name}-bind-address")}


def gates(text: str, wrong: list[ConfigError]) -> dict[str, bool]:
    """Return feature gates by name, from ``A=true,B=false``; adds what is none to `wrong`."""
    found = {}
    for one in listed(text):
        name, equals, value = one.partition("=")
        if not equals or value.lower() not in ("true", "false"):
            wrong.append(ConfigError("--feature-gates", f"{one!r} is not NAME=true or NAME=false"))
        else:
            found[name.strip()] = value.lower() == "true"
    return found


def masquerade_bit(flags: Flags, mode: str) -> Sayings:
    """Return what --iptables-masquerade-bit says, which in mode nftables is nothing."""
    if flags.iptables_masquerade_bit is None or mode == "nftables":
        return {}
    return {"masqueradeBit": Said(flags.iptables_masquerade_bit, "--iptables-masquerade-bit")}


def notes(flags: Flags, mode: str) -> list[Note]:
    """Return the flags that were given and change nothing."""
    found = [Note(flag, instead) for flag, instead in flags.without_effect]
    found += [
        Note(f"--feature-gates {gate}", INSTEAD_OF_GATE)
        for gate in gates(flags.feature_gates or "", [])
        if gate != EXTERNAL_IPS_GATE
    ]
    if flags.iptables_masquerade_bit is not None and mode == "nftables":
        found.append(Note("--iptables-masquerade-bit", "the mode is nftables: see masqueradeBit"))
    for name in ("healthz", "metrics"):
        address = getattr(flags, f"{name}_bind_address")
        if getattr(flags, f"{name}_port") and (address is None or not has_no_port(address)):
            why = f"counts only with --{name}-bind-address without a port, as in kube-proxy"
            found.append(Note(f"--{name}-port", why))
    return found


def listed(text: str) -> list[str]:
    """Return what stands between commas."""
    return [one.strip() for one in text.split(",") if one.strip()]


def is_unspecified(address: str) -> bool:
    """Return whether an address is that of every interface."""
    return address.strip() in ("0.0.0.0", "::")


def has_no_port(text: str) -> bool:
    """Return whether a text is an address alone, of either family."""
    return text.endswith("]") if text.startswith("[") else text.count(":") != 1


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address and not address.startswith("[") else address
