"""`vipd lab`: a playground of network namespaces, from the command line.

Lives here: the commands and how their results are printed. Must not: know how a lab is built
(vipd.bench.lab). What a command needs is imported inside it: `vipd --help` stays quick.
Exit codes: 0 done, 1 failed, 2 wrong usage; `exec` ends as the command in the lab did.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from vipd.bench.lab import HostStatus, Lab
    from vipd.proxy.names import Address

_DEFAULT_PREFIX = "vipd-lab"


def _checked_prefix(_: click.Context, __: click.Parameter, value: str) -> str:
    """Refuse a prefix that no lab can have: that is wrong usage, not a failure."""
    from vipd.bench.lab import Lab
    from vipd.bench.lab_errors import LabError

    try:
        return Lab(value).prefix
    except LabError as failure:
        raise click.BadParameter(str(failure)) from failure


_prefix = click.option(
    "--prefix",
    callback=_checked_prefix,
    default=_DEFAULT_PREFIX,
    show_default=True,
    metavar="NAME",
    help="Namespaces are called NAME-HOST; several labs can stand side by side.",
)


def _checked_address(_: click.Context, __: click.Parameter, value: str | None) -> "Address | None":
    """Return the address of an option, or refuse what is none."""
    from vipd.proxy.names import parse_address

    try:
        return None if value is None else parse_address(value)
    except ValueError as failure:
        raise click.BadParameter(f"{value!r} is not an IP address") from failure


@contextmanager
def _reported() -> Iterator[None]:
    """Turn an error of the lab into one line on standard error and exit code 1."""
    from vipd.bench.lab_errors import LabError

    try:
        yield
    except LabError as failure:
        raise click.ClickException(str(failure)) from failure


@click.group()
def lab() -> None:
    """A playground of network namespaces: a node, clients, an outside host, six pods."""


@lab.command()
@_prefix
def up(prefix: str) -> None:
    """Build the lab, or repair it; nothing happens where it is complete."""
    from vipd.bench.lab import Lab

    with _reported():
        changed = Lab(prefix).up()
    click.echo(f"lab {prefix} is up" if changed else f"lab {prefix} was up already")
    option = "" if prefix == _DEFAULT_PREFIX else f" --prefix {prefix}"
    click.echo(f"  vipd lab status{option}")
    click.echo(f"  vipd lab exec{option} client-1 curl -s http://10.244.1.21:8080/")
    click.echo("and with a daemon on the node, in another terminal, from the checkout:")
    click.echo(
        f"  vipd lab exec{option} node vipd run --manifests examples --node-name node"
        " --cluster-cidr 10.244.0.0/16,fd00:10:244::/48"
    )
    click.echo(f"  vipd lab exec{option} client-1 curl -s http://10.96.0.10/")


@lab.command()
@_prefix
def down(prefix: str) -> None:
    """Kill what runs in the lab and remove every trace of it."""
    from vipd.bench.lab import Lab

    with _reported():
        left = Lab(prefix).down()
    for namespace in left:
        click.echo(f"{namespace} was not made by this lab and is left alone", err=True)
    click.echo(f"lab {prefix} is down")


@lab.command(
    "exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@_prefix
@click.option(
    "-f",
    "--manifests",
    "manifests",
    multiple=True,
    metavar="PATH",
    help="Where variables of services come from. Default: the manifests of the daemon on the node.",
)
@click.option(
    "--namespace", metavar="NS", help="The pod's namespace. Default: of the Pod with its address."
)
@click.option(
    "--dns",
    "nameserver",
    metavar="ADDRESS",
    callback=_checked_address,
    help="Whom resolv.conf names. Default: the daemon on the node, where it answers DNS.",
)
@click.option("--bare", is_flag=True, help="No variables of services, the machine's resolv.conf.")
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(
    prefix: str,
    manifests: tuple[str, ...],
    namespace: str | None,
    nameserver: "Address | None",
    bare: bool,
    name: str,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND on the host NAME, with this terminal and standard input.

    On a pod it finds what a container finds: the variables of `vipd env`, and where a DNS server is
    known, a resolv.conf that names it.
    """
    from vipd.bench.lab import Lab
    from vipd.bench.lab_errors import LabError

    with _reported():
        chosen = Lab(prefix)
        if name not in (host.name for host in chosen.topology.hosts):
            raise click.BadParameter(
                f"the lab has {', '.join(host.name for host in chosen.topology.hosts)}",
                param_hint="NAME",
            )
        if not chosen.stands(name):
            raise LabError(f"lab {prefix} is not up: run `vipd lab up` first")
        if bare:
            variables: dict[str, str] = {}
            chosen.point_at_nameserver(name, None)
        else:
            variables = _surround(chosen, name, manifests, namespace, nameserver)
        argv = chosen.command(name, command)
    sys.stdout.flush()
    try:
        os.execve(argv[0], argv, {**os.environ, **variables})
    except OSError as failure:
        if failure.errno != errno.E2BIG:
            raise
        size = sum(len(name) + len(value) + 2 for name, value in variables.items())
        raise click.ClickException(
            f"{failure.strerror}: the variables of services take {size} bytes, and no container of "
            "this namespace would start either; --bare leaves them out"
        ) from failure


def _surround(
    chosen: "Lab",
    name: str,
    manifests: tuple[str, ...],
    namespace: str | None,
    nameserver: "Address | None",
) -> dict[str, str]:
    """Write the host's resolv.conf; return the variables that a container there finds."""
    from vipd.bench.lab_container import surroundings
    from vipd.bench.lab_errors import LabError

    found = surroundings(chosen, name, manifests=manifests, namespace=namespace)
    for problem in found.problems if manifests else ():  # else the daemon tells them
        click.echo(f"vipd: {problem}", err=True)
    try:
        chosen.point_at_nameserver(name, nameserver or found.nameserver, found.namespace)
    except LabError as failure:
        if nameserver is not None:
            raise
        click.echo(f"vipd: {failure}", err=True)
    return found.variables


@lab.command()
@_prefix
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def status(prefix: str, as_json: bool) -> None:
    """Show the hosts of the lab. Exit code 1 where it is not complete."""
    from vipd.bench.lab import Lab

    with _reported():
        hosts = Lab(prefix).status()
    complete = all(host.state == "ready" for host in hosts)
    if as_json:
        import msgspec

        whole = {"prefix": prefix, "up": complete, "hosts": hosts}
        click.echo(msgspec.json.format(msgspec.json.encode(whole)).decode())
    else:
        for line in _table(hosts):
            click.echo(line)
    sys.exit(0 if complete else 1)


def _table(hosts: "tuple[HostStatus, ...]") -> Iterator[str]:
    """Aligned columns, the same on a terminal and in a file."""
    rows = [
        ("HOST", "STATE", "ECHO", "PROCESSES", "ADDRESSES"),
        *(
            (
                host.name,
                host.state,
                "yes" if host.serving else "-",
                str(len(host.processes)),
                " ".join(host.addresses),
            )
            for host in hosts
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


@lab.command()
@_prefix
def demo(prefix: str) -> None:
    """Build the lab, run vipd in it, show what it does with real requests, tear down."""
    from vipd.bench.demo import run

    with _reported():
        passed = run(prefix)
    sys.exit(0 if passed else 1)
