"""The status page: one HTML document that a person reads, without JavaScript.

Lives here: its markup. Pure. Must not: ask anybody. Nothing external is loaded, every text is
escaped, and lists have an end: names come from whoever may create a Service.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape

from vipd.proxy.counted import EndpointCountersView
from vipd.proxy.http.answer import HTML, Answer
from vipd.proxy.status import Status, dns_line, drain_lines, repair_lines
from vipd.proxy.views import EndpointView, VirtualServerView
from vipd.proxy.words import counted

MOST_SERVERS = 200
"""Rows of the table of virtual servers."""
MOST_ENDPOINTS = 8
"""Endpoints of each row."""
MOST_SENTENCES = 20
"""Under each heading."""
REFRESH_SECONDS = 15
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'"
_STYLE = (
    "body{font:14px/1.4 system-ui,sans-serif;margin:1.5em;max-width:80em}"
    "table{border-collapse:collapse;margin:.5em 0 1.5em}"
    "th,td{text-align:left;vertical-align:top;padding:.15em 1em .15em 0;"
    "border-bottom:1px solid #8883}"
    "small{opacity:.7}.bad{color:#b00020}.good{color:#0a6b2c}"
    ":root{color-scheme:light dark}"
)


def status_page(
    status: Status, servers: Sequence[VirtualServerView], total: int, now: float
) -> Answer:
    """Return the page. `servers` are the first of `total`; `now` in seconds since the epoch."""
    body = "".join(_parts(status, servers, total, now))
    return Answer(
        body.encode(errors="replace"),
        HTML,
        headers={"Content-Security-Policy": _POLICY, "Cache-Control": "no-store"},
    )


def _parts(
    status: Status, servers: Sequence[VirtualServerView], total: int, now: float
) -> Iterator[str]:
    title = escape(f"vipd on {status.node}")
    health = ("bad", "degraded") if status.degraded else ("good", "good")
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    yield f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}"><style>{_STYLE}</style></head>'
    yield f'<body><h1>{title}</h1><p class="{health[0]}">health: {health[1]}</p>'
    yield from _table((), _facts(status, now))
    for heading, sentences in _sentences(status, now):
        yield from _list(heading, sentences)
    yield f"<h2>Virtual servers</h2><p>{counted(total, 'virtual server')}"
    if total > len(servers):
        yield f", the first {len(servers)} of them here; all: <code>vipd services</code>"
    yield "</p>"
    yield from _table(("service", "kind", "address", "policy", "endpoints"), map(_row, servers))
    yield f"<small>{_moment(now)}, refreshed every {REFRESH_SECONDS} s</small></body></html>\n"


def _facts(status: Status, now: float) -> Iterator[tuple[str, str]]:
    yield "version", escape(f"{status.version}, pid {status.pid}")
    yield "up", escape(f"{_lasting(now - status.started)}, since {_moment(status.started)}")
    yield "mode", escape(f"{status.mode} {status.why_mode}".strip())
    source = ", ".join(status.manifests) or f"the API server of {status.kubeconfig or 'this pod'}"
    yield "source", escape(source)
    yield (
        "serving",
        escape(
            f"{counted(status.services, 'service')}, "
            f"{counted(status.virtual_servers, 'virtual server')}, "
            f"{counted(status.endpoints, 'endpoint')}"
        ),
    )
    last = status.last_sync
    told = "none yet"
    if last is not None:
        told = (
            f"{_lasting(now - last.at)} ago: {counted(last.virtual_servers, 'virtual server')}, "
            f"{counted(last.objects, 'kernel object')}, {last.milliseconds:g} ms"
        )
    yield "last sync", escape(told)
    yield "syncs", escape(f"{status.syncs}, failed {status.failed_syncs}")
    if status.switch is not None:
        way = f"{status.switch.origin} → {status.switch.target}"
        state = "under way" if status.switch.ended is None else status.switch.failure or "done"
        yield "last switch", escape(f"{way}: {state}")
    if status.dns_listen:
        yield "DNS", escape(dns_line(status.dns_listen, status.dns, status.dns_elsewhere))
    if status.http:
        yield "HTTP", escape(", ".join(status.http))
    for one in status.workers[:MOST_ENDPOINTS]:
        yield f"worker {one.number}", escape(f"pid {one.pid}, {one.open} open")


def _sentences(status: Status, now: float) -> Iterator[tuple[str, Sequence[str]]]:
    yield "Failing", [one for one in (status.failure, *status.trouble) if one]
    yield "Rejected", status.rejected
    yield "Not read", status.problems
    yield "Conflicts", status.conflicts
    yield "Repaired", list(repair_lines(status.repairs, now)) if status.repairs else ()
    yield "Draining", list(drain_lines(status.drains, now))
    yield "Notes", status.notes


def _list(heading: str, sentences: Sequence[str]) -> Iterator[str]:
    if not sentences:
        return
    yield f"<h2>{heading}</h2><ul>"
    for one in sentences[:MOST_SENTENCES]:
        yield f"<li>{escape(one)}</li>"
    if len(sentences) > MOST_SENTENCES:
        yield f"<li>… and {len(sentences) - MOST_SENTENCES} more</li>"
    yield "</ul>"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a table; cells are markup already."""
    yield "<table>"
    if headings:
        yield f"<tr>{''.join(f'<th>{one}</th>' for one in headings)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{one}</td>' for one in row)}</tr>"
    yield "</table>"


def _row(server: VirtualServerView) -> Sequence[str]:
    policy = server.policy
    if server.refusal:
        policy += f", {server.refusal}s: no endpoint"
    if server.by_dns:
        policy = "answered by vipd's DNS server"
    where = f"{server.address}/{server.protocol}"
    cells = [escape(one) for one in (server.service, server.kind, where, policy)]
    if server.rejected:
        cells[3] += f' <span class="bad">{escape(server.rejected)}</span>'
    return [*cells, _endpoints(server)]


def _endpoints(server: VirtualServerView) -> str:
    every = {one.address: one for one in (*server.endpoints, *server.local_endpoints)}
    known = server.counters.endpoints if server.counters is not None else []
    counters = {one.address: one for one in known}
    shown = [_endpoint(one, counters) for one in list(every.values())[:MOST_ENDPOINTS]]
    if len(every) > MOST_ENDPOINTS:
        shown.append(f"… {len(every)} in all")
    return "<br>".join(shown)


def _endpoint(one: EndpointView, counters: Mapping[str, EndpointCountersView]) -> str:
    words = [one.address]
    if one.pod:
        words.append(one.pod)
    if one.local:
        words.append("here")
    if one.terminating:
        words.append("terminating")
    known = counters.get(one.address)
    if known is not None and known.open is not None:
        words.append(f"{known.open} open")
    if known is not None and known.so_far is not None:
        words.append(f"{known.so_far} so far")
    return escape(", ".join(words))


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _lasting(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
