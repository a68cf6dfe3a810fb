"""Asking connection tracking to forget what leads nowhere, for the table at hand.

Lives here: which own addresses node ports are looked for at. Must not: decide which flows go
(stale.py), or speak netlink (backends/conntrack.py).
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection

from vipd.proxy.errors import SourceError
from vipd.proxy.names import Address
from vipd.proxy.question import inside
from vipd.proxy.sources.addresses import read
from vipd.proxy.stale import Alive, Forget, Spot
from vipd.proxy.virtualserver import Key, NodeNetwork


def forgetting(facts: Callable[[], NodeNetwork]) -> Forget:
    """Return what forgets; `facts` are those of the node at that time."""

    async def forget(keys: Collection[Key], alive: Alive, left: Collection[Spot] | None) -> int:
        from vipd.backends import conntrack

        own = await _answering_node_ports(keys, facts())
        return await conntrack.forget_stale(keys, alive, own, left)

    return forget


async def _answering_node_ports(keys: Collection[Key], facts: NodeNetwork) -> Collection[Address]:
    """Return the own addresses that answer node ports, if there are any among the keys."""
    if all(key.address is not None for key in keys):
        return ()
    own = facts.own_addresses or facts.primary_addresses
    if not facts.own_addresses:
        with contextlib.suppress(SourceError):
            own = (await asyncio.to_thread(read)).addresses
    return [one for one in own if inside(one, facts.node_port_ranges)]
