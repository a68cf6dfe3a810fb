"""Configuration: the file ``kind: VipdConfiguration``, the flags of `vipd run`, and their defaults.

Lives here: reading and checking of settings; flags win over the file. Must not: act on them. Every
problem is a ConfigError that names the file and field, or the flag.
"""

import os
import re
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType, structs

from vipd.backends.registry import AUTO, MODES
from vipd.dns.settings import DnsSettings, listens
from vipd.dns.settings import problems as dns_problems
from vipd.proxy.durations import parse_duration
from vipd.proxy.errors import ConfigError
from vipd.proxy.model import SCHEDULERS
from vipd.proxy.names import Address, Network, family_of, parse_address, parse_network
from vipd.proxy.settings import (
    ConntrackSettings,
    DataplaneSettings,
    DetectLocal,
    HttpSettings,
    IpvsSettings,
    NodeSettings,
    UserspaceSettings,
)
from vipd.proxy.sources.documents import DocumentError, documents, items

API_VERSION = "vipd/v1alpha1"
KIND = "VipdConfiguration"
DEFAULT_SOCKET = "/run/vipd/vipd.sock"
LONGEST_DRAIN_SECONDS = 86400
MOST_WORKERS = 256
LONGEST_IPVS_SECONDS = 2_147_483
"""31 bits of jiffies, of which there are up to 1,000 a second (ip_vs_ctl.c: ip_vs_set_timeout)."""

_INTERFACE = re.compile(r"[A-Za-z0-9._-]+")
T = TypeVar("T")


class Flags(Struct, frozen=True, kw_only=True):
    """What the command line said; None is not said. Texts as typed, lists comma separated."""

    config: str | None = None
    manifests: tuple[str, ...] = ()
    kubeconfig: str | None = None
    mode: str | None = None
    node_name: str | None = None
    node_ip: str | None = None
    cluster_cidr: str | None = None
    service_cidr: str | None = None
    node_port_addresses: str | None = None
    masquerade_all: bool | None = None
    ipvs_scheduler: str | None = None
    drain: str | None = None
    socket: str | None = None
    dns_listen: tuple[str, ...] = ()
    cluster_domain: tuple[str, ...] = ()
    dns_allow: tuple[str, ...] = ()
    dns_workers: int | None = None


