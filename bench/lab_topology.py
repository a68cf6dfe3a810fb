"""What the lab is made of: hosts, the links between them, their addresses, as data.

Lives here: the one topology that `vipd lab`, the tests and the benches share, and its words.
Must not: touch the kernel, nor know how a route is spelled (lab_script.py).

    client-1  client-2  web-1  web-2  web-3          web-4  web-5  web-6
        \\        \\       |      /      /                \\     |     /
         `--------`---- node ---------------------------- node-2
                          |  192.168.77.1     192.168.77.2  |
                          `------------- outside -----------'
                                    192.168.77.100

vipd runs on `node`; `node-2` only forwards. `outside` reaches each node over a link of its own, so
that an answer which should have come back through `node` and does not is seen as the fault it is.
"""

from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from msgspec import Struct

from vipd.proxy.names import Address, Family, Network


class Role(Enum):
    """What a host of the lab is there for."""

    NODE = "node"
    POD = "pod"
    OUTSIDE = "outside"


class Host(Struct, frozen=True, kw_only=True):
    """One network namespace: its name without the lab's prefix and one address of each family.

    `node` is the node that a pod runs on and None for others; `pods` are the ranges of a node.
    """

    name: str
    role: Role
    ipv4: IPv4Address
    ipv6: IPv6Address
    node: str | None = None
    pods: tuple[Network, ...] = ()

    @property
    def addresses(self) -> tuple[IPv4Address, IPv6Address]:
        """Both addresses, IPv4 first."""
        return (self.ipv4, self.ipv6)

    def address(self, family: Family) -> Address:
        """The address of one family."""
        return self.ipv4 if family is Family.IPV4 else self.ipv6


class Link(Struct, frozen=True):
    """A veth pair: two hosts, and what the device is called at each."""

    left: str
    left_device: str
    right: str
    right_device: str


class Topology(Struct, frozen=True, kw_only=True):
    """Hosts and links, and the ranges that `outside` sends to the node that runs vipd."""

    hosts: tuple[Host, ...]
    links: tuple[Link, ...]
    proxy_node: str
    service_ranges: tuple[Network, ...]
    pod_ranges: tuple[Network, ...]

    def host(self, name: str) -> Host:
        """Return the host called `name`; raise KeyError."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise KeyError(name)

    def of_role(self, role: Role) -> tuple[Host, ...]:
        """All hosts of a role, in the order of the topology."""
        return tuple(host for host in self.hosts if host.role is role)


def _node(name: str, number: int) -> Host:
    return Host(
        name=name,
        role=Role.NODE,
        ipv4=IPv4Address(f"192.168.77.{number}"),
        ipv6=IPv6Address(f"fd00:77::{number}"),
        pods=(IPv4Network(f"10.244.{number}.0/24"), IPv6Network(f"fd00:10:244:{number}::/64")),
    )


def _pod(name: str, node: Host, number: int) -> Host:
    """A pod whose number is the last part of both its addresses, read as decimal."""
    return Host(
        name=name,
        role=Role.POD,
        ipv4=IPv4Address(str(node.pods[0].network_address + number)),
        ipv6=IPv6Address(f"{node.pods[1].network_address}{number}"),
        node=node.name,
    )


def _standard() -> Topology:
    node, node_2 = _node("node", 1), _node("node-2", 2)
    outside = Host(
        name="outside",
        role=Role.OUTSIDE,
        ipv4=IPv4Address("192.168.77.100"),
        ipv6=IPv6Address("fd00:77::100"),
    )
    pods = (
        *(_pod(f"client-{n}", node, 10 + n) for n in (1, 2)),
        *(_pod(f"web-{n}", node, 20 + n) for n in (1, 2, 3)),
        *(_pod(f"web-{n}", node_2, 20 + n) for n in (4, 5, 6)),
    )
    return Topology(
        hosts=(node, node_2, outside, *pods),
        links=(
            Link("outside", "node", "node", "eth0"),
            Link("outside", "node-2", "node-2", "eth0"),
            Link("node", "node-2", "node-2", "node"),
            *(Link(str(pod.node), pod.name, pod.name, "eth0") for pod in pods),
        ),
        proxy_node="node",
        service_ranges=(
            IPv4Network("10.96.0.0/16"),
            IPv6Network("fd00:10:96::/112"),
            IPv4Network("203.0.113.0/24"),
            IPv6Network("2001:db8:113::/64"),
        ),
        pod_ranges=(IPv4Network("10.244.0.0/16"), IPv6Network("fd00:10:244::/48")),
    )


STANDARD = _standard()
"""The lab: cluster IPs in the first two service ranges, load-balancer IPs in the last two."""
