"""`vipd mode`: show the mode, or switch to another one while traffic flows."""

import sys
import time

import click

from vipd.proxy.cli.options import json_option, socket_option
from vipd.proxy.cli.output import print_json, printable

POLL_SECONDS = 0.1


class Duration(click.ParamType[float]):
    """A time such as ``90``, ``90s``, ``5m`` or ``1h30m``; seconds where no unit is said."""

    name = "TIME"

    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return seconds."""
        from vipd.proxy.durations import parse_duration
        from vipd.proxy.switch import LONGEST_DRAIN_SECONDS

        if isinstance(value, float):
            return value
        try:
            seconds = parse_duration(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if seconds > LONGEST_DRAIN_SECONDS:
            self.fail(f"{value!r} is more than a day", param, ctx)
        return seconds


@click.command()
@click.argument("name", required=False, metavar="[MODE]")
@click.option(
    "--drain",
    type=Duration(),
    help="How long the old dataplane may keep its flows, such as 5m. Default: as configured.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@click.option("--force", is_flag=True, help="Switch even if some services cannot be served.")
@socket_option
@json_option
def mode(
    name: str | None,
    drain: float | None,
    dry_run: bool,
    force: bool,
    socket: str | None,
    as_json: bool,
) -> None:
    """Show the mode in use, or switch to MODE live.

    The new dataplane is programmed beside the old one and compared with what was wanted; then the
    old one takes no new flows and drains. Where anything is wrong the new one is removed again.
    """
    import msgspec

    from vipd.backends.registry import MODES
    from vipd.proxy.answers import SwitchRequest
    from vipd.proxy.config import DEFAULT_SOCKET
    from vipd.proxy.control import read
    from vipd.proxy.errors import ConfigError
    from vipd.proxy.status import Status, SwitchReport

    path = socket if socket is not None else DEFAULT_SOCKET

    def status() -> Status:
        return msgspec.json.decode(read(path, "status"), type=Status)

    if name is None:
        if drain is not None or dry_run or force:
            raise ConfigError("MODE", "is missing: --drain, --dry-run and --force are for a switch")
        _show(status(), as_json)
        return
    if name not in MODES:
        raise ConfigError("MODE", f"{name!r} is no mode; there is: {', '.join(MODES)}")
    argument = msgspec.json.encode(SwitchRequest(name, drain, force)).decode()
    if dry_run:
        document = read(path, "try-switch", argument)
        if as_json:
            print_json(document)
        lines = msgspec.json.decode(document, type=list[str])
        for line in () if as_json else lines:
            click.echo(line)
        hindered = any(line.startswith(("missing:", "cannot serve:")) for line in lines)
        sys.exit(1 if hindered and not force else 0)
    before = status().mode
    report = msgspec.json.decode(read(path, "switch", argument), type=SwitchReport)
    said = 0
    while True:
        for step in report.steps[said:]:
            if not as_json:
                new = report.waits or name
                click.echo(f"{step:8} {_STEPS[step].format(old=before, new=new)}")
        said = len(report.steps)
        if report.ended is not None:
            break
        time.sleep(POLL_SECONDS)
        current = status().switch
        if current is None or current.started != report.started:
            click.echo("vipd: the daemon was restarted meanwhile", err=True)
            sys.exit(1)
        report = current
    if as_json:
        print_json(msgspec.json.encode(report))
    elif not report.failure:
        now = status()
        took = (report.ended - report.started) * 1000
        if report.waits:
            click.echo(f"done     {report.waits} serves until {name} can, after {took:.0f} ms")
        else:
            already = f"{name} serves already"
            click.echo(f"done     {name} serves, after {took:.0f} ms" if said else already)
        _show_drains(now)
    if report.failure:
        for line in report.failure.splitlines():
            click.echo(f"vipd: {printable(line)}", err=True)
        click.echo(f"vipd: {before} goes on serving; nothing was changed", err=True)
        sys.exit(1)


_STEPS = {
    "probe": "can this host do {new}, and can {new} serve everything?",
    "overlap": "{new} is programmed beside {old}",
    "verify": "the kernel is compared with what was committed",
}


def _show(told: "object", as_json: bool) -> None:
    import msgspec

    from vipd.proxy.status import Status

    if not isinstance(told, Status):
        raise TypeError(told)
    if as_json:
        document = {"mode": told.mode, "why": told.why_mode, "drains": told.drains}
        print_json(msgspec.json.encode({**document, "switch": told.switch}))
        return
    click.echo(told.mode + (f" ({told.why_mode})" if told.why_mode else ""))
    _show_drains(told)


def _show_drains(told: "object") -> None:
    from vipd.proxy.status import Status, drain_lines

    if isinstance(told, Status):
        for line in drain_lines(told.drains, time.time()):
            click.echo(f"draining {line}")
