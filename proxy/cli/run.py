"""`vipd run`: the daemon in the foreground."""

from pathlib import Path
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
    kubeconfig_option,
    node_options,
    socket_option,
)


@click.command(cls=KubeProxyCommand)
@daemon_options
@kubeconfig_option
@node_options
@drain_option
@socket_option
@kube_proxy_options
@click.option(
    "--write-config-to",
    metavar="FILE",
    help="Write what counts to FILE, as a VipdConfiguration, and end.",
)
@click.option(
    "--init-only",
    is_flag=True,
    help="Make the kernel settings that take privileges, and end. What is refused is logged.",
)
@click.option(
    "--after-kube-proxy",
    is_flag=True,
    help="Remove what kube-proxy left, in any of its modes, once everything is programmed.",
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
    write_config_to: str | None,
    init_only: bool,
    after_kube_proxy: bool,
    cleanup_at_exit: bool,
    cleanup: bool,
    **told: Any,
) -> None:
    """Serve the services of this node until SIGTERM.

    Takes kube-proxy's flags, too; those that have no effect are named in the log. What was
    programmed stays when the daemon ends; `vipd cleanup` removes it.
    """
    if cleanup:
        from vipd.proxy.cli.cleanup import cleanup as command

        where = {name: told[name] for name in ("config", "socket")}
        others = ("dry_run", "kube_proxy", "only_kube_proxy", "as_json")
        only_ours = dict.fromkeys(others, False)
        click.get_current_context().invoke(command, mode=None, **only_ours, **where)
    import asyncio

    from vipd.proxy import daemon, logs
    from vipd.proxy import init_only as initial
    from vipd.proxy.cli.source import source
    from vipd.proxy.config import as_file, loaded
    from vipd.proxy.errors import ConfigError
    from vipd.proxy.kernel_settings import adjust_oom_score
    from vipd.proxy.reload import tell_without_effect

    if more and not manifests:
        raise click.UsageError(f"unexpected argument {more[0]!r}; did you mean --manifests?")
    said = flags((*manifests, *more), without_effect=without_effect(), **told)
    found = loaded(said)
    config = found.config
    if write_config_to is not None:
        from ryaml import dumps  # type: ignore[attr-defined] # its stub forgets to say so

        told_by_it = as_file(config)
        if "nodeName" not in found.origins:
            del told_by_it["nodeName"]  # it is to be the file of every node
        try:
            Path(write_config_to).write_text(dumps(told_by_it))
        except OSError as error:
            why = f"{write_config_to}: {error.strerror}"
            raise ConfigError("--write-config-to", why) from error
        return
    logs.configure(config.log_format)
    tell_without_effect(found.notes)
    if init_only:
        asyncio.run(initial.initialise(config))
        return
    if config.oom_score_adjust is not None:
        # Before there are processes that get it, too. What is refused, the daemon tells.
        adjust_oom_score(config.oom_score_adjust)
    # Here, where Ctrl-C still ends the process: standard input may keep it waiting.
    chosen = source(config)
    at_exit: daemon.AtExit | None = None
    if cleanup_at_exit:
        from vipd.proxy.cleanup import clean_at_exit

        at_exit = clean_at_exit
    asyncio.run(
        daemon.run(config, chosen, said, after_kube_proxy=after_kube_proxy, at_exit=at_exit)
    )
