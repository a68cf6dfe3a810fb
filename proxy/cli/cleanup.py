"""`vipd cleanup`: remove every trace of every mode."""

import sys

import click

from vipd.proxy.cli.options import json_option, socket_option


@click.command()
@socket_option
@json_option
def cleanup(socket: str | None, as_json: bool) -> None:
    """Remove what vipd programmed in this network namespace, and say what it was.

    Only objects that vipd owns are touched. Refused while a daemon serves this network namespace.
    """
    import asyncio
    import os

    import msgspec

    from vipd.backends.registry import MODES, backend
    from vipd.proxy import control, instance
    from vipd.proxy.cli.output import print_json
    from vipd.proxy.config import DEFAULT_SOCKET
    from vipd.proxy.errors import DataplaneError, InUseError

    path = socket if socket is not None else DEFAULT_SOCKET
    try:
        lock = instance.take()
    except InUseError as error:
        click.echo(f"vipd: {error}: stop it first", err=True)
        sys.exit(1)
    removed: list[str] = []
    failed = False
    for mode in MODES:
        try:
            removed += asyncio.run(backend(mode, inherited=(lock.fileno(),)).driver.teardown())
        except DataplaneError as error:
            click.echo(f"vipd: {mode}: {error}", err=True)
            failed = True
    if os.path.exists(path) and control.discard(path):
        removed.append(f"socket {path}")
    if as_json:
        print_json(msgspec.json.encode({"removed": removed}))
    else:
        for one in removed:
            click.echo(f"removed {one}")
        if not removed and not failed:
            click.echo("nothing of vipd was here")
    sys.exit(1 if failed else 0)
