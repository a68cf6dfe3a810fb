"""`vipd cleanup`: remove every trace of every mode, or of one."""

import sys

import click

from vipd.proxy.cli.options import flags, json_option, socket_option


@click.command()
@click.option("--mode", metavar="MODE", help="Only what this mode left. Default: everything.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed; change nothing.")
@click.option(
    "--kube-proxy", is_flag=True, help="Remove what kube-proxy left, in any of its modes, too."
)
@click.option(
    "--only-kube-proxy",
    is_flag=True,
    help="Remove what kube-proxy left and nothing of vipd, also while the daemon runs.",
)
@click.option(
    "--config", metavar="FILE", help="The daemon's configuration, which may name its socket."
)
@socket_option
@json_option
def cleanup(
    mode: str | None,
    dry_run: bool,
    kube_proxy: bool,
    only_kube_proxy: bool,
    config: str | None,
    socket: str | None,
    as_json: bool,
) -> None:
    """Remove what vipd programmed in this network namespace, and say what it was.

    Only objects that vipd owns are touched; what kube-proxy left is listed, and removed only when
    asked for. The daemon's files are looked for beside its control socket. Refused while a daemon
    serves this network namespace, or listens on that socket, but for --only-kube-proxy.
    """
    import asyncio
    import os

    import msgspec

    from vipd.backends.registry import MODES
    from vipd.proxy import control, instance
    from vipd.proxy.cleanup import clean
    from vipd.proxy.cli.output import print_json
    from vipd.proxy.config import load
    from vipd.proxy.errors import ConfigError, InUseError

    if mode is not None and mode not in MODES:
        raise ConfigError("--mode", f"{mode!r} is no mode; there is: {', '.join(MODES)}")
    if only_kube_proxy and mode is not None:
        raise click.UsageError("--mode is vipd's, which --only-kube-proxy leaves alone")
    path = load(flags(config=config, socket=socket)).socket
    inherited: tuple[int, ...] = ()
    if not dry_run and not only_kube_proxy:
        try:
            lock = instance.take()
        except InUseError as error:
            click.echo(f"vipd: {error}: stop it first", err=True)
            sys.exit(1)
        inherited = (lock.fileno(),)
    pid = None if only_kube_proxy else control.listener(path)
    if pid is not None:
        # It serves another network namespace, and its files are in the same folder.
        click.echo(
            f"vipd: a daemon (pid {pid or 'unknown'}) listens on {path}: stop it first, or name "
            "another --socket: then what is in this network namespace is removed, and that "
            "daemon's files are left alone",
            err=True,
        )
        if not dry_run:
            sys.exit(1)
    modes = () if only_kube_proxy else MODES if mode is None else (mode,)
    kube_proxy = kube_proxy or only_kube_proxy
    done = asyncio.run(clean(path, modes, inherited, dry_run=dry_run, kube_proxy=kube_proxy))
    if as_json:
        print_json(msgspec.json.encode(done))
    else:
        for one in done.removed:
            click.echo(f"{'would remove' if dry_run else 'removed'} {one}")
        if not (done.removed or done.unknown or done.failed):
            what = "vipd" if mode is None else f"vipd's mode {mode}"
            what = "kube-proxy" if only_kube_proxy else what
            where = f"this network namespace and {os.path.dirname(os.path.abspath(path))}"
            click.echo(f"nothing of {what} was here (looked in {where})")
        for one in done.left:
            click.echo(f"left {one} (--kube-proxy removes it)")
    for one in (*done.unknown, *done.failed):
        click.echo(f"vipd: {one}", err=True)
    sys.exit(1 if done.failed else 0)
