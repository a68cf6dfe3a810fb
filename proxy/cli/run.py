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
    "--cleanup-at-exit",
    is_flag=True,
    help="On SIGTERM or SIGINT remove what was programmed, as `vipd cleanup` does. Default: it"
    " stays, so that services work while the daemon is restarted.",
)
@click.option(
    "--cleanup",
    is_flag=True,
    help="Do what `vipd cleanup` does, and end. What kube-proxy left stays: `vipd cleanup"
    " --kube-proxy` removes it.",
)
@click.argument("more", nargs=-1, metavar="[PATH]…")
def run(
    manifests: tuple[str, ...],
    more: tuple[str, ...],
    log_format: str,
    cleanup_at_exit: bool,
    cleanup: bool,
    **told: Any,
) -> None:
    """Serve the services of this node until SIGTERM.

    What was programmed stays when the daemon ends; `vipd cleanup` removes it.
    """
    if cleanup:
        from vipd.proxy.cli.cleanup import cleanup as command

        where = {name: told[name] for name in ("config", "socket")}
        only_ours = {"dry_run": False, "kube_proxy": False, "as_json": False}
        click.get_current_context().invoke(command, mode=None, **only_ours, **where)
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
    at_exit: daemon.AtExit | None = None
    if cleanup_at_exit:
        from vipd.proxy.cleanup import clean_at_exit

        at_exit = clean_at_exit
    asyncio.run(daemon.run(config, chosen, said, at_exit))
