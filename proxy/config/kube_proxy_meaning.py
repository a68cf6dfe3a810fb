"""What a KubeProxyConfiguration means here: each field is one of VipdConfiguration, or is named.

Lives here: the translation, kube-proxy's defaults where they are not vipd's, and what happens
instead of a field that has no effect. Must not: know the file's shape beyond names, or check values
that VipdConfiguration has, too. Source: pkg/proxy/apis/config/v1alpha1 (defaults.go) and
pkg/proxy/apis/config (conversion) of kube-proxy.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from vipd.proxy.config.fields import Said
from vipd.proxy.config.flags import (
    EXTERNAL_IPS_GATE,
    INSTEAD_OF_GATE,
    is_unspecified,
    listed,
)
from vipd.proxy.config.notes import Note
from vipd.proxy.config.vipd_configuration import HEALTHZ_PORT, METRICS_PORT
from vipd.proxy.durations import parse_duration
from vipd.proxy.errors import ConfigError

DEFAULT_MODE = "iptables"
"""What an empty mode means, as in kube-proxy: firewalls and network plugins of the node are set up
for that, and chain FORWARD with policy DROP lets services' traffic pass in that mode only."""
DEFAULT_OOM_SCORE_ADJ = -999
_EVERY_OWN_ADDRESS = ("all",)

SAME = MappingProxyType(
    {
        "hostnameOverride": "nodeName",
        "clientConnection.kubeconfig": "kubeconfig",
        "detectLocalMode": "detectLocalMode",
        "detectLocal.bridgeInterface": "detectLocal.bridgeInterface",
        "detectLocal.interfaceNamePrefix": "detectLocal.interfaceNamePrefix",
        "ipvs.scheduler": "ipvs.scheduler",
        "ipvs.strictARP": "ipvs.strictARP",
        "ipvs.tcpTimeout": "ipvs.tcpTimeout",
        "ipvs.tcpFinTimeout": "ipvs.tcpFinTimeout",
        "ipvs.udpTimeout": "ipvs.udpTimeout",
        "conntrack.maxPerCore": "conntrack.maxPerCore",
        "conntrack.min": "conntrack.min",
        "conntrack.tcpEstablishedTimeout": "conntrack.tcpEstablishedTimeout",
        "conntrack.tcpCloseWaitTimeout": "conntrack.tcpCloseWaitTimeout",
        "conntrack.tcpBeLiberal": "conntrack.tcpBeLiberal",
        "conntrack.udpTimeout": "conntrack.udpTimeout",
        "conntrack.udpStreamTimeout": "conntrack.udpStreamTimeout",
        "bindAddressHardFail": "http.mustBind",
        "oomScoreAdj": "oomScoreAdj",
        "logging.format": "logFormat",
    }
)
"""Fields that mean what one of VipdConfiguration does."""
TRANSLATED = (
    "mode",
    "bindAddress",
    "clusterCIDR",
    "nodePortAddresses",
    "healthzBindAddress",
    "metricsBindAddress",
    "iptables.masqueradeBit",
    "iptables.masqueradeAll",
    "nftables.masqueradeBit",
    "nftables.masqueradeAll",
    "featureGates",
)
"""Fields that mean the same after some change."""

_JSON = "JSON is asked for, and nothing else"
_AT_ONCE = "every change is programmed at once, and nothing is programmed again without one"
_WATCHED = "the API server is followed by watches, and nothing is asked for in between"
_FEW_REQUESTS = "there is no limit: beside one watch of each kind, lists are all that is asked for"
_WINDOWS = "means something on Windows only"
_NO_LEVELS = "every log line is written; there are no levels to choose"
_UNBUFFERED = "log lines are written at once, to standard error"
WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "clientConnection.acceptContentTypes": _JSON,
        "clientConnection.contentType": _JSON,
        "clientConnection.qps": _FEW_REQUESTS,
        "clientConnection.burst": _FEW_REQUESTS,
        "logging.flushFrequency": _UNBUFFERED,
        "logging.verbosity": _NO_LEVELS,
        "logging.vmodule": _NO_LEVELS,
        "logging.options.text.splitStream": _UNBUFFERED,
        "logging.options.text.infoBufferSize": _UNBUFFERED,
        "logging.options.json.splitStream": _UNBUFFERED,
        "logging.options.json.infoBufferSize": _UNBUFFERED,
        "enableProfiling": "nothing is profiled over HTTP",
        "showHiddenMetricsForVersion": "no metric is hidden",
        "iptables.localhostNodePorts": "node ports do not answer on loopback addresses",
        "iptables.snatNodeInternalIP": "no release of kube-proxy has it; the source is that of the"
        " route",
        "iptables.syncPeriod": _AT_ONCE,
        "iptables.minSyncPeriod": _AT_ONCE,
        "ipvs.syncPeriod": _AT_ONCE,
        "ipvs.minSyncPeriod": _AT_ONCE,
        "ipvs.excludeCIDRs": "it is not needed: virtual servers that vipd has not made are left"
        " alone, whatever their address",
        "nftables.syncPeriod": _AT_ONCE,
        "nftables.minSyncPeriod": _AT_ONCE,
        "winkernel.networkName": _WINDOWS,
        "winkernel.sourceVip": _WINDOWS,
        "winkernel.enableDSR": _WINDOWS,
        "winkernel.rootHnsEndpointName": _WINDOWS,
        "winkernel.forwardHealthCheckVip": _WINDOWS,
        "configSyncPeriod": _WATCHED,
        "portRange": "kube-proxy has no use for it, either",
        "windowsRunAsService": _WINDOWS,
    }
)
"""Fields that change nothing, and what happens instead. Named where they say something."""
_STANDARD: Mapping[str, object] = MappingProxyType(
    {
        "clientConnection.contentType": "application/vnd.kubernetes.protobuf",
        "clientConnection.qps": 5.0,
        "clientConnection.burst": 10,
        "logging.flushFrequency": "5s",
        "iptables.syncPeriod": "30s",
        "iptables.minSyncPeriod": "1s",
        "ipvs.syncPeriod": "30s",
        "nftables.syncPeriod": "30s",
        "nftables.minSyncPeriod": "1s",
        "configSyncPeriod": "15m0s",
    }
)
"""kube-proxy's defaults of those, which a file that was written from its defaults has; they ask for
nothing."""


