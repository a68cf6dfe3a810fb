"""`vipd render` and `vipd plan`: the pure functions at the command line."""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from vipd.proxy.cli.options import flags, kubeconfig_option, node_options, socket_option

F = TypeVar("F", bound=Callable[..., Any])


def _files(*, required: bool) -> Callable[[F], F]:
    return click.option(
        "-f",
        "--manifests",
        "manifests",
        multiple=True,
        required=required,
        metavar="PATH",
        help="File or folder of manifests, or - for standard input. Repeatable.",
    )


def _resolved(
    manifests: tuple[str, ...], kubeconfig: str | None, node: Any, *facts: Any
) -> tuple[Any, bool]:
    """Return the table for a source and facts, and whether all of it could be read."""
    from vipd.proxy.events import Problem
    from vipd.proxy.resolve import resolve
    from vipd.proxy.snapshot import Snapshot, fold

    if kubeconfig is None:
        from vipd.proxy.sources.manifests import load

        told = load(manifests)
    else:
        told = _listed(kubeconfig, node.node_name)
    events = [*told, *facts]
    problems = [one.error for one in events if isinstance(one, Problem) and one.error]
    snapshot, _ = fold(Snapshot(), events)
    table = resolve(snapshot, node)
    for line in (*problems, *table.contested.values()):
        click.echo(f"vipd: {line}", err=True)
    return table, not problems and not table.contested


def _listed(kubeconfig: str, node: str) -> list[Any]:
    """Return the events of everything that an API server has."""
    import asyncio

    from vipd.proxy.sources.kubernetes import source
    from vipd.proxy.sources.kubernetes.resources import Wanted

    return asyncio.run(source.load(kubeconfig, node, Wanted()))


def _mode(configured: str) -> str:
    """Return the mode to compile for: where the daemon would choose, the one it prefers."""
    from vipd.backends.registry import AUTO, MODES

    return MODES[0] if configured == AUTO else configured


@click.command()
@_files(required=True)
@node_options
def render(manifests: tuple[str, ...], **told: Any) -> None:
    """Print the program that a mode would load for manifests. Needs no root and no daemon."""
    from vipd.backends.registry import backend
    from vipd.proxy.cli.main import DEGRADED
    from vipd.proxy.config import load as load_config

    config = load_config(flags(**told))
    table, whole = _resolved(manifests, None, config.node)
    compiler = backend(_mode(config.mode), config.dataplane).compiler
    wanted = compiler.compile(table.virtual_servers(), table.network)
    click.echo(str(compiler.plan(None, wanted)[0]), nl=False)
    if not whole:
        sys.exit(DEGRADED)


@click.command()
@_files(required=False)
@kubeconfig_option
@node_options
@socket_option
def plan(
    manifests: tuple[str, ...], kubeconfig: str | None, socket: str | None, **told: Any
) -> None:
    """Print what a commit of manifests, or of what an API server has, would change.

    With a daemon on the socket: against what it has programmed, with its settings. Without: against
    nothing, with the settings given here. Prints nothing when nothing would change.
    """
    import msgspec

    from vipd.backends.registry import backend
    from vipd.proxy import control
    from vipd.proxy.cli.main import DEGRADED
    from vipd.proxy.config import DEFAULT_SOCKET
    from vipd.proxy.config import load as load_config
    from vipd.proxy.errors import ControlError
    from vipd.proxy.views import SettingsView

    if bool(manifests) == (kubeconfig is not None):
        raise click.UsageError("say one of --manifests and --kubeconfig")
    path = socket if socket is not None else DEFAULT_SOCKET
    observed = None
    try:
        told_by_daemon = msgspec.json.decode(control.read(path, "settings"), type=SettingsView)
        node, facts = told_by_daemon.node(), [told_by_daemon.facts()]
        programmed = control.read(path, "program")
        compiler = backend(told_by_daemon.mode, told_by_daemon.dataplane).compiler
        observed = None if programmed == b"null" else compiler.load(programmed)
        if any(value is not None for value in told.values()):
            click.echo("vipd: settings are the daemon's; those given here are not used", err=True)
    except ControlError as error:
        if socket is not None or os.path.exists(path):
            raise
        click.echo(f"vipd: {error}: compared with nothing", err=True)
        config = load_config(flags(**told))
        node, facts = config.node, []
        compiler = backend(_mode(config.mode), config.dataplane).compiler
    table, whole = _resolved(manifests, kubeconfig, node, *facts)
    wanted = compiler.compile(table.virtual_servers(), table.network)
    click.echo(str(compiler.plan(observed, wanted)[0]), nl=False)
    if not whole:
        sys.exit(DEGRADED)
