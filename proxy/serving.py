"""What a dataplane makes of an explanation: the table says what should be, this what its mode does.

Lives here: the pure step from the one to the other, for a virtual server that a mode cannot serve,
or serves in a way of its own. Must not: know any one mode (Compiler.serving tells).
"""

from msgspec.structs import replace

from vipd.backends.protocol import Serving
from vipd.proxy.explain import Chance, Explanation, Verdict
from vipd.proxy.left_out import LeftOut
from vipd.proxy.remembering import passing_over
from vipd.proxy.virtualserver import Refusal, VirtualServer

_CONNECTED = "a worker of this node connects to it"


def as_served(
    told: Explanation, server: VirtualServer, serving: Serving | None, rejected: str
) -> Explanation:
    """Return the explanation of a packet for `server` as the mode serves it.

    `serving` is None where the dataplane does not have the virtual server, and `rejected` what it
    said when it was to take it (empty: nothing).
    """
    if serving is None or not serving.served:
        return _unserved(told, server, (serving.refusal if serving else "") or rejected)
    made = replace(told, rejected=serving.refusal or rejected)
    connected = {str(one) for one in serving.connected}
    seen = [_connected(one) if one.endpoint in connected else one for one in told.endpoints]
    if seen and all(one.endpoint in connected for one in told.endpoints):
        seen = [replace(one, why="") for one in seen]
        made = replace(made, masquerade=f"yes: in mode {told.mode} workers connect to endpoints")
    return _without(replace(made, endpoints=tuple(seen)), server, serving)


def _unserved(told: Explanation, server: VirtualServer, why: str) -> Explanation:
    what = f"{server.owner} at {server.key}"
    said = (
        f"mode {told.mode} cannot serve {what}: {why}" if why else f"{what} is not programmed yet"
    )
    return replace(
        told,
        verdict=Verdict.UNSERVED,
        why=f"not served: {said}",
        masquerade="",
        endpoints=(),
        left_out=(*(_left_out(one, "not served here") for one in told.endpoints), *told.left_out),
    )


def _connected(one: Chance) -> Chance:
    return replace(one, masqueraded=True, source="", why=_CONNECTED)


def _without(told: Explanation, server: VirtualServer, serving: Serving) -> Explanation:
    """Return the explanation without the endpoints that never get a connection."""
    reasons = {str(endpoint): why for endpoint, why in serving.passed_over}
    if not told.endpoints or any(one.endpoint not in reasons for one in told.endpoints):
        return passing_over(told, serving.passed_over)
    drops = server.when_empty is Refusal.DROP
    gone = (_left_out(one, reasons[one.endpoint]) for one in told.endpoints)
    return replace(
        told,
        verdict=Verdict.DROP if drops else Verdict.REJECT,
        why=f"{'dropped' if drops else 'refused'}: there is no usable endpoint in this mode",
        masquerade="",
        endpoints=(),
        left_out=(*gone, *told.left_out),
    )


def _left_out(one: Chance, why: str) -> LeftOut:
    return LeftOut(one.endpoint, why, one.pod, one.node)
