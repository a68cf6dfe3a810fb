"""`vipd dns`: the cluster's DNS server, alone or as it runs in the daemon."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from vipd.proxy.cli.dns_query import query
from vipd.proxy.cli.options import flags, json_option, kubeconfig_option, socket_option
from vipd.proxy.words import counted

if TYPE_CHECKING:
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
@click.option("--config", metavar="FILE", help="File of kind VipdConfiguration; its section dns.")
@click.option("--cluster-cidr", metavar="CIDR[,CIDR]", help="Pod networks: they may ask.")
@click.option("--service-cidr", metavar="CIDR[,CIDR]", help="Ranges of cluster IPs.")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    help="How log lines are written to standard error. Default: text.",
)
@click.argument("more", nargs=-1, metavar="[PATH]…")
def serve(
    manifests: tuple[str, ...],
    more: tuple[str, ...],
    log_format: str,
    **told: Any,
) -> None:
    """Answer the names of manifests' services, without a dataplane.

    Needs no root where the port allows. Files are watched. Ends with SIGTERM.

    Try it: vipd dns serve -f examples --listen 127.0.0.1:5353
    """
    import asyncio

    from vipd.dns.server import alone
    from vipd.proxy import logs
    from vipd.proxy.config import load
    from vipd.proxy.errors import ConfigError
    from vipd.proxy.sources.chosen import source

    if more and not manifests:
        raise click.UsageError(f"unexpected argument {more[0]!r}; did you mean --manifests?")
    config = load(flags((*manifests, *more), **told))
    if not config.dns.listen:
        raise ConfigError("--listen", "say where to answer, such as --listen 127.0.0.1:5353")
    logs.configure(log_format)
    chosen = source(config, node=False)
    node = config.node
    asyncio.run(
        alone.serve(config.dns, chosen, node.cluster_cidrs, node.service_cidrs, _tell_ready)
    )


@dns.command()
@socket_option
@json_option
def status(socket: str | None, as_json: bool) -> None:
    """Say how the daemon's DNS is. Exit code 3 where it does not answer from what it should."""
    import sys

    import msgspec

    from vipd.dns.server.service import DnsStatus
    from vipd.proxy.cli.main import DEGRADED
    from vipd.proxy.cli.output import print_json
    from vipd.proxy.config import DEFAULT_SOCKET
    from vipd.proxy.control import read

    document = read(socket if socket is not None else DEFAULT_SOCKET, "dns")
    told = msgspec.json.decode(document, type=DnsStatus)
    if as_json:
        print_json(document)
    else:
        for line in _status_lines(told):
            click.echo(line)
    if told.listens and not all(one.synced for one in told.workers):
        sys.exit(DEGRADED)


def _status_lines(told: "DnsStatus") -> Iterator[str]:
    yield f"answers on   {', '.join(told.listens) or 'nothing: see --dns-listen'}"
    for one in told.workers:
        names = counted(one.services, "service") if one.synced else "cluster not known yet"
        questions = sum(one.types.values())
        denied = one.rcodes.get("NXDOMAIN", 0)
        failed = one.rcodes.get("SERVFAIL", 0)
        yield f"worker {one.number}     pid {one.pid}, {names}, told {one.fed_seconds:.0f} s ago"
        yield f"  questions  {questions}; {denied} of names that do not exist, {failed} failed"
        lost = one.counters.get("udp_dropped_full", 0)
        refused = one.counters.get("sources_refused", 0)
        if lost or refused:
            yield f"  turned away {lost} for lack of room, {refused} of sources that may not ask"
        if one.connections or one.waiting:
            is_open = counted(one.connections, "TCP connection")
            yield f"  open       {is_open}, questions that wait: {one.waiting}"
    if told.restarts:
        yield f"restarts     {told.restarts}"


def _tell_ready(listens: "Sequence[Listen]") -> None:
    click.echo(f"answers on {', '.join(map(str, listens))}")
