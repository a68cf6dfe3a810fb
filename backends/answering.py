"""On which addresses a node answers, in the modes that answer on the address itself.

Lives here: what of the node's network decides that, for a key of the table. Pure. Must not: know a
mode.
"""

from vipd.backends.things import Entries
from vipd.proxy.names import Address, Family, family_of
from vipd.proxy.virtualserver import Key, NodeNetwork


def answered(key: Key, network: NodeNetwork) -> list[Address]:
    """Return the addresses a key answers on: its own, or for a node port the node's."""
    if key.address is not None:
        return [key.address]
    ranges = [one for one in network.node_port_ranges if family_of(one) is key.family]
    own = [one for one in network.own_addresses if family_of(one) is key.family]
    if not own:
        own = [one.network_address for one in ranges if one.num_addresses == 1]
    return [one for one in own if any(one in each for each in ranges)]


def beside(program: Entries, key: Key) -> list[Key]:
    """Return the keys whose things change when `key` comes or goes: the same port of the node."""
    if key.address is None or key.address not in program.network.own_addresses:
        return []
    node_port = with_address(key, None)
    return [node_port] if node_port in program.entries else []


def source(family: Family, network: NodeNetwork) -> str:
    """Return the address that the node uses towards service addresses, or an empty text.

    The primary one if this node has it, else the first that it has.
    """
    own = [one for one in network.own_addresses if family_of(one) is family]
    usable = [one for one in own if not one.is_link_local]
    primary = [one for one in network.primary_addresses if family_of(one) is family]
    return str(next((one for one in (*primary, *usable) if one in usable or not own), ""))


def with_address(key: Key, address: Address | None, port: int | None = None) -> Key:
    """Return the key with another address, and another port where one is given."""
    return Key(key.family, address, key.protocol, key.port if port is None else port)
