"""From what is said to the configuration that counts: values are parsed and checked.

Lives here: what makes a value wrong, and defaults that depend on other settings. Must not: know
which place said something. All that is wrong is told, each with its place.
"""

import re
import socket
from collections.abc import Callable, Sequence
from ipaddress import ip_address, ip_network
from typing import TypeVar

from vipd.backends.registry import AUTO, MODES
from vipd.dns.settings import DnsSettings, listens
from vipd.dns.settings import problems as dns_problems
from vipd.proxy.config.effective import Config
from vipd.proxy.config.fields import Sayings
from vipd.proxy.config.vipd_configuration import (
    HEALTHZ_PORT,
    METRICS_PORT,
    VipdConfiguration,
)
from vipd.proxy.durations import whole_seconds
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

LONGEST_DRAIN_SECONDS = 86400
MOST_WORKERS = 256
LONGEST_KERNEL_SECONDS = 2_147_483
"""31 bits of jiffies, of which there are up to 1,000 a second (ip_vs_ctl.c: ip_vs_set_timeout;
proc_dointvec_jiffies for those of connection tracking)."""
MOST_CONNTRACK = 2**31 - 1
MOST_OOM_SCORE = 1000
FORMATS = ("text", "json")
_EVERY_RANGE = {
    "all": (ip_network("0.0.0.0/0"), ip_network("::/0")),
    "localhost": (ip_network("127.0.0.0/8"), ip_network("::1/128")),
}
"""Words that stand for ranges (kube-proxy 1.37)."""
_INTERFACE = re.compile(r"[A-Za-z0-9._-]+")
T = TypeVar("T")


