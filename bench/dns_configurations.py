"""Configurations of other name servers, so that they answer what vipd answers. Pure.

Lives here: records in each server's own form. Must not: start any. One thread each, as a worker of
vipd has; no log, no limit of rate.
"""

from collections.abc import Iterable
from pathlib import PurePath
from typing import NamedTuple

from vipd.bench.dns_cluster import TTL, Record
from vipd.bench.dns_plan import COREDNS, DNSMASQ, DOMAIN, KNOT, UNBOUND

SOA = f"ns.dns.{DOMAIN}. hostmaster.{DOMAIN}. 1 7200 1800 86400 {TTL}"


class Setup(NamedTuple):
    """Files to write, by name, and the command to run in their folder."""

    files: dict[str, str]
    command: tuple[str, ...]
    environment: dict[str, str] = {}  # noqa: RUF012 # never changed


def setup(
    variant: str, records: Iterable[Record], address: str, upstream: str, folder: PurePath
) -> Setup:
    """Return how a server is started that answers these records at an address, port 53."""
    found = tuple(records)
    if variant == DNSMASQ:
        return _dnsmasq(found, address, upstream, folder)
    made = {UNBOUND: _unbound, KNOT: _knot, COREDNS: _coredns}
    return made[variant](found, address, upstream)


def _unbound(records: tuple[Record, ...], address: str, upstream: str) -> Setup:
    lines = [
        "server:",
        f"  interface: {address}",
        "  access-control: 0.0.0.0/0 allow",
        '  chroot: ""',
        '  username: ""',
        '  pidfile: ""',
        "  directory: .",
        "  use-syslog: no",
        "  do-daemonize: no",
        "  num-threads: 1",
        '  module-config: "iterator"',
        f'  local-zone: "{DOMAIN}." static',
        f'  local-data: "{DOMAIN}. {TTL} SOA {SOA}"',
        *(f'  local-data: "{one.owner}. {TTL} {one.type} {one.data}"' for one in records),
        "remote-control:",
        "  control-enable: no",
        "forward-zone:",
        '  name: "."',
        f"  forward-addr: {upstream}",
    ]
    return Setup({"unbound.conf": _text(lines)}, ("unbound", "-d", "-p", "-c", "unbound.conf"))


def _knot(records: tuple[Record, ...], address: str, _: str) -> Setup:
    lines = [
        "server:",
        "  rundir: knot",
        f"  listen: {address}@53",
        "  udp-workers: 1",
        "  tcp-workers: 1",
        "  background-workers: 1",
        "database:",
        "  storage: knot",
        "zone:",
        f"- domain: {DOMAIN}",
        "  storage: .",
        "  file: zone",
        "  zonefile-sync: -1",
        "  journal-content: none",
    ]
    return Setup({"knot.conf": _text(lines), "zone": zone(records)}, ("knotd", "-c", "knot.conf"))


def _dnsmasq(records: tuple[Record, ...], address: str, upstream: str, folder: PurePath) -> Setup:
    """A file of hosts, which it has a hash table for; SRV records it looks through one by one."""
    hosts: list[str] = []
    lines = [
        "no-resolv",
        "no-hosts",
        "keep-in-foreground",
        "user=root",
        "pid-file=",
        f"listen-address={address}",
        "bind-interfaces",
        f"local=/{DOMAIN}/",
        f"local-ttl={TTL}",
        "cache-size=10000",
        f"server={upstream}",
        f"addn-hosts={folder}/hosts",  # it goes to / before it reads
    ]
    for one in records:
        if one.type == "A":
            hosts.append(f"{one.data} {one.owner}")
        else:
            priority, weight, port, target = one.data.split()
            lines.append(f"srv-host={one.owner},{target},{port},{priority},{weight}")
    files = {"dnsmasq.conf": _text(lines), "hosts": _text(hosts)}
    return Setup(files, ("dnsmasq", "--conf-file=dnsmasq.conf"))


def _coredns(records: tuple[Record, ...], address: str, upstream: str) -> Setup:
    """The `file` plugin: that for Kubernetes wants an API server."""
    lines = [
        f"{DOMAIN}:53 {{",
        f"    bind {address}",
        "    file zone",
        "}",
        ".:53 {",
        f"    bind {address}",
        "    cache",
        f"    forward . {upstream}",
        "}",
    ]
    files = {"Corefile": _text(lines), "zone": zone(records)}
    return Setup(files, ("coredns", "-conf", "Corefile"), {"GOMAXPROCS": "1"})


def zone(records: Iterable[Record]) -> str:
    """Return the records as a zone file (RFC 1035 5.1)."""
    lines = [f"$TTL {TTL}", f"{DOMAIN}. SOA {SOA}", f"{DOMAIN}. NS ns.dns.{DOMAIN}."]
    lines.append(f"ns.dns.{DOMAIN}. A 192.0.2.1")
    for one in records:
        data = one.data if one.type == "A" else f"{one.data}."
        lines.append(f"{one.owner}. {one.type} {data}")
    return _text(lines)


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{one}\n" for one in lines)
