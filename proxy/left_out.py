"""Why an endpoint of a service is not chosen: the other half of proxy/endpoints.py, in words.

Lives here: the reason for each endpoint that the slices name and a virtual server does not use.
Must not: choose. What is used is handed in.
"""

from collections.abc import Collection, Iterator

from msgspec import Struct

from vipd.backends.slots import MOST_SLOTS
from vipd.proxy.model import EndpointSlice, SliceEndpoint
from vipd.proxy.names import Address
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot
from vipd.proxy.virtualserver import Endpoint, VirtualServer

_MOST_FLAWS = 3
"""Wrong ports of a slice that are named."""


class LeftOut(Struct, frozen=True, omit_defaults=True):
    """An endpoint that a new connection cannot be given to."""

    endpoint: str
    """``address:port``; the address alone where its slice does not have the port."""
    why: str
    pod: str | None = None
    node: str | None = None


class _Here(Struct, frozen=True):
    """What the reasons are measured against."""

    node: str
    zone: str | None
    local_only: bool
    hint: str
    """Which hints decide: node, zone, or none."""
    denied: str


def left_out(
    snapshot: Snapshot,
    server: VirtualServer,
    settings: NodeSettings,
    used: tuple[Endpoint, ...],
    local_only: bool,
    denied: str,
) -> tuple[LeftOut, ...]:
    """Return every endpoint of the service port that is not in `used`, sorted by address.

    `local_only` tells that only endpoints of this node may be used, `denied` why the source may
    not connect at all (empty: it may). Costs as much as the service has endpoints.
    """
    slices = [
        one
        for one in snapshot.slices.get(server.owner.service, ())
        if one.family is server.key.family and not one.headless
    ]
    known = _places(slices, server)
    ready = [told for told in known.values() if told.ready]
    node = snapshot.nodes.get(settings.node_name)
    zone = node.zone if node else None
    here = _Here(
        node=settings.node_name,
        zone=zone,
        local_only=local_only,
        hint="" if local_only else _deciding_hint(ready, settings.node_name, zone),
        denied=denied,
    )
    taken = {(one.address, one.port) for one in used[:MOST_SLOTS]}
    made = [
        LeftOut(_text(address, port), _reason(told, here), told.pod, told.node)
        for (address, port), told in sorted(known.items(), key=_by_place)
        if (address, port) not in taken
    ]
    return (*made, *_without_port(slices, server))


def _by_place(item: tuple[tuple[Address, int], SliceEndpoint]) -> tuple[int, int]:
    (address, port), _ = item
    return int(address), port


def _text(address: Address, port: int) -> str:
    return str(Endpoint(address, port))


def _places(
    slices: list[EndpointSlice], server: VirtualServer
) -> dict[tuple[Address, int], SliceEndpoint]:
    """Return each place with the best that is told of it; among equals the first."""
    best: dict[tuple[Address, int], SliceEndpoint] = {}
    for one in slices:
        for port in one.ports:
            if port.name != server.owner.port or port.protocol is not server.owner.protocol:
                continue
            for told in one.endpoints:
                held = best.setdefault((told.address, port.port), told)
                if _standing(told) > _standing(held):
                    best[told.address, port.port] = told
    return best


def _standing(told: SliceEndpoint) -> int:
    """Return what makes one of two slices' words about an endpoint the better one."""
    return 2 if told.ready else int(told.serving and told.terminating)


def _deciding_hint(ready: list[SliceEndpoint], node: str, zone: str | None) -> str:
    if all(told.node_hints for told in ready) and any(node in told.node_hints for told in ready):
        return "node"
    if all(told.zone_hints for told in ready) and any(zone in told.zone_hints for told in ready):
        return "zone"
    return ""


def _reason(told: SliceEndpoint, here: _Here) -> str:
    elsewhere = here.local_only and told.node != here.node
    if not told.ready and not (told.serving and told.terminating):
        return "terminating, and no longer serving" if told.terminating else "not ready"
    if elsewhere:
        runs = f"runs on {told.node}" if told.node else "nobody says on which node it runs"
        return f"{runs}; policy Local takes those of {here.node}"
    if not told.ready:
        return "terminating: gets no new connection while another endpoint is ready"
    if here.hint == "node" and here.node not in told.node_hints:
        return f"hinted for node {_listed(told.node_hints)}, others for this one ({here.node})"
    if here.hint == "zone" and here.zone not in told.zone_hints:
        return f"hinted for zone {_listed(told.zone_hints)}, others for this one ({here.zone})"
    if here.denied:
        return here.denied
    return f"a virtual server has at most {MOST_SLOTS} endpoints"


def _without_port(slices: list[EndpointSlice], server: VirtualServer) -> Iterator[LeftOut]:
    """Yield the endpoints of slices that do not have the port."""
    wanted = server.owner
    for one in slices:
        if any(port.name == wanted.port and port.protocol is wanted.protocol for port in one.ports):
            continue
        there = ", ".join(f"{port.name or 'unnamed'}/{port.protocol}" for port in one.ports)
        wrong = "".join(f"; {flaw.field}: {flaw.why}" for flaw in one.flaws[:_MOST_FLAWS])
        for told in one.endpoints:
            yield LeftOut(
                str(told.address),
                f"slice {one.name} has no port {wanted.port or 'without a name'}"
                f"/{wanted.protocol} (it has {there or 'none'}{wrong})",
                told.pod,
                told.node,
            )


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
