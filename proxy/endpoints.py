"""Which endpoints of a service port may be used from this node: readiness, hints, local policy.

Lives here: merging of slices and the choice among them. Must not: know addresses or policies
of the service itself (resolve.py), nor do I/O.
Sources: KEP-1669 (terminating endpoints), KEP-2433 and KEP-3015 (zone and node hints).
"""

from collections.abc import Callable, Iterable

from msgspec import Struct

from vipd.proxy.model import EndpointSlice, SliceEndpoint
from vipd.proxy.names import Address, Family, ServicePortName
from vipd.proxy.virtualserver import Endpoint

# An endpoint's standing; the higher one wins where the same address and port stands in two slices.
_UNUSABLE, _SERVING_WHILE_TERMINATING, _READY = 0, 1, 2


class Here(Struct, frozen=True):
    """This node, as endpoints see it: its name and zone (None where unknown)."""

    node: str
    zone: str | None


class Usable(Struct, frozen=True):
    """The endpoints of a service port for one family.

    `cluster` and `local` are the lists for the two policies, sorted by address and port; `anywhere`
    tells whether any endpoint is ready, or serving while terminating, on whatever node.
    """

    cluster: tuple[Endpoint, ...]
    local: tuple[Endpoint, ...]
    anywhere: bool


class _Candidate(Struct):
    port: int
    standing: int
    told: SliceEndpoint


def usable(
    slices: Iterable[EndpointSlice],
    port: ServicePortName,
    family: Family,
    here: Here,
    weight: Callable[[SliceEndpoint], int],
) -> Usable:
    """Return the endpoints that traffic to `port` may reach from `here`.

    Cluster policy: ready endpoints, those hinted for this node or else this zone where every ready
    one has hints; none ready, then all that serve while terminating. Local policy: the same among
    the endpoints on this node, without hints. Endpoints that are neither are never used.
    """
    known = _merge(slices, port, family)
    ready = [one for one in known if one.standing == _READY]
    draining = [one for one in known if one.standing == _SERVING_WHILE_TERMINATING]
    cluster = _hinted(ready, here) or draining
    on_node = [one for one in ready if one.told.node == here.node]
    local = on_node or [one for one in draining if one.told.node == here.node]

    made: dict[int, Endpoint] = {}

    def endpoint(one: _Candidate) -> Endpoint:
        if id(one) not in made:
            told = one.told
            made[id(one)] = Endpoint(
                told.address,
                one.port,
                weight(told),
                told.node == here.node,
                one.standing == _SERVING_WHILE_TERMINATING,
                told.pod,
                told.node,
            )
        return made[id(one)]

    return Usable(
        cluster=tuple(map(endpoint, cluster)),
        local=tuple(map(endpoint, local)),
        anywhere=bool(ready or draining),
    )


def _merge(
    slices: Iterable[EndpointSlice], port: ServicePortName, family: Family
) -> list[_Candidate]:
    """Return each address and port once, in its best standing, sorted by address and port.

    Upstream lets chance (map order) decide between two slices; here the better standing wins, and
    among equals the slice whose name comes first.
    """
    best: dict[tuple[Address, int], _Candidate] = {}
    for one in slices:
        if one.family is not family or one.headless:
            continue
        for slice_port in one.ports:
            if slice_port.name != port.port or slice_port.protocol is not port.protocol:
                continue
            for told in one.endpoints:
                place = (told.address, slice_port.port)
                standing = _standing(told)
                held = best.get(place)
                if held is None or standing > held.standing:
                    best[place] = _Candidate(slice_port.port, standing, told)
    if len(best) < 2:
        return list(best.values())
    return [best[place] for place in sorted(best, key=lambda place: (int(place[0]), place[1]))]


def _standing(told: SliceEndpoint) -> int:
    if told.ready:
        return _READY
    return _SERVING_WHILE_TERMINATING if told.serving and told.terminating else _UNUSABLE


def _hinted(ready: list[_Candidate], here: Here) -> list[_Candidate]:
    """Return the ready endpoints that hints prefer; all of them where one lacks the hint."""
    if not ready or not (ready[0].told.node_hints or ready[0].told.zone_hints):
        return ready
    if all(one.told.node_hints for one in ready):
        near = [one for one in ready if here.node in one.told.node_hints]
        if near:
            return near
    if here.zone is not None and all(one.told.zone_hints for one in ready):
        near = [one for one in ready if here.zone in one.told.zone_hints]
        if near:
            return near
    return ready
