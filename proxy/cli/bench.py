"""`vipd bench`: measurements, as tables for people and JSON for programs."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

from vipd.proxy.cli.progress import Stages

BUSY_CORES = 0.2
"""With more than that at work on something else, figures say little."""

F = TypeVar("F", bound=Callable[..., Any])


@click.group()
def bench() -> None:
    """Measure vipd on this machine, in network namespaces of its own. Needs root."""


def _output_options(command: F) -> F:
    """Add --json and --output."""
    command = click.option("--output", metavar="FILE", help="Write the JSON there, too.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")(
        command
    )


@bench.command()
@click.option(
    "--sizes",
    default="100x5,1000x5,10000x5,44125x1",
    show_default=True,
    metavar="SERVICESxENDPOINTS,…",
    help="Sizes to measure.",
)
@click.option("--changes", default=200, show_default=True, help="Changes at each size.")
@click.option("--mode", default="nftables", show_default=True, help="Dataplane to measure.")
@click.option(
    "--source",
    type=click.Choice(["manifests", "api"]),
    default="manifests",
    show_default=True,
    help="Where services come from: a folder, or an API server on the node.",
)
@_output_options
def sync(
    sizes: str, changes: int, mode: str, source: str, as_json: bool, output: str | None
) -> None:
    """Time from process start, and from a change, until packets see it; memory."""
    from vipd.bench.sync import measure
    from vipd.proxy.cli.output import print_table

    wanted = [_size(one) for one in sizes.split(",") if one.strip()]
    if changes < 4:
        raise click.BadParameter("at least 4: one of each kind", param_hint="--changes")
    results = []
    for services, endpoints in wanted:
        with Stages(f"{mode} {services} × {endpoints}") as progress:
            results.append(measure(services, endpoints, changes, progress, mode, source))
    if _told_as_json("sync", results, as_json, output):
        return
    print_table(
        ("MODE", "SERVICES", "START", "CHANGE p50", "p99", "WORST", "MB START", "CHURN", "AFTER"),
        [
            (
                one.mode,
                f"{one.services} × {one.endpoints}",
                f"{one.start_seconds:.2f} s",
                f"{one.changes.p50:.1f} ms",
                f"{one.changes.p99:.1f} ms",
                f"{one.changes.worst:.1f} ms",
                f"{one.memory_start_mb:.0f}",
                f"{one.memory_churn_mb:.0f}",
                f"{one.memory_after_mb:.0f}",
            )
            for one in results
        ],
    )


@bench.command()
@click.option(
    "--pairs",
    metavar="FROM:TO,…",
    help="Pairs of modes; FROM alone: a run without a switch. Default: all that this host can do.",
)
@click.option(
    "--rate",
    default="1000",
    show_default=True,
    metavar="NUMBER|max",
    help="New TCP connections a second, on all hosts together.",
)
@click.option("--seconds", default=9.0, show_default=True, help="Length of the load of each run.")
@click.option(
    "--services", default=1000, show_default=True, help="Services beside those under load."
)
@click.option("--kept", default=8, show_default=True, help="Kept flows of each kind on each host.")
@_output_options
def switch(
    pairs: str | None,
    rate: str,
    seconds: float,
    services: int,
    kept: int,
    as_json: bool,
    output: str | None,
) -> None:
    """Failed connections and broken flows while the dataplane is switched under load.

    Exits with 1 where a run has any.
    """
    from vipd.bench.switch import CONTROL, measure, slowest_milliseconds
    from vipd.bench.switch_cluster import MOST_SERVICES
    from vipd.proxy.cli.output import print_table

    if not 0 <= services <= MOST_SERVICES:
        raise click.BadParameter(f"0 to {MOST_SERVICES}", param_hint="--services")
    speed = _rate(rate)
    results = []
    for origin, target in _pairs(pairs):
        with Stages(f"{origin} → {target}") as progress:
            results.append(measure(origin, target, speed, seconds, services, progress, kept))
    if not _told_as_json("switch", results, as_json, output):
        print_table(
            (
                *("FROM", "TO", "RATE", "CONNECTIONS", "FAILED", "SLOWEST"),
                *("KEPT TCP", "BROKEN", "KEPT UDP", "BROKEN", "SWITCH", "DRAINED"),
            ),
            [
                (
                    one.origin,
                    "(none)" if one.target == CONTROL else one.target,
                    f"{one.rate:.0f}/s",
                    str(one.report.attempts),
                    str(one.failed),
                    f"{slowest_milliseconds(one):.0f} ms",
                    str(one.report.long_tcp),
                    str(one.broken_tcp),
                    str(one.report.long_udp),
                    str(one.broken_udp),
                    "" if one.switch_seconds is None else f"{one.switch_seconds * 1000:.0f} ms",
                    "" if one.drained_seconds is None else f"{one.drained_seconds:.1f} s",
                )
                for one in results
            ],
        )
        for one in results:
            for line in one.failures[:20]:
                click.echo(f"{one.origin} → {one.target}: {line}", err=True)
    if any(one.harmed for one in results):
        sys.exit(1)


@bench.command()
@click.option("--rounds", default=5, show_default=True, help="Turns of each variant.")
@click.option("--seconds", default=5, show_default=True, help="Length of each measure.")
@click.option("--variants", metavar="NAME,…", help="Variants to measure. Default: all.")
@click.option("--measures", metavar="NAME,…", help="Measures to take. Default: all.")
@click.option(
    "--idle", default=1000, show_default=True, help="Connections open while memory is read."
)
@click.option(
    "--services", default=1, show_default=True, help="Virtual servers beside the measured one."
)
@_output_options
def datapath(
    rounds: int,
    seconds: int,
    variants: str | None,
    measures: str | None,
    idle: int,
    services: int,
    as_json: bool,
    output: str | None,
) -> None:
    """What packets get: throughput, requests, connections, latency, processor time, memory.

    Each mode of vipd beside a direct way and HAProxy. Exits with 1 where a measure failed.
    """
    from vipd.bench import datapath_plan as planned
    from vipd.bench import datapath_report as report
    from vipd.bench.datapath import measure
    from vipd.proxy.cli.output import print_table

    for name, value, least, most in (
        ("rounds", rounds, 1, 1000),
        ("seconds", seconds, 1, 3600),
        ("idle", idle, 1, planned.MOST_IDLE),
        ("services", services, 0, planned.MOST_SERVICES),
    ):
        if not least <= value <= most:
            raise click.BadParameter(f"{least} to {most}", param_hint=f"--{name}")
    plan = planned.Plan(
        variants=_named(variants, planned.VARIANTS, "--variants"),
        measures=planned.measures(_named(measures, tuple(planned.Measure), "--measures")),
        rounds=rounds,
        seconds=seconds,
        idle=idle,
        services=services,
        workers=len(os.sched_getaffinity(0)),
    )
    with Stages("datapath") as progress:
        result = measure(plan, progress)
    if not _told_as_json("datapath", [result], as_json, output):
        click.echo(" · ".join(f"{name} {value}" for name, value in result.tools.items()))
        print_table(*report.table(result))
        headings, rows = report.ratio_table(result)
        if rows:
            click.echo()
            print_table(headings, rows)
    _tell_what_spoils(result.busy_cores, result.unavailable, result.failures)


@bench.command()
@click.option("--rounds", default=5, show_default=True, help="Turns of each server.")
@click.option("--seconds", default=3, show_default=True, help="Length of each measure of load.")
@click.option("--variants", metavar="NAME,…", help="Servers to measure. Default: all.")
@click.option("--measures", metavar="NAME,…", help="Measures to take. Default: all.")
@click.option("--services", default=10_000, show_default=True, help="Services with a cluster IP.")
@click.option(
    "--headless", default=2000, show_default=True, help="Endpoints of a headless service."
)
@click.option(
    "--rate", default=5000, show_default=True, help="Questions a second while time is taken."
)
@click.option("--changes", default=200, show_default=True, help="Changes, one at a time.")
@_output_options
def dns(
    rounds: int,
    seconds: int,
    variants: str | None,
    measures: str | None,
    services: int,
    headless: int,
    rate: int,
    changes: int,
    as_json: bool,
    output: str | None,
) -> None:
    """Names: questions a second, latency, memory, start, and from a change to its answer.

    vipd beside unbound, Knot DNS, dnsmasq and CoreDNS, one thread each, with the same names.
    Exits with 1 where a measure failed.
    """
    from vipd.bench import dns_plan as planned
    from vipd.bench import dns_report as report
    from vipd.bench.dns import measure
    from vipd.proxy.cli.output import print_table

    for name, value, least, most in (
        ("rounds", rounds, 1, 1000),
        ("seconds", seconds, 1, 3600),
        ("services", services, planned.LEAST_SERVICES, planned.MOST_SERVICES),
        ("headless", headless, 1, 100_000),
        ("rate", rate, 1, planned.MOST_RATE),
        ("changes", changes, 4, 100_000),
    ):
        if not least <= value <= most:
            raise click.BadParameter(f"{least} to {most}", param_hint=f"--{name}")
    wanted = _named(measures, tuple(planned.Measure), "--measures")
    plan = planned.Plan(
        variants=_named(variants, planned.VARIANTS, "--variants"),
        measures=tuple(one for one in planned.Measure if one in wanted),
        rounds=rounds,
        seconds=seconds,
        services=services,
        headless=headless,
        rate=rate,
        changes=changes,
    )
    with Stages("dns") as progress:
        result = measure(plan, progress)
    if not _told_as_json("dns", [result], as_json, output):
        click.echo(" · ".join(f"{name} {value}" for name, value in result.tools.items()))
        for make in (report.table, report.ratio_table, report.target_table):
            headings, rows = make(result)
            if rows:
                click.echo()
                print_table(headings, rows)
    _tell_what_spoils(result.busy_cores, result.unavailable, result.failures)


def _tell_what_spoils(
    busy_cores: float, unavailable: Mapping[str, str], failures: Sequence[str]
) -> None:
    """Say what is wrong with a run; exit with 1 where a measure failed."""
    if busy_cores > BUSY_CORES:
        told = f"{busy_cores} cores were busy before the run: do not rely on its figures"
        click.echo(told, err=True)
    for variant, why in unavailable.items():
        click.echo(f"without {variant}: {why}", err=True)
    for line in failures:
        click.echo(line, err=True)
    if failures:
        sys.exit(1)


N = TypeVar("N", bound=str)


def _named(text: str | None, known: Sequence[N], option: str) -> tuple[N, ...]:
    """Return those of the known names that a list names, in its order; all where there is none."""
    if text is None:
        return tuple(known)
    by_name = {str(one): one for one in known}
    names = dict.fromkeys(one.strip() for one in text.split(",") if one.strip())
    for one in names:
        if one not in by_name:
            raise click.BadParameter(f"{one!r} is none of {', '.join(by_name)}", param_hint=option)
    if not names:
        raise click.BadParameter("nothing is named", param_hint=option)
    return tuple(by_name[one] for one in names)


def _rate(text: str) -> float | None:
    if text == "max":
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 100_000:
        raise click.BadParameter(f"{text!r} is no number of connections", param_hint="--rate")
    return number


def _pairs(text: str | None) -> list[tuple[str, str]]:
    """Return what was asked for, or every pair that this host can do; say what it cannot."""
    from vipd.backends.registry import MODES
    from vipd.bench.switch import CONTROL, lacking, pairs

    if text is None:
        missing = lacking(MODES)
        for mode, what in missing.items():
            click.echo(f"without {mode}: {what}", err=True)
        return pairs([mode for mode in MODES if mode not in missing])
    found = []
    for one in text.split(","):
        origin, arrow, target = one.strip().partition(":")
        known = origin in MODES and (target in MODES if arrow else True) and origin != target
        if not known:
            modes = ", ".join(MODES)
            why = f"{one!r} is not like nftables:iptables (modes: {modes})"
            raise click.BadParameter(why, param_hint="--pairs")
        found.append((origin, target or CONTROL))
    return found


def _told_as_json(kind: str, results: Sequence[object], as_json: bool, output: str | None) -> bool:
    """Write the figures where they are wanted as JSON; else say on what machine they were made."""
    from pathlib import Path

    import msgspec

    from vipd.bench.machine import machine

    facts = machine()
    command = " ".join(["vipd", *sys.argv[1:]])
    document = msgspec.json.format(
        msgspec.json.encode(
            {"bench": kind, "command": command, "machine": facts, "results": results}
        )
    )
    if output is not None:
        Path(output).write_bytes(document + b"\n")
    told = " · ".join(f"{name} {value}" for name, value in facts.items())
    click.echo(document.decode() if as_json else told)
    return as_json


def _size(text: str) -> tuple[int, int]:
    services, _, endpoints = text.strip().partition("x")
    if not (services.isdecimal() and endpoints.isdecimal() and int(services) and int(endpoints)):
        raise click.BadParameter(f"{text!r} is not like 100x5", param_hint="--sizes")
    # The address plan of bench/sync_cluster.py.
    if int(services) > 59_000 or int(services) * int(endpoints) > 3_900_000:
        raise click.BadParameter(f"{text!r} is too large", param_hint="--sizes")
    return int(services), int(endpoints)
