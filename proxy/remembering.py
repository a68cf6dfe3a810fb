"""What is known at this moment and changes an explanation: the rest of `vipd explain --live`.

Lives here: leaving out all endpoints but the one that affinity remembers, and those that get no new
connection now. Must not: ask the kernel (backends/live.py).
"""

from collections.abc import Iterable

from msgspec.structs import replace

from vipd.proxy.explain import Chance, Explanation
from vipd.proxy.left_out import LeftOut
from vipd.proxy.virtualserver import Endpoint


def remembering(told: Explanation, endpoint: Endpoint) -> Explanation:
    """Return the explanation for a source that affinity sends to `endpoint`: all others left out.

    Where the endpoint may not be used any more it is forgotten, and nothing changes.
    """
    kept = [one for one in told.endpoints if one.endpoint == str(endpoint)]
    if not kept:
        return told
    why = f"affinity: {told.source} is remembered, and goes where it was"
    others = tuple(_left_out(one, why) for one in told.endpoints if one not in kept)
    return replace(
        told,
        why="goes to the endpoint that affinity remembers",
        endpoints=tuple(replace(one, slots=1, of=1) for one in kept),
        left_out=(*others, *told.left_out),
    )


def passing_over(told: Explanation, whom: Iterable[tuple[Endpoint, str]]) -> Explanation:
    """Return the explanation with endpoints left out for a reason; the others have their shares.

    Where it would leave out all of them, nothing changes.
    """
    reasons = {str(endpoint): why for endpoint, why in whom}
    kept = [one for one in told.endpoints if one.endpoint not in reasons]
    if not kept or len(kept) == len(told.endpoints):
        return told
    slots = sum(one.slots for one in kept)
    others = tuple(
        _left_out(one, reasons[one.endpoint]) for one in told.endpoints if one.endpoint in reasons
    )
    which = (
        f"one of {len(kept)} endpoints that are" if len(kept) > 1 else "the one endpoint that is"
    )
    return replace(
        told,
        why=f"goes to {which} in use now",
        endpoints=tuple(replace(one, of=slots) for one in kept),
        left_out=(*others, *told.left_out),
    )


def _left_out(one: Chance, why: str) -> LeftOut:
    return LeftOut(one.endpoint, why, one.pod, one.node)