class DetectLocalSection(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """``detectLocal``: what the interface modes look for."""

    bridge_interface: str = ""
    """Name of the bridge that pods hang on, for BridgeInterface."""
    interface_name_prefix: str = ""
    """Prefix of the names of pod interfaces, for InterfaceNamePrefix."""


class IpvsSection(
    Struct,
    frozen=True,
    rename={
        "tcp_timeout": "tcpTimeout",
        "tcp_fin_timeout": "tcpFinTimeout",
        "udp_timeout": "udpTimeout",
        "strict_arp": "strictARP",
    },
    forbid_unknown_fields=True,
):
    """``ipvs``: the fields of kube-proxy's section of that name; times as ``15m0s``."""

    scheduler: str = ""
    """Empty: rr."""
    tcp_timeout: str = "0s"
    tcp_fin_timeout: str = "0s"
    udp_timeout: str = "0s"
    strict_arp: bool = False


class UserspaceSection(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    """``userspace``: settings of that mode."""

    workers: int = 0
    """0: one for each processor."""
    transparent: bool = False
    """Whether endpoints on this node see their clients' addresses."""
    transparent_bit: int = UserspaceSettings().transparent_bit
    """Bit of the packet mark that their answers get."""


class VipdConfiguration(
    Struct,
    rename={
        "cluster_cidrs": "clusterCIDRs",
        "service_cidrs": "serviceCIDRs",
        "node_ips": "nodeIPs",
        "api_version": "apiVersion",
        "node_name": "nodeName",
        "node_port_addresses": "nodePortAddresses",
        "masquerade_all": "masqueradeAll",
        "masquerade_bit": "masqueradeBit",
        "detect_local_mode": "detectLocalMode",
        "detect_local": "detectLocal",
        "drain_seconds": "drainSeconds",
    },
    forbid_unknown_fields=True,
):
    """The file's shape. Unknown fields are errors: a typo must not be silent."""

    api_version: str = API_VERSION
    kind: str = KIND
    mode: str = AUTO
    """Dataplane, or ``auto``, the default: the first that works on this host."""
    manifests: list[str] = []
    """Files and folders with manifests; relative to the current directory."""
    kubeconfig: str = ""
    """File that leads to the API server. Default without manifests: what a pod is given."""
    node_name: str | None = None
    """Default: the host name in lower case."""
    node_ips: list[str] = []
    """This node's addresses. Default: those of its Node object."""
    cluster_cidrs: list[str] = []
    """Pod networks, at most one of each family."""
    service_cidrs: list[str] = []
    """Ranges of cluster IPs; unallocated addresses in them are dropped."""
    detect_local_mode: DetectLocal = DetectLocal.CLUSTER_CIDR
    detect_local: DetectLocalSection = DetectLocalSection()
    masquerade_all: bool = False
    masquerade_bit: int = 14
    node_port_addresses: list[str] | UnsetType = UNSET
    """CIDRs of own addresses that answer node ports, or ``primary``, the default."""
    ipvs: IpvsSection = IpvsSection()
    userspace: UserspaceSection = UserspaceSection()
    drain_seconds: int = DataplaneSettings().drain_seconds
    dns: DnsSettings = DnsSettings()
    socket: str = DEFAULT_SOCKET
    """Path of the control socket."""


class Config(Struct, frozen=True, kw_only=True):
    """Everything the daemon was told, checked."""

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


def load(flags: Flags) -> Config:
    """Return the configuration from flags and the file they name. Raise ConfigError."""
    return checked(flags, read(flags))


def read(flags: Flags) -> VipdConfiguration:
    """Return what the file says that flags name, or the defaults. Raise ConfigError."""
    return VipdConfiguration() if flags.config is None else _read(flags.config)


def checked(flags: Flags, told: VipdConfiguration) -> Config:
    """Return the configuration from flags and what their file says. Raise ConfigError."""
    origin = flags.config or ""

    def pick(flag_name: str, flag: T | None, field: str, value: T) -> tuple[str, T]:
        """Return the value that counts, and where it came from."""
        return (f"{origin}: {field}", value) if flag is None else (flag_name, flag)

    where, mode = pick("--mode", flags.mode, "mode", told.mode)
    if mode not in (AUTO, *MODES):
        raise ConfigError(where, f"{mode!r} is no mode; there is: {', '.join((AUTO, *MODES))}")
    where, name = pick("--node-name", flags.node_name, "nodeName", told.node_name)
    node_name = (name if name is not None else socket.gethostname()).strip().lower()
    if not node_name:
        raise ConfigError(where, "must not be empty")
    where, cidrs = pick(
        "--cluster-cidr", _listed(flags.cluster_cidr), "clusterCIDRs", told.cluster_cidrs
    )
    cluster_cidrs = _networks(where, cidrs)
    if len({family_of(one) for one in cluster_cidrs}) < len(cluster_cidrs):
        raise ConfigError(where, "at most one range of each IP family")
    where, cidrs = pick(
        "--service-cidr", _listed(flags.service_cidr), "serviceCIDRs", told.service_cidrs
    )
    service_cidrs = _networks(where, cidrs)
    where, ips = pick("--node-ip", _listed(flags.node_ip), "nodeIPs", told.node_ips)
    node_ips = _addresses(where, ips)
    told_addresses = (
        None if isinstance(told.node_port_addresses, UnsetType) else (told.node_port_addresses)
    )
    where, ranges = pick(
        "--nodeport-addresses",
        _listed(flags.node_port_addresses),
        "nodePortAddresses",
        told_addresses or ["primary"],
    )
    dns = _dns(origin, told.dns, flags)
    masquerade_all = told.masquerade_all if flags.masquerade_all is None else flags.masquerade_all
    if not 0 <= told.masquerade_bit <= 31:
        raise ConfigError(f"{origin}: masqueradeBit", "must be between 0 and 31")
    manifests, kubeconfig = _sources(origin, told, flags)
    return Config(
        mode=mode,
        manifests=manifests,
        kubeconfig=kubeconfig,
        socket=flags.socket if flags.socket is not None else told.socket,
        node=NodeSettings(
            node_name=node_name,
            node_ips=node_ips,
            detect_local=told.detect_local_mode,
            cluster_cidrs=cluster_cidrs,
            local_interface=_local_interface(origin, told),
            masquerade_all=masquerade_all,
            masquerade_bit=told.masquerade_bit,
            node_port_addresses=None if ranges in ([], ["primary"]) else _networks(where, ranges),
            service_cidrs=service_cidrs,
            dns_listens=frozenset((one.address, one.port) for one in listens(dns)),
        ),
        dataplane=_dataplane(origin, told, flags),
        dns=dns,
    )


def _sources(origin: str, told: VipdConfiguration, flags: Flags) -> tuple[tuple[str, ...], str]:
    """Return manifests and kubeconfig, of which there is one; flags say which before the file."""
    said = (flags.manifests, flags.kubeconfig or "")
    if said == ((), ""):
        said = (tuple(told.manifests), told.kubeconfig)
        if all(said):
            why = "does not go with manifests: there is one source"
            raise ConfigError(f"{origin}: kubeconfig", why)
    if all(said):
        raise ConfigError("--kubeconfig", "does not go with --manifests: there is one source")
    return said


def _dataplane(origin: str, told: VipdConfiguration, flags: Flags) -> DataplaneSettings:
    where, scheduler = f"{origin}: ipvs.scheduler", told.ipvs.scheduler
    if flags.ipvs_scheduler is not None:
        where, scheduler = "--ipvs-scheduler", flags.ipvs_scheduler
    scheduler = scheduler or IpvsSettings().scheduler
    if scheduler not in SCHEDULERS:
        why = f"{scheduler!r} is no IPVS scheduler; there is: {', '.join(SCHEDULERS)}"
        raise ConfigError(where, why)
    if flags.drain is not None:
        drain = _seconds("--drain", flags.drain, LONGEST_DRAIN_SECONDS)
    elif 0 <= told.drain_seconds <= LONGEST_DRAIN_SECONDS:
        drain = told.drain_seconds
    else:
        why = f"must be between 0 and {LONGEST_DRAIN_SECONDS}"
        raise ConfigError(f"{origin}: drainSeconds", why)

    def timeout(field: str, text: str) -> int:
        return _seconds(f"{origin}: ipvs.{field}", text, LONGEST_IPVS_SECONDS)

    return DataplaneSettings(
        ipvs=IpvsSettings(
            scheduler=scheduler,
            tcp_timeout=timeout("tcpTimeout", told.ipvs.tcp_timeout),
            tcp_fin_timeout=timeout("tcpFinTimeout", told.ipvs.tcp_fin_timeout),
            udp_timeout=timeout("udpTimeout", told.ipvs.udp_timeout),
            strict_arp=told.ipvs.strict_arp,
        ),
        userspace=_userspace(origin, told),
        drain_seconds=drain,
    )


def _userspace(origin: str, told: VipdConfiguration) -> UserspaceSettings:
    section = told.userspace
    if not 0 <= section.workers <= MOST_WORKERS:
        why = f"{section.workers} is not between 0 and {MOST_WORKERS}"
        raise ConfigError(f"{origin}: userspace.workers", why)
    where = f"{origin}: userspace.transparentBit"
    if not 0 <= section.transparent_bit <= 31:
        raise ConfigError(where, f"{section.transparent_bit} is not between 0 and 31")
    if section.transparent and section.transparent_bit == told.masquerade_bit:
        raise ConfigError(where, f"{section.transparent_bit} is the masqueradeBit, too")
    return UserspaceSettings(
        workers=section.workers,
        transparent=section.transparent,
        transparent_bit=section.transparent_bit,
    )


def _dns(origin: str, told: DnsSettings, flags: Flags) -> DnsSettings:
    """Return the section, with what flags say instead; raise ConfigError for its first problem."""
    said: dict[str, tuple[str, object]] = {
        "listen": ("--dns-listen", flags.dns_listen),
        "domains": ("--cluster-domain", flags.cluster_domain),
        "allow": ("--allow", flags.dns_allow),
        "workers": ("--workers", flags.dns_workers),
    }
    given = {
        field: (flag, value) for field, (flag, value) in said.items() if value not in ((), None)
    }
    settings = structs.replace(told, **{field: value for field, (_, value) in given.items()})
    for problem in dns_problems(settings):
        field = re.sub(r"\W.*", "", problem.field)
        where = given[field][0] if field in given else f"{origin}: dns.{problem.field}"
        raise ConfigError(where, problem.reason)
    return settings


def _seconds(where: str, text: str, longest: int) -> int:
    """Return a time in whole seconds, which is what the kernel counts in."""
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        raise ConfigError(where, str(error)) from error
    if seconds != int(seconds) or seconds > longest:
        raise ConfigError(where, f"{text!r} is not whole seconds up to {longest}s")
    return int(seconds)


def _read(path: str) -> VipdConfiguration:
    try:
        content = Path(path).read_bytes()
        texts = [item.raw for document in documents(content) for item in items(document)]
    except OSError as error:
        raise ConfigError("--config", f"{path}: {os.strerror(error.errno or 0)}") from error
    except DocumentError as error:
        raise ConfigError(path, str(error)) from error
    found = []
    for document in texts:
        try:
            head = msgspec.json.decode(document)
            if not isinstance(head, dict) or head.get("kind") != KIND:
                kind = head.get("kind") if isinstance(head, dict) else type(head).__name__
                raise ConfigError(path, f"kind is {kind!r}, not {KIND}")
            if head.get("apiVersion") != API_VERSION:
                raise ConfigError(f"{path}: apiVersion", f"must be {API_VERSION}")
            found.append(msgspec.json.decode(document, type=VipdConfiguration))
        except msgspec.DecodeError as error:
            why, _, field = str(error).rpartition(" - at `")
            where = field.rstrip("`").removeprefix("$").removeprefix(".") if why else ""
            raise ConfigError(f"{path}: {where}" if where else path, why or str(error)) from error
    if len(found) != 1:
        raise ConfigError(path, f"holds {len(found)} documents of kind {KIND}, not one")
    return found[0]


def _local_interface(origin: str, told: VipdConfiguration) -> str:
    match told.detect_local_mode:
        case DetectLocal.BRIDGE_INTERFACE:
            field, name = "detectLocal.bridgeInterface", told.detect_local.bridge_interface
        case DetectLocal.INTERFACE_NAME_PREFIX:
            field, name = "detectLocal.interfaceNamePrefix", told.detect_local.interface_name_prefix
        case _:
            return ""
    # The kernel's limit is 15 characters (IFNAMSIZ); a prefix gets a star. It goes to nft as is.
    longest = 14 if told.detect_local_mode is DetectLocal.INTERFACE_NAME_PREFIX else 15
    if not 0 < len(name) <= longest or not _INTERFACE.fullmatch(name):
        raise ConfigError(f"{origin}: {field}", f"{name!r} is no interface name")
    return name


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [one.strip() for one in text.split(",") if one.strip()]


def _networks(where: str, texts: Sequence[str]) -> tuple[Network, ...]:
    return tuple(_parsed(where, text, parse_network, "CIDR") for text in texts)


def _addresses(where: str, texts: Sequence[str]) -> tuple[Address, ...]:
    return tuple(_parsed(where, text, parse_address, "address") for text in texts)


def _parsed(where: str, text: str, parse: Callable[[str], T], what: str) -> T:
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(where, f"{text!r} is no {what}") from error
