"""Settings and the files they name, made into what questions are decided by.

Lives here: that. Pure. Must not: open files (sources.py).
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple, Protocol

from vipd.dns.forward.hosts import Host, Hosts, parse_hosts
from vipd.dns.forward.resolv_conf import ResolvConf
from vipd.dns.forward.routes import Plan, plan
from vipd.dns.forward.settings import ForwardSettings
from vipd.dns.forward.static import Record, Static, parse_record, records_of
from vipd.dns.forward.upstream import Upstream, parse_upstream

OwnAddress = tuple[str, int]
"""Address and port that this server listens at."""
MOST_TOLD = 20
"""What is left out of a file is told so many times at most."""


class Note(Protocol):
    """Tells the operator of an event, in few words, with its facts."""

    def __call__(self, event: str, **facts: object) -> None:
        """Tell it."""


class Files(NamedTuple):
    """What the files said last."""

    resolv_conf: ResolvConf = ResolvConf()
    hosts: Hosts = Hosts((), ())


class Configured(NamedTuple):
    """What is done with names now."""

    plan: Plan
    static: Static
    trust_ad: bool


def configure(
    settings: ForwardSettings, files: Files, own: Collection[OwnAddress], note: Note
) -> Configured:
    """Make it; settings that have problems raise ValueError. What is left out is told."""
    static = Static(_records(settings, files.hosts), settings.hosts_ttl)
    _tell(note, "a record is left out", static.left_out)
    configured = settings.upstreams
    default = (
        [parse_upstream(one) for one in configured] if configured else files.resolv_conf.upstreams
    )
    made = plan(settings, _others(default, own, note))
    if not made[b"\0"]:
        note("there is no upstream: only the cluster's names, and those given here, are answered")
    trust_ad = settings.trust_ad or (files.resolv_conf.trust_ad and not configured)
    return Configured(made, static, trust_ad)


def tell_files(files: Files, settings: ForwardSettings, note: Note) -> None:
    """Tell what of the files could not be taken."""
    _tell(note, "a line is left out", files.resolv_conf.left_out, file=settings.resolv_conf)
    said = [f"line {number}: {reason}" for number, reason in files.hosts.left_out]
    _tell(note, "a line is left out", said, file=settings.hosts_file)


def _records(settings: ForwardSettings, hosts: Hosts) -> list[Record]:
    lines: Iterable[Host] = (host for line in settings.hosts for host in parse_hosts(line).hosts)
    return [
        *(parse_record(one, settings.hosts_ttl) for one in settings.records),
        *records_of([*lines, *hosts.hosts], settings.hosts_ttl),
    ]


def _others(
    upstreams: Iterable[Upstream], own: Collection[OwnAddress], note: Note
) -> list[Upstream]:
    """Return those that are not this server itself."""
    kept = []
    for one in upstreams:
        if (one.address, one.port) in own:
            note("an upstream is this server itself; it is left out", upstream=str(one))
        else:
            kept.append(one)
    return kept


def _tell(note: Note, event: str, reasons: Collection[str], **facts: object) -> None:
    for reason in list(reasons)[:MOST_TOLD]:
        note(event, reason=reason, **facts)
    if len(reasons) > MOST_TOLD:
        note(event, reason=f"and {len(reasons) - MOST_TOLD} more", **facts)