class Checks:
    """Checks what sayings make; `wrong` gathers what is wrong, `file` is where the rest could be
    said.
    """

    def __init__(
        self, told: VipdConfiguration, sayings: Sayings, wrong: list[ConfigError], file: str
    ) -> None:
        self._told, self._sayings, self._wrong, self._file = told, sayings, wrong, file

    def config(self) -> Config:
        """Return the configuration; where something is wrong, with a default in its place."""
        told = self._told
        manifests, kubeconfig = self._sources()
        dns = self._dns()
        return Config(
            mode=self._one_of("mode", told.mode, (AUTO, *MODES), "mode"),
            manifests=manifests,
            kubeconfig=kubeconfig,
            socket=told.socket,
            node=self._node(dns),
            dataplane=DataplaneSettings(
                ipvs=self._ipvs(),
                userspace=self._userspace(),
                drain_seconds=self._between(
                    "drainSeconds", told.drain_seconds, 0, LONGEST_DRAIN_SECONDS
                ),
            ),
            dns=dns,
            conntrack=self._conntrack(),
            http=self._http(in_pod=not manifests and not kubeconfig),
            oom_score_adjust=None
            if told.oom_score_adj is None
            else self._between("oomScoreAdj", told.oom_score_adj, -MOST_OOM_SCORE, MOST_OOM_SCORE),
            log_format=self._one_of("logFormat", told.log_format, FORMATS, "format of log lines"),
        )

    def _say(self, path: str, why: str, inside: str = "", because: str = "") -> None:
        """Note what is wrong with a field; where nobody says it, `because` is who asks for it."""
        if path in self._sayings:
            where = self._sayings[path].where
        elif because in self._sayings and self._sayings[because].where.startswith("-"):
            where = self._sayings[because].where
        else:
            where = f"{self._file}: {path}" if self._file else path
        self._wrong.append(ConfigError(f"{where}{inside}", why))

    def _one_of(self, path: str, value: str, known: Sequence[str], what: str) -> str:
        if value not in known:
            self._say(path, f"{value!r} is no {what}; there is: {', '.join(known)}")
            return known[0]
        return value

    def _between(self, path: str, value: int, least: int, most: int) -> int:
        if not least <= value <= most:
            self._say(path, f"{value} is not between {least} and {most}")
            return least
        return value

    def _parsed(
        self, path: str, texts: Sequence[str], parse: Callable[[str], T], what: str
    ) -> list[T]:
        found = []
        for text in texts:
            try:
                found.append(parse(text))
            except ValueError:
                self._say(path, f"{text!r} is no {what}")
        return found

    def _seconds(self, path: str, text: str) -> int:
        try:
            seconds = whole_seconds(text)
        except ValueError as error:
            self._say(path, str(error))
            return 0
        if seconds > LONGEST_KERNEL_SECONDS:
            self._say(path, f"{text!r} is not up to {LONGEST_KERNEL_SECONDS}s")
            return 0
        return seconds

    def _sources(self) -> tuple[tuple[str, ...], str]:
        """Return manifests and kubeconfig, of which there is one: what is said last wins."""
        return tuple(self._told.manifests), self._told.kubeconfig

    def _node(self, dns: DnsSettings) -> NodeSettings:
        told = self._told
        name = (socket.gethostname() if told.node_name is None else told.node_name).strip().lower()
        if not name:
            self._say("nodeName", "must not be empty")
        ranges, primary = self._node_port_addresses()
        return NodeSettings(
            node_name=name,
            node_ips=tuple(self._parsed("nodeIPs", told.node_ips, parse_address, "address")),
            detect_local=told.detect_local_mode,
            cluster_cidrs=self._cluster_cidrs(),
            local_interface=self._local_interface(),
            masquerade_all=told.masquerade_all,
            masquerade_bit=self._between("masqueradeBit", told.masquerade_bit, 0, 31),
            node_port_addresses=ranges,
            node_port_primary=primary,
            serve_external_ips=told.serve_external_ips,
            service_cidrs=tuple(
                self._parsed("serviceCIDRs", told.service_cidrs, parse_network, "CIDR")
            ),
            dns_listens=_places(dns),
        )

    def _cluster_cidrs(self) -> tuple[Network, ...]:
        cidrs = self._parsed("clusterCIDRs", self._told.cluster_cidrs, parse_network, "CIDR")
        if len({family_of(one) for one in cidrs}) < len(cidrs):
            self._say("clusterCIDRs", "at most one range of each IP family")
        return tuple(cidrs)

    def _node_port_addresses(self) -> tuple[tuple[Network, ...] | None, bool]:
        """Return the ranges, None where it is the primary addresses alone, and whether these are
        added.
        """
        told = self._told.node_port_addresses
        words = [one for one in told if one != "primary"]
        if not words:
            return None, False
        ranges = [one for word in words for one in _EVERY_RANGE.get(word, ())]
        texts = [one for one in words if one not in _EVERY_RANGE]
        ranges += self._parsed("nodePortAddresses", texts, parse_network, "CIDR")
        return tuple(ranges), "primary" in told

    def _local_interface(self) -> str:
        mode, told = self._told.detect_local_mode, self._told.detect_local
        match mode:
            case DetectLocal.BRIDGE_INTERFACE:
                field, name = "detectLocal.bridgeInterface", told.bridge_interface
            case DetectLocal.INTERFACE_NAME_PREFIX:
                field, name = "detectLocal.interfaceNamePrefix", told.interface_name_prefix
            case _:
                return ""
        # The kernel's limit is 15 characters (IFNAMSIZ); a prefix gets a star. nft gets it as is.
        longest = 14 if mode is DetectLocal.INTERFACE_NAME_PREFIX else 15
        if not 0 < len(name) <= longest or not _INTERFACE.fullmatch(name):
            needed = "" if name else f", which detectLocalMode {mode.value} needs"
            self._say(field, f"{name!r} is no interface name{needed}", because="detectLocalMode")
        return name

    def _ipvs(self) -> IpvsSettings:
        told = self._told.ipvs
        scheduler = told.scheduler or IpvsSettings().scheduler
        return IpvsSettings(
            scheduler=self._one_of(
                "ipvs.scheduler", scheduler, tuple(SCHEDULERS), "IPVS scheduler"
            ),
            tcp_timeout=self._seconds("ipvs.tcpTimeout", told.tcp_timeout),
            tcp_fin_timeout=self._seconds("ipvs.tcpFinTimeout", told.tcp_fin_timeout),
            udp_timeout=self._seconds("ipvs.udpTimeout", told.udp_timeout),
            strict_arp=told.strict_arp,
        )

    def _userspace(self) -> UserspaceSettings:
        told = self._told.userspace
        bit = self._between("userspace.transparentBit", told.transparent_bit, 0, 31)
        if told.transparent and bit == self._told.masquerade_bit:
            why = f"{bit} is the masqueradeBit, too"
            self._say("userspace.transparentBit", why, because="userspace.transparent")
        return UserspaceSettings(
            workers=self._between("userspace.workers", told.workers, 0, MOST_WORKERS),
            transparent=told.transparent,
            transparent_bit=bit,
        )

    def _conntrack(self) -> ConntrackSettings | None:
        if not any(path.partition(".")[0] == "conntrack" for path in self._sayings):
            return None
        told = self._told.conntrack

        def seconds(field: str, text: str) -> int:
            return self._seconds(f"conntrack.{field}", text)

        return ConntrackSettings(
            max_per_core=self._between(
                "conntrack.maxPerCore", told.max_per_core, 0, MOST_CONNTRACK
            ),
            min=self._between("conntrack.min", told.min, 0, MOST_CONNTRACK),
            tcp_established_seconds=seconds("tcpEstablishedTimeout", told.tcp_established_timeout),
            tcp_close_wait_seconds=seconds("tcpCloseWaitTimeout", told.tcp_close_wait_timeout),
            tcp_be_liberal=told.tcp_be_liberal,
            udp_seconds=seconds("udpTimeout", told.udp_timeout),
            udp_stream_seconds=seconds("udpStreamTimeout", told.udp_stream_timeout),
        )

    def _http(self, *, in_pod: bool) -> HttpSettings:
        told = self._told.http
        healthz = told.healthz
        if in_pod and "http.healthz" not in self._sayings:
            healthz = f"0.0.0.0:{HEALTHZ_PORT}"
        return HttpSettings(
            healthz=self._place("http.healthz", healthz, HEALTHZ_PORT),
            metrics=self._place("http.metrics", told.metrics, METRICS_PORT),
            must_bind=told.must_bind,
            counts_endpoints=told.counts_endpoints,
        )

    def _place(self, path: str, text: str, port: int) -> tuple[Address, int] | None:
        if not text:
            return None
        try:
            return parse_place(text, port)
        except ValueError:
            self._say(path, f"{text!r} is no ADDRESS:PORT")
            return None

    def _dns(self) -> DnsSettings:
        told = self._told.dns
        problems = dns_problems(told)
        for one in problems:
            # Of a list or mapping the place is known as a whole; what is inside follows it.
            field = re.match(r"[\w.]*", one.field)
            base = f"dns.{field[0] if field else one.field}"
            inside = one.field[len(base) - len("dns.") :]
            said = self._sayings.get(base)
            is_flag = said is not None and said.where.startswith("-")
            self._say(base, one.reason, "" if is_flag else inside)
        return DnsSettings() if problems else told


def parse_place(text: str, default_port: int) -> tuple[Address, int]:
    """Read ``ADDRESS``, ``ADDRESS:PORT`` or ``[ADDRESS]:PORT``, as kube-proxy does.

    Raise ValueError for what is none.
    """
    host, port = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(text)
        port = rest[1:] if rest else str(default_port)
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:
        port = str(default_port)
    if not (port.isdecimal() and port.isascii() and 0 < int(port) <= 65535):
        raise ValueError(text)
    return ip_address(host), int(port)


def _places(dns: DnsSettings) -> frozenset[tuple[Address, int]]:
    return frozenset((one.address, one.port) for one in listens(dns))
