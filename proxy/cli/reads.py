"""`vipd status`, `vipd check`: how the daemon and the host are."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from vipd.proxy.cli.options import json_option, socket_option
from vipd.proxy.cli.output import print_json, printable
from vipd.proxy.words import counted

if TYPE_CHECKING:
    from vipd.proxy.counted import WorkerView

MOST_WORKERS = 8
"""Workers that are shown one by one."""


@click.command()
@socket_option
@json_option
def status(socket: str | None, as_json: bool) -> None:
    """Say how the daemon is. Exit code 3 when it is degraded."""
    import msgspec

    from vipd.proxy.cli.main import DEGRADED
    from vipd.proxy.config import DEFAULT_SOCKET
    from vipd.proxy.control import read
    from vipd.proxy.status import Status

    document = read(socket if socket is not None else DEFAULT_SOCKET, "status", "workers")
    told = msgspec.json.decode(document, type=Status)
    if as_json:
        print_json(document)
    else:
        _print_status(told)
    if told.degraded:
        sys.exit(DEGRADED)


def _print_status(told: "object") -> None:
    from vipd.proxy.status import Status, dns_line, drain_lines, repair_lines

    if not isinstance(told, Status):
        raise TypeError(told)
    click.echo(f"vipd {told.version}, pid {told.pid}, up {_ago(told.started)}")
    click.echo(f"mode       {told.mode} on node {told.node}")
    if told.why_mode:
        click.echo(f"chosen     {told.why_mode}")
    if told.switch is not None:
        click.echo(f"switch     {_switched(told.switch)}")
    click.echo(f"source     {_source(told.manifests, told.kubeconfig)}")
    click.echo(
        f"serving    {counted(told.services, 'service')}, "
        f"{counted(told.virtual_servers, 'virtual server')}, "
        f"{counted(told.endpoints, 'endpoint')}"
    )
    last = told.last_sync
    if last is None:
        click.echo("last sync  none yet")
    else:
        click.echo(
            f"last sync  {_ago(last.at)} ago, {counted(last.virtual_servers, 'virtual server')}, "
            f"{counted(last.objects, 'kernel object')}, {last.milliseconds:g} ms"
            f"{', full' if last.full else ''}"
        )
    click.echo(f"syncs      {told.syncs}, failed {told.failed_syncs}")
    if told.departed or told.flows_cut:
        click.echo(
            f"departed   {counted(told.departed, 'endpoint')} may have open flows; "
            f"ended at a deadline: {counted(told.flows_cut, 'flow')}"
        )
    if told.dns_listen:
        click.echo(f"dns        {dns_line(told.dns_listen, told.dns, told.dns_elsewhere)}")
    if told.http:
        click.echo(f"http       {', '.join(told.http)}")
    for line in worker_lines(told.workers):
        click.echo(line)
    if told.passed_over:
        click.echo(f"no use for {', '.join(told.passed_over)}")
    for heading, lines in (
        ("draining", tuple(drain_lines(told.drains, time.time()))),
        ("repaired", tuple(repair_lines(told.repairs, time.time())) if told.repairs else ()),
        ("note", told.notes),
        ("failing", (*((told.failure,) if told.failure else ()), *told.trouble)),
        ("not read", told.problems),
        ("conflict", told.conflicts),
        ("rejected", told.rejected),
    ):
        for line in lines:
            click.echo(f"{heading:10} {printable(line)}")
    click.echo(f"health     {'degraded' if told.degraded else 'good'}")


def _source(manifests: "Sequence[str]", kubeconfig: str | None) -> str:
    if kubeconfig is None:
        return ", ".join(manifests)
    return f"the API server of {kubeconfig or 'this cluster'}"


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


def worker_lines(workers: "Sequence[WorkerView]") -> Iterator[str]:
    """Yield what people read of workers: each, as far as there is room, and their counters' sum."""
    for number, one in enumerate(workers[:MOST_WORKERS]):
        told = f"{one.number}: pid {one.pid}, up {_lasting(one.up_seconds)}, "
        told += f"{counted(one.listeners, 'listener')}, {one.open} open"
        told += f", cannot listen at {counted(one.missing, 'place')} yet" if one.missing else ""
        told += f", {counted(one.restarts, 'restart')}" if one.restarts else ""
        told += ", takes nothing new" if one.retired else ""
        yield f"{'' if number else 'workers':10} {told}"
    if len(workers) > MOST_WORKERS:
        is_open = sum(one.open for one in workers)
        yield f"{'':10} … {len(workers)} in all, {is_open} open (--json)"
    total: Counter[str] = Counter()
    for one in workers:
        total.update(one.counters)
    said = [f"{name.replace('_', ' ')} {count}" for name, count in total.items() if count]
    if said:
        yield f"{'counted':10} {', '.join(said)}"


def _ago(moment: float) -> str:
    return _lasting(max(0.0, time.time() - moment))


def _lasting(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


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
