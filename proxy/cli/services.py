"""`vipd services`: virtual servers, their endpoints, and what was counted of them."""

from collections.abc import Iterator, Sequence
from math import ceil
from typing import TYPE_CHECKING

import click

from vipd.proxy.cli.options import json_option, socket_option
from vipd.proxy.cli.output import print_json, print_table

if TYPE_CHECKING:
    from vipd.proxy.counted import CountersView, EndpointCountersView
    from vipd.proxy.views import EndpointView, VirtualServerView

MOST_ENDPOINTS = 3
"""Endpoints of a virtual server that are shown unless all are asked for."""
HEADINGS = ("SERVICE", "KIND", "ADDRESS", "ENDPOINTS", "NOTES")
COUNTED = ("OPEN", "SO FAR")


@click.command()
@click.argument("name", required=False, metavar="[[NAMESPACE/]NAME]")
@click.option("--wide", is_flag=True, help="Show every endpoint, and what was counted of each.")
@socket_option
@json_option
def services(name: str | None, wide: bool, socket: str | None, as_json: bool) -> None:
    """List virtual servers and their endpoints, of all services or of one.

    In a mode that counts: also the connections that are open, and those so far.
    """
    import msgspec

    from vipd.proxy.config import DEFAULT_SOCKET
    from vipd.proxy.errors import ControlError
    from vipd.proxy.views import VirtualServerView

    wanted = None if name is None else name if "/" in name else f"default/{name}"
    document = _ask(socket if socket is not None else DEFAULT_SOCKET, wanted)
    shown = msgspec.json.decode(document, type=list[VirtualServerView])
    if wanted is not None:
        shown = [one for one in shown if wanted in (one.service, one.service.rpartition(":")[0])]
        if not shown:
            raise ControlError(
                f"no service {wanted} is served here (what could not be read: `vipd status`)"
            )
    if as_json:
        print_json(msgspec.json.encode(shown))
        return
    print_table(*table(shown, every=wide))


def _ask(path: str, name: str | None) -> bytes:
    """Return the virtual servers with counters, or without where they cannot be had."""
    from vipd.proxy.control import read
    from vipd.proxy.errors import ControlError

    try:
        return read(path, "services", "counters" if name is None else f"counters {name}")
    except ControlError as error:
        document = read(path, "services")
        click.echo(f"vipd: counters are not known: {error}", err=True)
        return document


def table(
    shown: "Sequence[VirtualServerView]", *, every: bool = False
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return headings and rows; with columns of counters where any virtual server has some."""
    counted = any(one.counters is not None for one in shown)
    headings = (*HEADINGS[:4], *COUNTED, *HEADINGS[4:]) if counted else HEADINGS
    return headings, [_row(one, counted=counted, every=every) for one in shown]


def _row(one: "VirtualServerView", *, counted: bool, every: bool) -> Sequence[str]:
    used = one.endpoints if one.policy == "cluster" else one.local_endpoints
    target = ", ".join(_endpoints(one, used if every else used[:MOST_ENDPOINTS], every=every))
    target += f", … {len(used)} in all" if len(used) > MOST_ENDPOINTS and not every else ""
    told = one.counters
    counters = (_number(told.open), _number(told.so_far)) if told is not None else ("", "")
    return (
        one.service,
        one.kind,
        f"{one.address}/{one.protocol}",
        "this node's DNS server" if one.by_dns else target or f"none: {one.refusal}",
        *(counters if counted else ()),
        ", ".join(_notes(one, every=every)),
    )


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _notes(one: "VirtualServerView", *, every: bool) -> Iterator[str]:
    if one.rejected is not None:
        yield f"REJECTED: {one.rejected}"
    if one.algorithm != "random":
        yield one.algorithm
    if one.affinity_seconds:
        yield f"affinity {one.affinity_seconds}s"
    if one.allowed_sources is not None:
        yield f"from {','.join(one.allowed_sources) or 'nobody'}"
    if one.policy != "cluster":
        yield "local only"
    if one.proxy_protocol:
        yield "PROXY protocol"
    if one.keeps_failing:
        yield "failing endpoints stay"
    if one.counters is not None:
        if every and one.affinity_seconds:
            yield f"{one.counters.remembered or 0} remembered"
        yield from _alarms(one.counters)


def _alarms(told: "CountersView") -> Iterator[str]:
    """Yield what somebody should look at."""
    aside = sum(bool(one.set_aside) for one in told.endpoints)
    failures = sum(one.failures or 0 for one in told.endpoints)
    left = sum(one.open or 0 for one in told.endpoints if one.departed)
    for count, what in (
        (failures, "failed"),
        (aside, "set aside"),
        (told.denied, "denied"),
        (told.unserved, "unserved"),
        (left, "open to endpoints that left"),
        (told.forgotten, "forgotten for lack of room"),
    ):
        if count:
            yield f"{count} {what}"


def _endpoints(
    server: "VirtualServerView", shown: "Sequence[EndpointView]", *, every: bool
) -> Iterator[str]:
    told = server.counters
    counted = {one.address: one for one in told.endpoints} if told is not None else {}
    workers = len(told.workers) if told is not None else 0
    for one in shown:
        text = one.address if one.weight == 1 else f"{one.address}×{one.weight}"
        known = counted.get(one.address)
        said = list(_counted(known, workers, every=every)) if known is not None else []
        yield f"{text} ({', '.join(said)})" if said else text
    if every:
        for each in counted.values():
            if each.departed:
                yield f"{each.address} (left, {each.open or 0} open)"


def _counted(told: "EndpointCountersView", workers: int, *, every: bool) -> Iterator[str]:
    if every:
        for count, what in (
            (told.open, "open"),
            (told.so_far, "so far"),
            (told.failures, "failed"),
        ):
            if count is not None and (count or what != "failed"):
                yield f"{count} {what}"
    if told.set_aside:
        seconds = max(one.seconds for one in told.set_aside)
        by = len(told.set_aside)
        said = f"set aside {ceil(seconds)} s" if seconds else "set aside, tried next"
        yield said + (f" by {by} of {workers} workers" if by < workers else "")
