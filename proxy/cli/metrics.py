"""`vipd metrics`: what a running daemon counts, without any HTTP port."""

import click

from vipd.proxy.cli.options import socket_option


@click.command()
@socket_option
def metrics(socket: str | None) -> None:
    """Print what the daemon counts, in Prometheus's text format (docs/metrics.md)."""
    import msgspec

    from vipd.proxy.config import DEFAULT_SOCKET
    from vipd.proxy.control import read

    document = read(socket if socket is not None else DEFAULT_SOCKET, "metrics")
    click.echo(msgspec.json.decode(document, type=str), nl=False)
