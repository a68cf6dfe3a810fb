"""`vipd bench`: measurements, as tables for people and JSON for programs."""

import sys

import click


@click.group()
def bench() -> None:
    """Measure vipd on this machine, in network namespaces of its own. Needs root."""


@bench.command()
@click.option(
    "--sizes",
    default="100x5,1000x5,10000x5,44125x1",
    show_default=True,
    metavar="SERVICESxENDPOINTS,…",
    help="Sizes to measure.",
)
@click.option("--changes", default=200, show_default=True, help="Changes at each size.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@click.option("--output", metavar="FILE", help="Write the JSON there, too.")
def sync(sizes: str, changes: int, as_json: bool, output: str | None) -> None:
    """Time from process start, and from a change, until packets see it; memory."""
    from pathlib import Path

    import msgspec

    from vipd.bench.machine import machine
    from vipd.bench.sync import measure
    from vipd.proxy.cli.output import print_table

    wanted = [_size(one) for one in sizes.split(",") if one.strip()]
    if changes < 4:
        raise click.BadParameter("at least 4: one of each kind", param_hint="--changes")
    results = []
    for services, endpoints in wanted:
        with _progress(f"{services} × {endpoints}") as progress:
            results.append(measure(services, endpoints, changes, progress))
    document = msgspec.json.encode(
        {
            "bench": "sync",
            "command": " ".join(["vipd", *sys.argv[1:]]),
            "machine": machine(),
            "results": results,
        }
    )
    if output is not None:
        Path(output).write_bytes(msgspec.json.format(document) + b"\n")
    if as_json:
        click.echo(msgspec.json.format(document).decode())
        return
    click.echo(" · ".join(f"{name} {value}" for name, value in machine().items()))
    print_table(
        ("SERVICES", "START", "CHANGE p50", "p99", "WORST", "MB START", "CHURN", "AFTER"),
        [
            (
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


def _size(text: str) -> tuple[int, int]:
    services, _, endpoints = text.strip().partition("x")
    if not (services.isdecimal() and endpoints.isdecimal() and int(services) and int(endpoints)):
        raise click.BadParameter(f"{text!r} is not like 100x5", param_hint="--sizes")
    # The address plan of bench/sync_cluster.py.
    if int(services) > 59_000 or int(services) * int(endpoints) > 3_900_000:
        raise click.BadParameter(f"{text!r} is too large", param_hint="--sizes")
    return int(services), int(endpoints)


class _progress:
    """A bar on a terminal; elsewhere one line at the start of each stage."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._stage = ""

    def __enter__(self) -> "_progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._bar: Progress | None = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=1.0)
        else:
            self._bar = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, share: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._title} {stage}", completed=share)
        elif stage != self._stage:
            click.echo(f"{self._title}: {stage}", err=True)
        self._stage = stage
