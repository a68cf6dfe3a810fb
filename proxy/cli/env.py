"""`vipd env`: the variables of services that a pod is started with, for shell, file or program."""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import click

from vipd.proxy.cli.options import socket_option
from vipd.proxy.cli.output import print_json

if TYPE_CHECKING:
    from vipd.proxy.environment import Environment, Wanted

SHELL, DOTENV, JSON = "shell", "dotenv", "json"
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BARE = re.compile(r"[A-Za-z0-9.:/\[\]_-]*")


@click.command()
@click.option(
    "-n", "--namespace", default="default", show_default=True, metavar="NS", help="The pod's."
)
@click.option("--pod", default="", metavar="NAME", help="Heed this Pod's enableServiceLinks.")
@click.option(
    "--no-service-links", is_flag=True, help="As if the Pod said enableServiceLinks: false."
)
@click.option(
    "--format",
    "form",
    type=click.Choice([SHELL, DOTENV, JSON]),
    default=SHELL,
    show_default=True,
    help="Lines to eval, lines of an env file, or one JSON object.",
)
@click.option(
    "-f",
    "--manifests",
    "manifests",
    multiple=True,
    metavar="PATH",
    help="Read manifests instead of the running daemon. Repeatable; - is standard input.",
)
@socket_option
def env(
    namespace: str,
    pod: str,
    no_service_links: bool,
    form: str,
    manifests: tuple[str, ...],
    socket: str | None,
) -> None:
    """Print the variables of services that the kubelet starts a pod's containers with.

    Those of every Service with a cluster IP in the pod's namespace, and always those of
    default/kubernetes. Asks the daemon; with -f, manifests, without root and without a daemon.

    In a shell: eval "$(vipd env -n NS)". What should be known about them is told on standard error.
    """
    import msgspec

    from vipd.proxy.cli.main import DEGRADED
    from vipd.proxy.environment import Wanted, checked

    asked = checked(Wanted(namespace=namespace, pod=pod, service_links=not no_service_links))
    made, whole = _from_manifests(asked, manifests) if manifests else (_ask(asked, socket), True)
    for note in (*made.notes, *(unnamable(made.variables) if form == SHELL else ())):
        click.echo(f"vipd: {note}", err=True)
    if form == JSON:
        print_json(msgspec.json.encode(made.variables))
    else:
        for line in shell(made.variables) if form == SHELL else dotenv(made.variables):
            click.echo(line)
    if not whole:
        sys.exit(DEGRADED)


def _ask(asked: "Wanted", socket: str | None) -> "Environment":
    import msgspec

    from vipd.proxy.config import DEFAULT_SOCKET
    from vipd.proxy.control import read
    from vipd.proxy.environment import Environment

    argument = msgspec.json.encode(asked).decode()
    document = read(socket if socket is not None else DEFAULT_SOCKET, "environment", argument)
    return msgspec.json.decode(document, type=Environment)


def _from_manifests(asked: "Wanted", manifests: tuple[str, ...]) -> "tuple[Environment, bool]":
    """Return the variables, and whether all manifests could be read."""
    from vipd.proxy.environment import environment
    from vipd.proxy.events import Applied, Problem
    from vipd.proxy.model import Pod
    from vipd.proxy.snapshot import Snapshot, fold
    from vipd.proxy.sources.manifests import load

    events = load(manifests)
    problems = [one.error for one in events if isinstance(one, Problem) and one.error]
    for problem in problems:
        click.echo(f"vipd: {problem}", err=True)
    objects = [one.object for one in events if isinstance(one, Applied)]
    pods = {one.name: one for one in objects if isinstance(one, Pod)}
    snapshot, _ = fold(Snapshot(), events)
    return environment(asked, snapshot.services, pods), not problems


def shell(variables: Mapping[str, str]) -> Iterator[str]:
    """Yield lines that a POSIX shell can evaluate; names that it cannot have are left out."""
    for name, value in variables.items():
        if _IDENTIFIER.fullmatch(name):
            yield f"export {name}={shlex.quote(value)}"


def dotenv(variables: Mapping[str, str]) -> Iterator[str]:
    """Yield lines of an env file. Raise ValueError for a value that would need quotes.

    There is no quoting that all its readers agree on: `docker run --env-file` takes quotes for a
    part of the value. Addresses, numbers, protocols and URLs of these need none.
    """
    for name, value in variables.items():
        if not _BARE.fullmatch(value):
            raise ValueError(f"{name}: {value!r} would need quotes")
        yield f"{name}={value}"


def unnamable(variables: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence on variables that no shell can have a name for, if there are any."""
    names = [name for name in variables if not _IDENTIFIER.fullmatch(name)]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"left out: {names[0]}{more}, which a shell cannot name; --format json has all"
