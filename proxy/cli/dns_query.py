"""`vipd dns query`: a real question to the DNS server, and where its answer comes from.

Lives here: the command and what it prints. Must not: ask (dns_asking.py), or know why an answer is
as it is (dns/tracing.py does).
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from vipd.proxy.cli.options import json_option, socket_option

if TYPE_CHECKING:
    import dns.rrset

    from vipd.dns.tracing import Trace
    from vipd.proxy.cli.dns_asking import Reply

_INDENT = " " * 6


@click.command()
@click.argument("name")
@click.argument("kind", required=False, metavar="[TYPE]")
@click.option(
    "--trace", is_flag=True, help="Say which object each record came from, and what is missing why."
)
@click.option(
    "-n", "--namespace", default="", metavar="NS", help="Ask by the search list of a pod of it."
)
@click.option(
    "--server", metavar="ADDR:PORT", help="Whom to ask. Default: where the daemon answers."
)
@click.option(
    "-f",
    "--manifests",
    multiple=True,
    metavar="PATH",
    help="Answer from manifests, without a daemon and without a packet. Repeatable.",
)
@click.option("--config", metavar="FILE", help="With -f: VipdConfiguration; its section dns.")
@click.option(
    "--cluster-domain", multiple=True, metavar="NAME", help="With -f, or -n and --server."
)
@click.option("--cluster-cidr", metavar="CIDR[,CIDR]", help="With -f: pod networks.")
@click.option("--service-cidr", metavar="CIDR[,CIDR]", help="With -f: ranges of cluster IPs.")
@socket_option
@json_option
def query(
    name: str,
    kind: str | None,
    trace: bool,
    namespace: str,
    server: str | None,
    manifests: tuple[str, ...],
    socket: str | None,
    as_json: bool,
    **told: Any,
) -> None:
    """Ask for NAME as a program would, and print what comes back. An address is asked in reverse.

    TYPE is A where not said. Exit code 1 where there are no such records.

    Try it: vipd dns query web.default.svc.cluster.local --trace -f examples
    """
    import msgspec

    from vipd.dns.tracing import Asked
    from vipd.proxy.cli import dns_asking
    from vipd.proxy.cli.main import FAILED
    from vipd.proxy.cli.output import print_json

    if manifests and server is not None:
        raise click.UsageError("--manifests and --server exclude each other")
    name, number = dns_asking.question(name, kind)
    asked = Asked(name=name, type=number, namespace=namespace)
    if manifests:
        source = dns_asking.offline(asked, manifests, told)
    else:
        source = dns_asking.online(asked, server, socket, told["cluster_domain"], trace=trace)
    said: list[tuple[str, Reply | None, Trace | None]] = []
    for one, traced in source.names:
        reply = source.ask(one, traced)
        said.append((one, reply, traced if trace or reply is None else None))
        if reply is not None and reply.is_answer:
            break
    if as_json:
        print_json(msgspec.json.encode([view(*one) for one in said]))
    else:
        for at, (one, reply, traced) in enumerate(said, 1):
            for line in lines(one, number, reply, traced):
                click.echo(line)
            if at < len(said) and reply is not None and reply.message.rcode() == 0:
                click.echo("  note: the name exists: musl's resolver asks no further")
    if not any(reply is not None and reply.is_answer for _, reply, _ in said):
        sys.exit(FAILED)


def lines(name: str, kind: int, reply: "Reply | None", traced: "Trace | None") -> Iterator[str]:
    """Yield what people read of one question: the reply, and behind each record its origin."""
    import dns.rdatatype

    from vipd.proxy.cli.output import printable

    yield f"{printable(name)} {dns.rdatatype.to_text(dns.rdatatype.RdataType.make(kind))}: " + (
        "not asked" if reply is None else reply.outcome
    )
    if reply is not None and reply.stranger:
        yield (
            f"  note: the reply is not this daemon's: another server answers at {reply.stranger} "
            "from here; below is what the daemon would say"
        )
    origins = {} if reply is not None and reply.stranger else dict(_origins(traced))
    for records, heading in _sections(reply):
        for rrset in records:
            for one in rrset:
                record = f"{dns.rdatatype.to_text(rrset.rdtype)} {one.to_text()}"
                yield f"  {heading}{rrset.name} {rrset.ttl} {printable(record)}"
                if record in origins:
                    yield f"{_INDENT}{printable(origins[record])}"
    for line in _told(traced, reply):
        yield f"  {printable(line)}"


def _sections(reply: "Reply | None") -> "Iterator[tuple[Sequence[dns.rrset.RRset], str]]":
    if reply is not None:
        yield reply.message.answer, ""
        yield reply.message.additional, "also: "


def _origins(traced: "Trace | None") -> Iterator[tuple[str, str]]:
    while traced is not None:
        for one in traced.origins:
            yield one.record, one.source
        traced = traced.tail


def _told(traced: "Trace | None", reply: "Reply | None") -> Iterator[str]:
    if reply is not None and reply.said:
        yield f"said: {reply.said}"
    shown = False
    while traced is not None:
        if shown or reply is None or not reply.is_answer:
            yield f"{'then ' + traced.name + ': ' if shown else ''}{traced.ending}"
        if not traced.ours:
            whence = reply.whence if reply is not None and reply.whence else traced.others
            yield f"answered by: {whence or 'others'}"
        if traced.ours or reply is None or not reply.is_answer:
            yield from (f"note: {one}" for one in traced.notes)
        yield from (f"missing: {one.what}: {one.why}" for one in traced.missing)
        traced, shown = traced.tail, True


def view(name: str, reply: "Reply | None", traced: "Trace | None") -> Mapping[str, object]:
    """Return what programs read of one question."""
    import dns.rdatatype

    return {
        "name": name,
        "asked": reply is not None,
        **({} if reply is None else reply.view()),
        **({"stranger": reply.stranger} if reply is not None and reply.stranger else {}),
        "records": [
            {
                "name": rrset.name.to_text(),
                "ttl": rrset.ttl,
                "type": dns.rdatatype.to_text(rrset.rdtype),
                "data": one.to_text(),
                "additional": bool(heading),
            }
            for records, heading in _sections(reply)
            for rrset in records
            for one in rrset
        ],
        "trace": traced,
    }
