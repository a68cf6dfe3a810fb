"""Every backend does to every packet what the table says, with the same chances, but for the
differences that it names."""

from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.properties import strategies as some
from tests.properties.dataplanes import DATAPLANES, Dataplane
from tests.properties.oracle import Outcome, Shares, addressed, shares
from tests.properties.statements import Packet
from tests.properties.worlds import OWN, packets, snapshot_of, winners

from vipd.backends.slots import MAGLEV_SIZES
from vipd.proxy.events import Event
from vipd.proxy.model import Algorithm
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import fold
from vipd.proxy.virtualserver import Table, Use, VirtualServer

pytestmark = [
    pytest.mark.usefixtures("small_maglev"),
    pytest.mark.parametrize("plane", DATAPLANES, ids=lambda one: one.mode),
]
SOURCE_HASH_SLOTS = 256
"""Of IPVS."""
ROUNDING = Fraction(1, 1 << 20)
"""iptables keeps probabilities in 31 bits, and takes one of what another left."""


@given(some.clusters(), st.lists(some.events, max_size=4), some.node_settings, st.data())
def test_program_and_table_agree(
    plane: Dataplane, first: list[Event], later: list[Event], node: NodeSettings,
    data: st.DataObject,
) -> None:  # fmt: skip
    snapshot = snapshot_of(first)
    table = resolve(snapshot, node)
    compiler, kernel = plane.compiler, plane.kernel()
    compiled = compiler.compile(table.virtual_servers(), table.network)
    made, program = compiler.plan(None, compiled)
    kernel.commit(made)
    snapshot, touched = fold(snapshot, later)
    table, changes = update(table, snapshot, node, touched)
    kernel.commit(compiler.plan_changes(program, changes)[0])
    for packet in data.draw(st.lists(packets(table), min_size=10, max_size=20)):
        got, wanted = kernel.chances(packet, OWN), shares(table, packet, OWN)
        server = addressed(table, packet, OWN)
        allowed = [wanted, *_different(plane, table, packet, server)]
        slot = _slot(plane, server)
        assert any(_same(got, one, slot) for one in allowed), (packet, server, got, allowed)


def _same(got: Shares, wanted: Shares, slot: Fraction) -> bool:
    return got.keys() == wanted.keys() and all(
        abs(got[one] - wanted[one]) <= slot for one in wanted
    )


def _slot(plane: Dataplane, server: VirtualServer | None) -> Fraction:
    """Return by how much an endpoint's share may be off: one slot for each of its weight."""
    if server is None:
        return ROUNDING
    heaviest = max((one.weight for one in (*server.cluster, *server.local)), default=1)
    if server.algorithm is Algorithm.MAGLEV and not plane.differs("iptables-maglev"):
        return Fraction(heaviest, MAGLEV_SIZES[0])
    if server.algorithm is Algorithm.SOURCE_HASH and plane.mode == "ipvs":
        return Fraction(heaviest, SOURCE_HASH_SLOTS)
    return ROUNDING


def _different(
    plane: Dataplane, table: Table, packet: Packet, server: VirtualServer | None
) -> Sequence[Shares]:
    """Return what else may become of the packet, by the differences that the mode names."""
    passes, refused = ({Outcome(one): Fraction(1)} for one in ("pass", "reject"))
    addresses = {key.address for key in winners(table)} - {None}
    if server is None:
        if packet.destination in addresses:
            if packet.protocol not in ("tcp", "udp", "sctp"):
                return [passes] if plane.differs("pings-are-answered") else []
            foreign = plane.differs("unknown-ports-are-refused") and packet.destination not in OWN
            return [refused] if foreign else []
        return [passes] if plane.differs("unallocated-addresses-pass") else []
    if server.use is Use.LOCAL_FROM_OUTSIDE and plane.differs("local-list-for-all"):
        return _from_local_list(table, packet, server)
    return []


def _from_local_list(table: Table, packet: Packet, server: VirtualServer) -> Sequence[Shares]:
    """Return what the mode does where it cannot tell sources apart: local endpoints, if any."""
    if not server.local:
        return []
    wanted = shares(table, packet, OWN)
    local = {f"{one.address} . {one.port}": one.weight for one in server.local}
    kept = {one: local[one.target] for one in wanted if one.target in local}
    total = sum(kept.values())
    return [{one: Fraction(weight, total) for one, weight in kept.items()}] if kept else []
