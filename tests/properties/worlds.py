"""Steps that several property tests take: events to tables, tables to programs, packets to try.

Lives here: what is not a strategy for objects (strategies.py) and no model of the kernel.
"""

from collections.abc import Iterable

from hypothesis import strategies as st
from tests.properties import strategies as some
from tests.properties.statements import Packet

from vipd.backends.nftables.compile import Program
from vipd.backends.nftables.plan import compile_program
from vipd.proxy.events import Event
from vipd.proxy.names import Address, Family
from vipd.proxy.resolve import resolve
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.virtualserver import Changes, Key, Table, VirtualServer

OWN: frozenset[Address] = frozenset(
    address for family in Family for address in (*some.NODE_IPS[family], some.LOOPBACK[family])
)


def snapshot_of(events: Iterable[Event]) -> Snapshot:
    """Return the snapshot after the events."""
    return fold(Snapshot(), events)[0]


def table_of(events: Iterable[Event], settings: NodeSettings) -> Table:
    """Return the table after the events."""
    return resolve(snapshot_of(events), settings)


def program_of(table: Table) -> Program:
    """Return the program of a table."""
    return compile_program(table.virtual_servers(), table.network)


def winners(table: Table) -> dict[Key, VirtualServer]:
    """Return who answers each key."""
    return {key: claims[0] for key, claims in table.claims.items()}


def difference(before: Table, after: Table) -> Changes:
    """Return what leads from one table to the other, by comparing all of them."""
    old, new = winners(before), winners(after)
    return Changes(
        {key: new.get(key) for key in {**old, **new} if old.get(key) != new.get(key)},
        after.network if after.network != before.network else None,
    )


@st.composite
def packets(draw: st.DrawFn, table: Table) -> Packet:
    """Return a packet, most often one that the table has something to say about."""
    family = draw(st.sampled_from(Family))
    keys = sorted((key for key in table.claims if key.family is family), key=Key.sort_key)
    protocol = draw(st.sampled_from(("tcp", "udp", "sctp")))
    port = draw(st.sampled_from((*some.SERVICE_PORTS, *some.NODE_PORTS, 8080, 53)))
    anywhere = (
        *some.CLUSTER_IPS[family], *some.OUTER_IPS[family], *some.NODE_IPS[family],
        some.UNALLOCATED[family], some.LOOPBACK[family], some.OUTSIDERS[family][0],
    )  # fmt: skip
    destination = draw(st.sampled_from(anywhere))
    how = draw(st.sampled_from(("key", "key", "key", "key", "other port", "anything")))
    if keys and how != "anything":
        key = draw(st.sampled_from(keys))
        destination = key.address or draw(st.sampled_from(some.NODE_IPS[family]))
        if how == "key":
            protocol, port = key.protocol.lower(), key.port
    if draw(st.sampled_from([False] * 30 + [True])):
        protocol, port = ("icmp" if family is Family.IPV4 else "ipv6-icmp"), 0
    where, source = draw(st.sampled_from(_sources(family)))
    return Packet(
        family, where, source, destination, protocol, port,
        syn=not draw(some.rarely), mark=draw(st.sampled_from((0, 0, 0x1))),
    )  # fmt: skip


def _sources(family: Family) -> list[tuple[str, Address]]:
    """Return interfaces and sources: pods here and elsewhere, the outside, the node itself."""
    return [
        *(("cni0", pod) for pod in some.LOCAL_PODS[family]),
        ("cni", some.LOCAL_PODS[family][0]),
        ("eth0", some.OTHER_POD[family]),
        *(("eth0", one) for one in some.OUTSIDERS[family]),
        ("", some.NODE_IPS[family][0]),
        ("", some.NODE_IPS[family][1]),
        ("", some.LOOPBACK[family]),
    ]