def chosen_mode(values: Mapping[str, object], said_above: str) -> str:
    """Return the mode: of what wins over the file, else the file's, else kube-proxy's default."""
    return said_above or str(values.get("mode") or DEFAULT_MODE)


def sayings(values: Mapping[str, object], origin: str, mode: str) -> dict[str, Said]:
    """Return what the file says, in fields of VipdConfiguration. `mode` is the one that counts."""

    def said(field: str, value: object) -> Said:
        return Said(value, f"{origin}: {field}")

    def default(field: str, value: object) -> Said:
        return Said(value, f"{origin}: {field} (kube-proxy's default)")

    found = {
        path: said(field, values[field])
        for field, path in SAME.items()
        if field in values and values[field] != ""
    }
    found.setdefault("oomScoreAdj", default("oomScoreAdj", DEFAULT_OOM_SCORE_ADJ))
    found.setdefault("conntrack", default("conntrack", {}))
    told_mode = values.get("mode")
    found["mode"] = said("mode", told_mode) if told_mode else default("mode", DEFAULT_MODE)
    section = _section(mode)
    for field in ("masqueradeBit", "masqueradeAll"):
        if (full := f"{section}.{field}") in values:
            found[field] = said(full, values[full])
    if cidrs := listed(str(values.get("clusterCIDR", ""))):
        found["clusterCIDRs"] = said("clusterCIDR", cidrs)
    if ranges := values.get("nodePortAddresses"):
        found["nodePortAddresses"] = said("nodePortAddresses", ranges)
    elif mode != "nftables":
        found["nodePortAddresses"] = default("nodePortAddresses", _EVERY_OWN_ADDRESS)
    gates = _gates(values)
    if EXTERNAL_IPS_GATE in gates:
        field = f"featureGates.{EXTERNAL_IPS_GATE}"
        found["serveExternalIPs"] = said(field, gates[EXTERNAL_IPS_GATE])
    bind = str(values.get("bindAddress", ""))
    if bind and not is_unspecified(bind):
        found["nodeIPs"] = said("bindAddress", [bind])
    everywhere, loopback = ("[::]", "[::1]") if ":" in bind else ("0.0.0.0", "127.0.0.1")
    for path, field, standard in (
        ("http.healthz", "healthzBindAddress", f"{everywhere}:{HEALTHZ_PORT}"),
        ("http.metrics", "metricsBindAddress", f"{loopback}:{METRICS_PORT}"),
    ):
        text = values.get(field)
        found[path] = said(field, text) if text else default(field, standard)
    return found


def wrong(values: Mapping[str, object], origin: str) -> Iterator[ConfigError]:
    """Yield what is wrong in fields that nobody else looks at."""
    for field in WITHOUT_EFFECT:
        if field.endswith("Period") and field in values:
            try:
                parse_duration(str(values[field]))
            except ValueError as error:
                yield ConfigError(f"{origin}: {field}", str(error))


def notes(values: Mapping[str, object], origin: str, mode: str) -> Iterator[Note]:
    """Yield the fields that say something and change nothing."""
    for field, instead in WITHOUT_EFFECT.items():
        if field == "iptables.localhostNodePorts":
            if mode == "iptables" and values.get(field, True):
                yield Note(f"{origin}: {field}", instead)
        elif not _is_empty(values.get(field)) and values[field] != _STANDARD.get(field):
            yield Note(f"{origin}: {field}", instead)
    if "localhost" in _listing(values.get("nodePortAddresses")):
        yield Note(f"{origin}: nodePortAddresses", WITHOUT_EFFECT["iptables.localhostNodePorts"])
    for gate in _gates(values):
        if gate != EXTERNAL_IPS_GATE:
            yield Note(f"{origin}: featureGates.{gate}", INSTEAD_OF_GATE)
    section = _section(mode)
    for other in {"iptables", "nftables"} - {section}:
        for name, standard in (("masqueradeBit", 14), ("masqueradeAll", False)):
            field = f"{other}.{name}"
            if values.get(field, standard) != standard:
                yield Note(f"{origin}: {field}", f"{section}.{name} counts: the mode is {mode}")


def _listing(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, list | tuple) else ()


def _gates(values: Mapping[str, object]) -> dict[str, bool]:
    gates = values.get("featureGates")
    return gates if isinstance(gates, dict) else {}


def _section(mode: str) -> str:
    """Return the section whose masquerade settings count, as in kube-proxy; the default mode's
    where the mode is one that kube-proxy has not.
    """
    return "nftables" if mode == "nftables" else "iptables"


def _is_empty(value: object) -> bool:
    """Return whether a value says nothing, as what kubeadm writes for what nobody said."""
    return not value or value in ("0s", "0")
