"""What affinity's memory changes in an explanation: the rest of `vipd explain --live`.

Lives here: leaving out all endpoints but the one that is remembered. Must not: ask the kernel
(backends/live.py).
"""

from msgspec.structs import replace

from vipd.proxy.explain import Explanation
from vipd.proxy.left_out import LeftOut
from vipd.proxy.virtualserver import Endpoint


def remembering(told: Explanation, endpoint: Endpoint) -> Explanation:
    """Return the explanation for a source that affinity sends to `endpoint`: all others left out.

    Where the endpoint may not be used any more it is forgotten, and nothing changes.
    """
    kept = [one for one in told.endpoints if one.endpoint == str(endpoint)]
    if not kept:
        return told
    others = tuple(
        LeftOut(
            one.endpoint,
            f"affinity: {told.source} is remembered, and goes where it was",
            one.pod,
            one.node,
        )
        for one in told.endpoints
        if one not in kept
    )
    return replace(
        told,
        why="goes to the endpoint that affinity remembers",
        endpoints=tuple(replace(one, slots=1, of=1) for one in kept),
        left_out=(*others, *told.left_out),
    )
