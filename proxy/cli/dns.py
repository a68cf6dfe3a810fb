"""`vipd dns`: the cluster's DNS server, alone or as it runs in the daemon."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from vipd.proxy.cli.dns_query import query
from vipd.proxy.cli.options import (
    flags,
    json_option,
    kubeconfig_option,
    log_format_option,
    socket_option,
)
from vipd.proxy.words import counted

if TYPE_CHECKING:
    from vipd.dns.server.messages import Told
    from vipd.dns.server.service import DnsStatus
    from vipd.dns.settings import Listen


@click.group()
def dns() -> None:
    """The built-in DNS server: names of services, answered from the same data as the dataplane."""


dns.add_command(query)


@dns.command()
@click.option(
    "-f",
    "--manifests",
    multiple=True,
    metavar="PATH",
    help="File or folder of manifests, or - for standard input once. Repeatable.",
)
@kubeconfig_option
@click.option(
    "--listen",
    "dns_listen",
    multiple=True,
    metavar="ADDR:PORT",
    help="Where to answer, over UDP and TCP; :53 where no port is said. Repeatable.",
)
@click.option(
    "--cluster-domain",
    multiple=True,
    metavar="NAME",
    help="Domain that services' names end in. Repeatable. Default: cluster.local.",
)
@click.option(
    "--allow",
    "dns_allow",
    multiple=True,
    metavar="CIDR",
    help="Who may ask beside this host, the cluster's nodes and pods. Repeatable.",
)
@click.option("--workers", "dns_workers", type=int, metavar="N", help="Processes. Default: 1.")
@click.option(
    "--config",
    metavar="FILE",
    help="File of kind VipdConfiguration or KubeProxyConfiguration; section dns is followed.",
)
@click.option("--cluster-cidr", metavar="CIDR[,CIDR]", help="Pod networks: they may ask.")
@click.option("--service-cidr", metavar="CIDR[,CIDR]", help="Ranges of cluster IPs.")
@log_format_option
@click.argument("more", nargs=-1, metavar="[PATH]…")
def serve(
    manifests: tuple[str, ...],
    more: tuple[str, ...],
    **told: Any,
) -> None:
    """Answer the names of manifests' services, without a dataplane.

    Needs no root where the port allows. Files are watched. Ends with SIGTERM.

    Try it: vipd dns serve -f examples --listen 127.0.0.1:5353
    """
    import asyncio

    from vipd.dns.server import alone
    from vipd.proxy import logs
    from vipd.proxy.cli.source import source
    from vipd.proxy.config import load
    from vipd.proxy.errors import ConfigError

    if more and not manifests:
        raise click.UsageError(f"unexpected argument {more[0]!r}; did you mean --manifests?")
    said = flags((*manifests, *more), **told)
    config = load(said)
    if not config.dns.listen:
        raise ConfigError("--listen", "say where to answer, such as --listen 127.0.0.1:5353")
    logs.configure(config.log_format)
    chosen = source(config, node=False)
    asyncio.run(alone.serve(config, chosen, _tell_ready, said))


@dns.command()
@socket_option
@json_option
def status(socket: str | None, as_json: bool) -> None:
    """Say how the daemon's DNS is. Exit code 3 where it does not answer from what it should."""
    import sys

    import msgspec

    from vipd.proxy.cli.dns_views import is_degraded, status_view
    from vipd.proxy.cli.main import DEGRADED
    from vipd.proxy.cli.output import print_json
    from vipd.proxy.config import DEFAULT_SOCKET

    told = _status(socket if socket is not None else DEFAULT_SOCKET)
    if as_json:
        print_json(msgspec.json.encode(status_view(told)))
    else:
        for line in _status_lines(told):
            click.echo(line)
    if is_degraded(told):
        sys.exit(DEGRADED)


def _status(socket: str) -> "DnsStatus":
    """Return what the daemon says, or without one the workers that it has left."""
    import asyncio
    from pathlib import Path

    import msgspec

    from vipd.dns.server.service import DnsStatus, status_without_daemon
    from vipd.proxy.control import read
    from vipd.proxy.errors import ControlError

    try:
        return msgspec.json.decode(read(socket, "dns"), type=DnsStatus)
    except ControlError:
        told = asyncio.run(status_without_daemon(Path(socket).parent))
        if told is None:
            raise
        click.echo("no daemon: its workers go on with what they know", err=True)
        return told


def _status_lines(told: "DnsStatus") -> Iterator[str]:
    from vipd.proxy.cli.dns_views import silent_of
    from vipd.proxy.status import places

    yield f"answers on   {places(told.listens, told.elsewhere) or 'nothing: see --dns-listen'}"
    if told.listens:
        yield f"metrics      {', '.join(told.http) or 'nowhere: see dns.http'}"
    for one in told.workers:
        yield from _worker_lines(one)
    for number in silent_of(told):
        yield f"worker {number}     does not answer"
    for line in _upstream_lines(told.workers):
        yield f"upstream     {line}"
    if told.restarts:
        yield f"restarts     {told.restarts}"
    if told.refused:
        yield f"refused      {told.refused}; the configuration before stays"
    if told.restart_needed:
        yield f"next start   {', '.join(told.restart_needed)} changed, and cannot be taken now"


def _worker_lines(one: "Told") -> Iterator[str]:
    names = counted(one.services, "service") if one.synced else "cluster not known yet"
    stale = "" if one.stale_seconds is None else f", stale for {one.stale_seconds:.0f} s"
    yield f"worker {one.number}     pid {one.pid}, {names}, told {one.fed_seconds:.0f} s ago{stale}"
    questions = sum(one.types.values())
    denied, failed = one.rcodes.get("NXDOMAIN", 0), one.rcodes.get("SERVFAIL", 0)
    yield f"  questions  {questions}; {denied} of names that do not exist, {failed} failed"
    lost = one.counters.get("udp_dropped_full", 0)
    refused = one.counters.get("sources_refused", 0)
    if lost or refused:
        yield f"  turned away {lost} for lack of room, {refused} of sources that may not ask"
    if one.connections or one.waiting:
        is_open = counted(one.connections, "TCP connection")
        yield f"  open       {is_open}, questions that wait: {one.waiting}"
    if unlogged := one.counters.get("query_log_dropped", 0):
        lines = counted(int(unlogged), "line")
        yield f"  query log  {lines} lost, as nobody took them in time"


def _upstream_lines(workers: "Sequence[Told]") -> Iterator[str]:
    """Say how each upstream is; where workers do not agree, as the one that thinks worst of it."""
    from vipd.proxy.cli.dns_views import upstreams

    words = {
        "looping": "left out: it asks this server what it is asked",
        "not heard yet": "has not answered yet",
        "up": "answers",
    }
    for one in upstreams(workers):
        seconds = one.round_trip_seconds
        after = "" if seconds is None else f", after {seconds * 1000:.1f} ms"
        yield f"{one.address} {words.get(one.state, one.state)}{after}"


def _tell_ready(listens: "Sequence[Listen]") -> None:
    click.echo(f"answers on {', '.join(map(str, listens))}")
