"""The notation of the expected tables: one line for each virtual server; README.md explains it."""

from collections.abc import Iterable

from vipd.proxy.model import Algorithm
from vipd.proxy.virtualserver import (
    Endpoint,
    Kind,
    Masquerade,
    NodeNetwork,
    Refusal,
    Table,
    Use,
    VirtualServer,
)

_KIND = {
    Kind.CLUSTER: "cluster IP",
    Kind.LOAD_BALANCER: "load balancer",
    Kind.EXTERNAL: "external IP",
    Kind.NODE_PORT: "",
}


def table_lines(table: Table) -> list[str]:
    """Return the table: virtual servers by key, then conflicts."""
    servers = sorted(table.virtual_servers(), key=lambda one: one.key.sort_key())
    conflicts = sorted(table.contested.values(), key=lambda one: one.key.sort_key())
    return [
        *map(server_line, servers),
        *(
            f"conflict: {one.key} goes to {one.winner}, not to {', '.join(map(str, one.losers))}"
            for one in conflicts
        ),
    ]


def server_line(one: VirtualServer) -> str:
    """Return one virtual server."""
    owner = str(one.owner)
    head = " ".join(part for part in (str(one.key), owner, _KIND[one.kind]) if part)
    notes = [f"{head} -> {_lists(one)}"]
    if one.masquerade is not Masquerade.NEVER:
        notes.append(f"masquerade {one.masquerade}")
    if one.affinity_seconds is not None:
        notes.append(f"affinity {one.affinity_seconds} s")
    if one.allowed_sources is not None:
        notes.append(f"only from {', '.join(map(str, one.allowed_sources)) or 'nowhere'}")
    if one.algorithm is not Algorithm.RANDOM:
        notes.append(one.algorithm.value)
    if one.scheduler:
        notes.append(f"IPVS scheduler {one.scheduler}")
    if one.drain_seconds is not None:
        notes.append(f"drain {one.drain_seconds} s")
    if one.proxy_protocol:
        notes.append("PROXY protocol")
    if one.keeps_failing:
        notes.append("failing endpoints stay")
    return " | ".join(notes)


def network_line(network: NodeNetwork) -> str:
    """Return the node-wide part."""

    def listed(values: Iterable[object], none: str) -> str:
        return ", ".join(map(str, values)) or none

    sources = network.pod_sources
    pods = f"interface {sources.interface}" if sources.interface else ""
    return " | ".join(
        (
            f"node ports on {listed(network.node_port_ranges, 'no address')}",
            f"pods are {pods or listed(sources.cidrs, 'not told')}",
            f"service range {listed(network.service_cidrs, 'not known')}",
            f"mark {network.masquerade_mark:#x}",
        )
    )


def _lists(one: VirtualServer) -> str:
    match one.use:
        case Use.CLUSTER:
            text = _endpoints(one.cluster, one)
            unused = one.local
        case Use.LOCAL:
            text = f"on this node: {_endpoints(one.local, one)}"
            unused = one.cluster
        case Use.LOCAL_FROM_OUTSIDE:
            text = f"on this node: {_endpoints(one.local, one)}; for pods and the node: "
            text += ", ".join(map(_endpoint, one.cluster)) or "nobody"
            unused = ()
    # Neither may be there where it has no meaning; shown, so that a case sees it.
    if unused:
        text += f"; NEVER USED: {', '.join(map(_endpoint, unused))}"
    if one.when_empty is Refusal.DROP and "drop" not in text:
        text += "; NEVER USED: drop"
    return text


def _endpoints(endpoints: tuple[Endpoint, ...], one: VirtualServer) -> str:
    return ", ".join(map(_endpoint, endpoints)) or f"nobody ({one.when_empty})"


def _endpoint(one: Endpoint) -> str:
    notes = [
        f"weight {one.weight}" if one.weight != 1 else "",
        "here" if one.local else "",
        "leaving" if one.terminating else "",
    ]
    told = ", ".join(note for note in notes if note)
    return f"{one} ({told})" if told else str(one)
