"""`vipd explain`: what a connection meets, and why, for a person on a terminal."""

import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from vipd.proxy.cli.options import flags, json_option, node_options, socket_option
from vipd.proxy.cli.output import print_json, printable

if TYPE_CHECKING:
    from vipd.proxy.explain import Chance, Explanation
    from vipd.proxy.question import Question

WIDTH = 96
"""Columns of the text; a terminal of 100 shows it without breaking lines."""
MOST_ENDPOINTS = 20
"""Endpoints of each kind that are shown, unless all are asked for."""


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST:PORT[/PROTO]")
@click.option(
    "-f",
    "--manifests",
    "manifests",
    multiple=True,
    metavar="PATH",
    help="Explain manifests instead of the running daemon. Repeatable; - is standard input.",
)
@click.option("--interface", default="", metavar="NAME", help="Where the packet comes in.")
@click.option("--live", is_flag=True, help="Add what the kernel knows: counters, flows (root).")
@click.option("--wide", is_flag=True, help="Show every endpoint.")
@node_options
@socket_option
@json_option
def explain(
    source: str,
    destination: str,
    manifests: tuple[str, ...],
    interface: str,
    live: bool,
    wide: bool,
    socket: str | None,
    as_json: bool,
    **told: Any,
) -> None:
    """Say what the first packet of a connection from SRC to DST meets, step by step, and why.

    SRC is an address, a pod (NAMESPACE/NAME), a node's name, or "node" for this node itself. DST is
    an address, a service (NAMESPACE/NAME or NAME.NAMESPACE), or "node" for a node port. Without
    a protocol it is the one that is answered there, else TCP.

    Asks the daemon; with -f, manifests instead, without root and without a daemon.
    """
    import msgspec

    from vipd.proxy.question import Question, parse_destination, parse_source

    parse_source(source)
    parse_destination(destination)
    question = Question(
        source=source,
        destination=destination,
        interface=interface,
        mode=told["mode"] or "",
        live=live,
    )
    made = _from_manifests(question, manifests, told) if manifests else _ask(question, socket, told)
    if as_json:
        print_json(msgspec.json.encode(made))
        return
    for line in text(made, every=wide):
        click.echo(line)


def _ask(question: "Question", socket: str | None, told: dict[str, Any]) -> "Explanation":
    import msgspec

    from vipd.proxy.config import DEFAULT_SOCKET
    from vipd.proxy.control import read
    from vipd.proxy.explain import Explanation

    if any(value is not None for name, value in told.items() if name != "mode"):
        click.echo("vipd: settings are the daemon's; those given here are not used", err=True)
    argument = msgspec.json.encode(question).decode()
    document = read(socket if socket is not None else DEFAULT_SOCKET, "explain", argument)
    return msgspec.json.decode(document, type=Explanation)


def _from_manifests(
    question: "Question", manifests: tuple[str, ...], told: dict[str, Any]
) -> "Explanation":
    import asyncio

    from vipd.backends.registry import AUTO, MODES
    from vipd.proxy.config import load as load_config
    from vipd.proxy.events import Problem
    from vipd.proxy.follow import follow
    from vipd.proxy.resolve import resolve
    from vipd.proxy.snapshot import Snapshot, fold
    from vipd.proxy.sources.manifests import load

    config = load_config(flags(**told))
    events = load(manifests)
    for one in events:
        if isinstance(one, Problem) and one.error:
            click.echo(f"vipd: {one.error}", err=True)
    snapshot, _ = fold(Snapshot(), events)
    table = resolve(snapshot, config.node)
    mode = MODES[0] if config.mode == AUTO else config.mode
    return asyncio.run(follow(question, snapshot, table, config.node, config.dataplane, mode))


def text(told: "Explanation", *, every: bool = False) -> Iterator[str]:
    """Yield the lines of an explanation; at most MOST_ENDPOINTS of each kind, unless `every`."""
    most = sys.maxsize if every else MOST_ENDPOINTS
    who = f"{told.source}, {told.sender}" if told.sender else told.source
    yield from _field("from", who + (f", through {told.interface}" if told.interface else ""))
    yield from _field("to", f"{told.destination}/{told.protocol}")
    yield from _field("outcome", told.why)
    for note in told.notes:
        yield from _field("assumed", note)
    if told.rejected:
        yield from _field("rejected", told.rejected)
    server = told.server
    if server is not None:
        yield ""
        yield from _field("server", f"{server.service}, {server.kind} {server.address}")
        if server.losers:
            yield from _field("", f"also claimed by {', '.join(server.losers)}, in vain")
        for number, line in enumerate(told.policy):
            yield from _field("" if number else "policy", line)
    yield from _endpoints(told, most)
    if told.path:
        yield ""
        yield f"path of a first packet, mode {told.mode}"
        yield from _path(told)
    for heading, lines in (
        (f"what mode {told.mode} does otherwise, whatever stands above", told.differences),
        ("what is known of it now", told.live),
    ):
        if lines:
            yield ""
            yield heading
        for line in lines:
            yield from _wrapped(line, "  ", "      ")


def _path(told: "Explanation") -> Iterator[str]:
    number, where = 0, ""
    for step in told.path:
        if step.where != where:
            number, where = number + 1, step.where
            yield from _wrapped(where, f"{number:3}. ", "     ")
        yield from _wrapped(step.what, "       ", "           ")
        if step.outcome:
            yield from _wrapped(step.outcome, "         → ", "           ")


def _endpoints(told: "Explanation", most: int) -> Iterator[str]:
    if told.endpoints:
        yield ""
        yield "endpoints that may be chosen"
        yield from _columns([_chance(one) for one in told.endpoints[:most]])
        yield from _more(len(told.endpoints), most)
    if told.left_out:
        yield ""
        yield "endpoints left out"
        yield from _columns(
            [(one.endpoint, one.pod or "", one.node or "", one.why) for one in told.left_out[:most]]
        )
        yield from _more(len(told.left_out), most)
    if told.masquerade:
        yield ""
        yield from _field("masquerade", told.masquerade)
        for one in told.endpoints[:most]:
            if one.why:
                yield from _field(
                    "", f"{one.endpoint}: {'yes' if one.masqueraded else 'no'}, {one.why}"
                )


def _chance(one: "Chance") -> Sequence[str]:
    share = f"{100 * one.share:.3g} %"
    if one.slots != 1 or one.of > 1:
        share += f" ({one.slots}/{one.of})"
    where = "this node" if one.local else one.node or ""
    seen = f"sees {one.source or 'an address of this node'}"
    return (one.endpoint, one.pod or "", where, share, seen + (", terminating" * one.terminating))


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows in columns; the last one is wrapped below itself."""
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)][:-1]
    for *row, last in cells:
        head = "  " + "".join(
            f"{cell:{width}}  " for cell, width in zip(row, widths, strict=True) if width
        )
        yield from _wrapped(last, head, " " * len(head) if len(head) < WIDTH // 2 else " " * 6)


def _more(count: int, most: int) -> Iterator[str]:
    if count > most:
        yield f"  … {count} in all (--wide)"


def _field(name: str, value: str) -> Iterator[str]:
    yield from _wrapped(value, f"{name:11}", " " * 11)


def _wrapped(value: str, first: str, later: str) -> Iterator[str]:
    """Yield the text on lines of WIDTH columns; what a stranger named cannot forge one."""
    yield from textwrap.wrap(
        printable(value), WIDTH, initial_indent=first, subsequent_indent=later,
        break_long_words=False, break_on_hyphens=False,
    ) or [first.rstrip()]  # fmt: skip
