"""`vipd config`: what a file or flags mean, before a daemon is started with them."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from vipd.proxy.cli.kube_proxy_options import (
    KubeProxyCommand,
    kube_proxy_options,
    without_effect,
)
from vipd.proxy.cli.options import (
    daemon_options,
    drain_option,
    flags,
    json_option,
    kubeconfig_option,
    node_options,
    socket_option,
)


@click.group()
def config() -> None:
    """The configuration: is a file right, and what counts where from."""


@config.command()
@click.argument("file", metavar="FILE")
def check(file: str) -> None:
    """Say all that is wrong with FILE, and what in it has no effect.

    FILE is of kind VipdConfiguration, KubeProxyConfiguration, or has one of each. Needs no daemon
    and no root. Exit code 1 where anything is wrong.
    """
    from vipd.proxy.config import Flags, examined
    from vipd.proxy.errors import ConfigError

    try:
        found = examined(Flags(config=file))
    except ConfigError as error:
        click.echo(f"vipd: {error}", err=True)
        sys.exit(1)
    for note in found.notes:
        click.echo(f"no effect: {note}")
    for problem in found.wrong:
        click.echo(f"vipd: {problem}", err=True)
    if found.wrong:
        sys.exit(1)
    click.echo(f"{file}: nothing is wrong")


@config.command(cls=KubeProxyCommand)
@daemon_options
@kubeconfig_option
@node_options
@drain_option
@socket_option
@kube_proxy_options
@click.option("--all", "everything", is_flag=True, help="Print what nobody said, too.")
@json_option
def show(everything: bool, as_json: bool, **told: Any) -> None:
    """Print what `vipd run` with these flags would do, and who says so.

    Fields are those of VipdConfiguration, whoever says them. With --json always all of them.
    """
    import msgspec

    from vipd.proxy.cli.output import print_json, print_table, printable
    from vipd.proxy.config import as_file, loaded

    found = loaded(flags(without_effect=without_effect(), **told))
    fields = dict(_leaves(as_file(found.config)))
    rows = {path: (value, _origin(path, found.origins)) for path, value in fields.items()}
    if as_json:
        shown = {path: {"value": value, "from": where} for path, (value, where) in rows.items()}
        notes = [{"where": one.where, "instead": one.instead} for one in found.notes]
        print_json(msgspec.json.encode({"fields": shown, "withoutEffect": notes}))
        return
    print_table(
        ("FIELD", "VALUE", "FROM"),
        [
            (path, printable(_text(value)), printable(where))
            for path, (value, where) in rows.items()
            if everything or where != _DEFAULT
        ],
    )
    for note in found.notes:
        click.echo(f"no effect: {note}")


_DEFAULT = "default"


def _origin(path: str, origins: Mapping[str, str]) -> str:
    """Return who says a field; one that says the section means all of it."""
    section = path.rpartition(".")[0]
    return origins.get(path) or (origins.get(section) if section else None) or _DEFAULT


def _leaves(section: Mapping[str, object], path: str = "") -> Iterator[tuple[str, object]]:
    for name, value in section.items():
        if path == "" and name in ("apiVersion", "kind"):
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _text(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return ", ".join(map(str, value)) or "none"
        case dict():
            return "none"
        case _:
            return str(value) if value != "" else '""'
