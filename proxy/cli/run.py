"""`vipd run`: the daemon in the foreground."""

from typing import Any

import click

from vipd.proxy.cli.options import (
    drain_option,
    flags,
    kubeconfig_option,
    node_options,
    socket_option,
)


@click.command()
@click.option(
    "--manifests",
    multiple=True,
    metavar="PATH",
    help="File or folder of manifests, or - for standard input once. Repeatable.",
)
@click.option(
    "--dns-listen",
    multiple=True,
    metavar="ADDR:PORT",
    help="Answer the cluster's names there, over UDP and TCP. Repeatable. Default: nowhere.",
)
@kubeconfig_option
@node_options
@drain_option
@socket_option
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    help="How log lines are written to standard error. Default: text.",
)
@click.option(
    "--after-kube-proxy",
    is_flag=True,
    help="Remove what kube-proxy left, in any of its modes, once everything is programmed.",
)
@click.argument("more", nargs=-1, metavar="[PATH]…")
def run(
    manifests: tuple[str, ...],
    more: tuple[str, ...],
    log_format: str,
    after_kube_proxy: bool,
    **told: Any,
) -> None:
    """Serve the services of this node until SIGTERM.

    What was programmed stays when the daemon ends; `vipd cleanup` removes it.
    """
    import asyncio

    from vipd.proxy import daemon, logs
    from vipd.proxy.cli.source import source
    from vipd.proxy.config import load

    if more and not manifests:
        raise click.UsageError(f"unexpected argument {more[0]!r}; did you mean --manifests?")
    said = flags((*manifests, *more), **told)
    config = load(said)
    logs.configure(log_format)
    # Here, where Ctrl-C still ends the process: standard input may keep it waiting.
    chosen = source(config)
    asyncio.run(daemon.run(config, chosen, said, after_kube_proxy=after_kube_proxy))
