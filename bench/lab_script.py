"""From topology to the text that `ip -batch` and sysctl take, host by host. Pure.

Lives here: how hosts reach each other. Must not: run anything.

Addresses stand alone (/32, /128) and every range has a route, as with the ptp and Calico plugins:
no bridge, and the node masquerades with its one address wherever a packet leaves.
IPv4 next hops are the node's address, for which Linux answers ARP on any device. IPv6 answers
neighbour solicitations only for addresses of the asked device, so IPv6 next hops are link-local:
fe80::1 on the left end of a link, fe80::2 on the right one.
"""

import hashlib
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network

from vipd.bench.lab_topology import Host, Link, Role, Topology
from vipd.proxy.names import Network

_LEFT, _RIGHT = "fe80::1", "fe80::2"


def links_script(topology: Topology, host: Host, prefix: str) -> str:
    """The batch that makes the links whose left end is at `host`; run inside it."""
    return "".join(
        f"link add name {link.left_device} type veth"
        f" peer name {link.right_device} netns {prefix}-{link.right}\n"
        for link in topology.links
        if link.left == host.name
    )


def host_script(topology: Topology, host: Host) -> str:
    """The batch that brings up the devices of `host`, then gives it its addresses and routes."""
    return "".join(
        f"{line}\n"
        for line in (
            *_device_lines(topology, host),
            *_address_lines(topology, host),
            *_route_lines(topology, host),
        )
    )


def digest(topology: Topology, servers: bytes) -> str:
    """A short name for a lab as this version builds it: another one means a rebuild.

    `servers` is the program that the pods run: after an upgrade an old one must not go on.
    """
    text = "".join(
        links_script(topology, host, "") + host_script(topology, host) + repr(sysctls(host))
        for host in topology.hosts
    )
    return hashlib.sha256(text.encode() + servers).hexdigest()[:12]


def sysctls(host: Host) -> tuple[tuple[str, str], ...]:
    """Paths below /proc/sys/net and values, to be set before the host has any device."""
    reverse_path = (
        # 2, loose, is what systemd sets on Debian and Fedora; the kernel's own default is 0.
        ("ipv4/conf/all/rp_filter", "2"),
        ("ipv4/conf/default/rp_filter", "2"),
    )
    forwarding = (("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1"))
    return reverse_path + (forwarding if host.role is Role.NODE else ())


def devices(topology: Topology, host: Host) -> tuple[str, ...]:
    """Names of the devices of `host` besides lo, in the order of the topology."""
    return tuple(device for device, _, _ in _ends(topology, host))


def _ends(topology: Topology, host: Host) -> Iterator[tuple[str, str, Link]]:
    """Device, the peer's name and the link, for each link of `host`."""
    for link in topology.links:
        if link.left == host.name:
            yield link.left_device, link.right, link
        elif link.right == host.name:
            yield link.right_device, link.left, link


def _device_lines(topology: Topology, host: Host) -> Iterator[str]:
    for device, _, link in _ends(topology, host):
        own = _LEFT if link.left == host.name else _RIGHT
        yield f"link set dev {device} addrgenmode none"
        yield f"address replace {own}/64 dev {device} nodad"
        yield f"link set dev {device} up"


def _address_lines(topology: Topology, host: Host) -> Iterator[str]:
    device = next(device for device, _, _ in _ends(topology, host))
    yield f"address replace {host.ipv4}/32 dev {device}"
    yield f"address replace {host.ipv6}/128 dev {device} nodad"


def _route_lines(topology: Topology, host: Host) -> Iterator[str]:
    for device, peer_name, link in _ends(topology, host):
        peer = topology.host(peer_name)
        link_local = _RIGHT if link.left == host.name else _LEFT
        yield f"route replace {peer.ipv4}/32 dev {device} src {host.ipv4}"
        yield f"route replace {peer.ipv6}/128 via {link_local} dev {device} src {host.ipv6}"
        for target in _ranges_behind(topology, host, peer):
            if target.version == 4:
                yield f"route replace {target} via {peer.ipv4} dev {device} src {host.ipv4} onlink"
            else:
                yield f"route replace {target} via {link_local} dev {device} src {host.ipv6}"


_EVERYTHING: tuple[Network, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))


def _ranges_behind(topology: Topology, host: Host, peer: Host) -> tuple[Network, ...]:
    """What `host` sends to its neighbour `peer` besides the packets for the peer itself.

    A node sends what it does not know, such as a service address that nobody answers, to
    `outside`, which forwards nothing: there it ends in silence, as at a real router's edge.
    """
    match host.role, peer.role:
        case (Role.POD, _) | (Role.NODE, Role.OUTSIDE):
            return _EVERYTHING
        case Role.OUTSIDE, Role.NODE if peer.name == topology.proxy_node:
            return peer.pods + topology.service_ranges
        case _:
            return peer.pods
