"""This node's own addresses, from the event to the table."""

from ipaddress import ip_address

from vipd.proxy.events import OwnAddresses
from vipd.proxy.resolve import resolve, update
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot, fold

SETTINGS = NodeSettings(node_name="node", node_ips=(ip_address("192.168.0.1"),))
ADDRESSES = (ip_address("192.168.0.1"), ip_address("fd00::1"))


def test_they_stand_in_the_network_of_the_table() -> None:
    empty = Snapshot()
    snapshot, touched = fold(empty, [OwnAddresses(ADDRESSES)])
    assert touched.own_addresses
    table, changes = update(resolve(empty, SETTINGS), snapshot, SETTINGS, touched)
    assert table.network.own_addresses == ADDRESSES
    assert table.network.primary_addresses == SETTINGS.node_ips
    assert changes.network == table.network
    assert table == resolve(snapshot, SETTINGS)


def test_told_twice_they_touch_nothing() -> None:
    snapshot, _ = fold(Snapshot(), [OwnAddresses(ADDRESSES)])
    again, touched = fold(snapshot, [OwnAddresses(ADDRESSES)])
    assert again == snapshot
    assert not touched.own_addresses
