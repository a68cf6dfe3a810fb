"""`vipd status`, `vipd services`, `vipd check`: what a person asks first."""

import sys
import time

import click

from vipd.proxy.cli.options import json_option, socket_option
from vipd.proxy.cli.output import print_json, print_table, printable

MOST_ENDPOINTS = 3
"""Endpoints of a virtual server that `vipd services` shows unless asked for all."""


def _ask(path: str | None, name: str) -> bytes:
    from vipd.proxy.config import DEFAULT_SOCKET
    from vipd.proxy.control import read

    return read(path if path is not None else DEFAULT_SOCKET, name)


@click.command()
@socket_option
@json_option
def status(socket: str | None, as_json: bool) -> None:
    """Say how the daemon is. Exit code 3 when it is degraded."""
    import msgspec

    from vipd.proxy.cli.main import DEGRADED
    from vipd.proxy.status import Status

    document = _ask(socket, "status")
    told = msgspec.json.decode(document, type=Status)
    if as_json:
        print_json(document)
    else:
        _print_status(told)
    if told.degraded:
        sys.exit(DEGRADED)


def _print_status(told: "object") -> None:
    from vipd.proxy.status import Status, drain_lines

    if not isinstance(told, Status):
        raise TypeError(told)
    click.echo(f"vipd {told.version}, pid {told.pid}, up {_ago(told.started)}")
    click.echo(f"mode       {told.mode} on node {told.node}")
    if told.why_mode:
        click.echo(f"chosen     {told.why_mode}")
    if told.switch is not None:
        click.echo(f"switch     {_switched(told.switch)}")
    click.echo(f"source     {', '.join(told.manifests)}")
    click.echo(
        f"serving    {told.services} services, {told.virtual_servers} virtual servers, "
        f"{told.endpoints} endpoints"
    )
    last = told.last_sync
    if last is None:
        click.echo("last sync  none yet")
    else:
        click.echo(
            f"last sync  {_ago(last.at)} ago, {last.virtual_servers} virtual servers, "
            f"{last.objects} kernel objects, {last.milliseconds:g} ms"
            f"{', full' if last.full else ''}"
        )
    click.echo(f"syncs      {told.syncs}, failed {told.failed_syncs}")
    if told.departed or told.flows_cut:
        click.echo(
            f"departed   {told.departed} endpoints may have open flows; "
            f"{told.flows_cut} flows were ended at a deadline"
        )
    if told.passed_over:
        click.echo(f"no use for {', '.join(told.passed_over)}")
    for heading, lines in (
        ("draining", tuple(drain_lines(told.drains, time.time()))),
        ("note", told.notes),
        ("failing", (*((told.failure,) if told.failure else ()), *told.trouble)),
        ("not read", told.problems),
        ("conflict", told.conflicts),
        ("rejected", told.rejected),
    ):
        for line in lines:
            click.echo(f"{heading:10} {printable(line)}")
    click.echo(f"health     {'degraded' if told.degraded else 'good'}")


def _switched(report: "object") -> str:
    from vipd.proxy.status import SwitchReport

    if not isinstance(report, SwitchReport):
        raise TypeError(report)
    way = f"{report.origin} → {report.target}"
    if report.ended is None:
        return f"{way}, under way: {report.steps[-1] if report.steps else 'asked for'}"
    if report.failure:
        return f"{way} failed {_ago(report.ended)} ago: {printable(report.failure.splitlines()[0])}"
    return f"{way} {_ago(report.ended)} ago, took {(report.ended - report.started) * 1000:.0f} ms"


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


@click.command()
@click.argument("name", required=False, metavar="[[NAMESPACE/]NAME]")
@click.option("--wide", is_flag=True, help="Show every endpoint.")
@socket_option
@json_option
def services(name: str | None, wide: bool, socket: str | None, as_json: bool) -> None:
    """List virtual servers and their endpoints, of all services or of one."""
    import msgspec

    from vipd.proxy.errors import ControlError
    from vipd.proxy.views import VirtualServerView

    shown = msgspec.json.decode(_ask(socket, "services"), type=list[VirtualServerView])
    if name is not None:
        wanted = name if "/" in name else f"default/{name}"
        shown = [one for one in shown if wanted in (one.service, one.service.rpartition(":")[0])]
        if not shown:
            raise ControlError(f"no service {wanted} is served here")
    if as_json:
        print_json(msgspec.json.encode(shown))
        return
    rows = []
    for one in shown:
        used = one.endpoints if one.policy == "cluster" else one.local_endpoints
        most = len(used) if wide else MOST_ENDPOINTS
        target = ", ".join(f"{end.address}{_weight(end.weight)}" for end in used[:most])
        target += f", … {len(used)} in all" if len(used) > most else ""
        notes = [one.algorithm] if one.algorithm != "random" else []
        notes += [f"affinity {one.affinity_seconds}s"] if one.affinity_seconds else []
        notes += [f"from {','.join(one.allowed_sources)}"] if one.allowed_sources else []
        notes += ["local only"] if one.policy != "cluster" else []
        rows.append(
            (
                one.service,
                one.kind,
                f"{one.address}/{one.protocol}",
                target if target else f"none: {one.refusal}",
                " ".join(notes),
            )
        )
    print_table(("SERVICE", "KIND", "ADDRESS", "ENDPOINTS", "NOTES"), rows)


def _weight(weight: int) -> str:
    return "" if weight == 1 else f"×{weight}"


@click.command()
@json_option
def check(as_json: bool) -> None:
    """Say what this kernel and host can do, mode by mode, and what each mode does otherwise.

    Exit code 1 when no mode works.
    """
    import asyncio

    import msgspec

    from vipd.backends.protocol import Capabilities, Capability
    from vipd.backends.registry import MODES, backend
    from vipd.proxy.cli.main import FAILED
    from vipd.proxy.errors import DataplaneError

    found: list[Capabilities] = []
    for mode in MODES:
        try:
            found.append(asyncio.run(backend(mode).driver.probe()))
        except DataplaneError as error:
            found.append(Capabilities(mode, (Capability(mode, False, str(error)),)))
    best = next((one.mode for one in found if one.supported), None)
    if as_json:
        views = [
            {
                "mode": one.mode,
                "supported": one.supported,
                "found": one.found,
                "differences": tuple(backend(one.mode).compiler.differences),
            }
            for one in found
        ]
        print_json(msgspec.json.encode(views))
    else:
        for one in found:
            _print_capabilities(one, chosen=one.mode == best)
    if best is None:
        sys.exit(FAILED)


def _print_capabilities(told: "object", *, chosen: bool) -> None:
    from vipd.backends.protocol import Capabilities
    from vipd.backends.registry import backend

    if not isinstance(told, Capabilities):
        raise TypeError(told)
    works = "works here" if told.supported else "does not work here"
    click.echo(f"{told.mode}: {works}{' (--mode auto takes it)' if chosen else ''}")
    for one in told.found:
        missing = "missing" if one.needed else "missing, which vipd can do without"
        state = "yes" if one.present else f"{missing}: {one.remedy or one.detail}"
        detail = f" ({one.detail})" if one.present and one.detail else ""
        click.echo(f"  {one.name:14} {state}{detail}")
    for difference in backend(told.mode).compiler.differences:
        click.echo(f"  differs: {difference.name}: {difference.what}")
