"""Where the nftables program is known to differ from the table; each is to be decided or mended.

The strategies avoid these on purpose. A test that passes here is an error (xfail is strict).
"""

from ipaddress import ip_address

from tests.properties.kernel import Kernel
from tests.properties.oracle import promised
from tests.properties.packets import outcomes
from tests.properties.statements import Packet
from tests.properties.worlds import OWN, program_of, table_of

from vipd.backends.nftables.plan import plan
from vipd.proxy.events import Applied
from vipd.proxy.model import (
    EndpointSlice,
    Node,
    Service,
    ServicePort,
    SliceEndpoint,
    SlicePort,
    TrafficPolicy,
)
from vipd.proxy.names import Family, NamespacedName, Protocol, parse_network
from vipd.proxy.settings import NodeSettings

NODE = ip_address("192.168.0.10")
SETTINGS = NodeSettings(node_name="node-a", cluster_cidrs=(parse_network("10.244.0.0/16"),))


def service(name: str, ip: str, **more: object) -> Applied:
    port = ServicePort(name="", protocol=Protocol.TCP, **more.pop("port", {"port": 80}))  # type: ignore[arg-type]
    return Applied(
        Service(
            name=NamespacedName("default", name),
            cluster_ips=(ip_address(ip),),
            ports=(port,),
            **more,  # type: ignore[arg-type]
        )
    )


def endpoint(service_name: str, address: str, port: int = 8080) -> Applied:
    return Applied(
        EndpointSlice(
            name=NamespacedName("default", f"{service_name}-1"),
            service=NamespacedName("default", service_name),
            family=Family.IPV4,
            endpoints=(SliceEndpoint(address=ip_address(address), node="node-a"),),
            ports=(SlicePort("", Protocol.TCP, port),),
        )
    )


def agree(events: list[Applied], source: str, destination: str, port: int) -> None:
    node = Applied(Node(name="node-a", addresses=(NODE,)))
    table = table_of([node, *events], SETTINGS)
    kernel = Kernel()
    kernel.run(str(plan(None, program_of(table))[0]))
    packet = Packet(Family.IPV4, "eth0", ip_address(source), ip_address(destination), "tcp", port)
    assert set(outcomes(kernel, packet, OWN)) == promised(table, packet, OWN)


def test_external_ip_of_the_node_without_endpoints_beside_a_node_port() -> None:
    agree(
        [
            service("empty", "10.96.0.1", port={"port": 30080}, external_ips=(NODE,)),
            service("other", "10.96.0.2", port={"port": 80, "node_port": 30080}),
            endpoint("other", "10.244.1.2"),
        ],
        "203.0.113.1", str(NODE), 30080,
    )  # fmt: skip


def test_external_ip_that_is_another_services_cluster_ip() -> None:
    agree(
        [
            service("web", "10.96.0.1"),
            service(
                "odd", "10.96.0.2", port={"port": 443},
                external_ips=(ip_address("10.96.0.1"),), external_policy=TrafficPolicy.LOCAL,
            ),
            endpoint("odd", "10.244.1.2"),
        ],
        "203.0.113.1", "10.96.0.1", 443,
    )  # fmt: skip


def test_host_network_endpoint_on_the_number_of_an_empty_node_port() -> None:
    agree(
        [
            service("web", "10.96.0.1"),
            endpoint("web", str(NODE), 30080),
            service("empty", "10.96.0.2", port={"port": 81, "node_port": 30080}),
        ],
        "10.244.2.2", "10.96.0.1", 80,
    )  # fmt: skip
