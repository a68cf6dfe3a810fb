"""Merging of slices: who is believed where two tell different things of one endpoint."""

from ipaddress import ip_address

import pytest

from vipd.proxy.endpoints import Here, Usable, usable
from vipd.proxy.model import EndpointSlice, SliceEndpoint, SlicePort
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName

WEB = NamespacedName("default", "web")
PORT = ServicePortName(WEB, "", Protocol.TCP)


def told(name: str, node: str, ready: bool = True, terminating: bool = False) -> EndpointSlice:
    return EndpointSlice(
        name=NamespacedName("default", name),
        service=WEB,
        family=Family.IPV4,
        endpoints=(
            SliceEndpoint(
                address=ip_address("10.244.1.2"), ready=ready, terminating=terminating, node=node
            ),
        ),
        ports=(SlicePort("", Protocol.TCP, 8080),),
    )


def use(*slices: EndpointSlice) -> Usable:
    return usable(slices, PORT, Family.IPV4, Here("node-a", None), lambda _: 1)


def test_among_equals_the_first_slice_is_believed() -> None:
    (one,) = use(told("a", "node-a"), told("b", "node-b")).cluster
    assert (one.node, one.local) == ("node-a", True)


@pytest.mark.parametrize("first", [True, False])
def test_ready_is_believed_before_terminating(first: bool) -> None:
    slices = [told("a", "node-a", ready=False, terminating=True), told("b", "node-b")]
    (one,) = use(*(slices if first else reversed(slices))).cluster
    assert (one.node, one.terminating) == ("node-b", False)
