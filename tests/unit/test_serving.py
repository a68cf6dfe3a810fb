"""`vipd explain` of a mode that serves otherwise than the table says, or not at all."""

from pathlib import Path

import msgspec
import pytest
from tests.unit.test_cli import vipd
from tests.unit.test_explain import CLUSTER

from vipd.backends.registry import MODES, backend
from vipd.proxy.errors import DataplaneError, Rejected
from vipd.proxy.explain import Explanation, Verdict
from vipd.proxy.follow import follow
from vipd.proxy.names import Family, Protocol, parse_address, parse_network
from vipd.proxy.question import Question
from vipd.proxy.resolve import resolve
from vipd.proxy.settings import DataplaneSettings, NodeSettings
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.sources.manifests import load
from vipd.proxy.virtualserver import Key

SERVICE = """---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: shop}}
spec: {{clusterIP: {address}, ports: [{{port: 80, protocol: {protocol}}}], {more}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, namespace: shop, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{name: "", port: 80, protocol: {protocol}}}]
endpoints: [{endpoints}]
"""
CLIENT = "10.244.1.200"


def service(name: str, address: str, *endpoints: str, protocol: str = "TCP", more: str = "") -> str:
    listed = ", ".join(f"{{addresses: [{one}], nodeName: node-a}}" for one in endpoints)
    return SERVICE.format(
        name=name, address=address, protocol=protocol, endpoints=listed, more=more
    )


WITHIN = (
    CLUSTER
    + service("signals", "10.96.1.1", "10.244.1.2", protocol="SCTP")
    + service("chain", "10.96.1.2", "10.96.1.3", "10.244.1.2", "10.244.1.3")
    + service("last", "10.96.1.3", "10.244.1.2")
    + service("loop", "10.96.1.4", "10.96.1.3")
)


async def told(
    tmp_path: Path,
    destination: str,
    mode: str = "userspace",
    *,
    rejected: dict[Key, DataplaneError] | None = None,
    without: str = "",
    source: str = CLIENT,
) -> Explanation:
    """What the daemon says, or without `rejected` and `without`, what manifests make of it.

    `without` is the address of a virtual server that the dataplane has not taken.
    """
    path = tmp_path / "cluster.yaml"
    path.write_text(WITHIN)
    snapshot, _ = fold(Snapshot(), load([str(path)]))
    node = NodeSettings(node_name="node-a", cluster_cidrs=(parse_network("10.244.0.0/16"),))
    table = resolve(snapshot, node)
    settings = DataplaneSettings()
    servers = [one for one in table.virtual_servers() if str(one.key.address) != without]
    program = backend(mode, settings).compiler.compile(servers, table.network)
    question = Question(source=source, destination=destination, mode=mode)
    return await follow(question, snapshot, table, node, settings, mode, program, None, rejected)


@pytest.mark.parametrize("mode", MODES)
async def test_what_endpoints_see(tmp_path: Path, mode: str) -> None:
    """The kernel keeps the client's address within the cluster; a worker cannot."""
    made = await told(tmp_path, "shop/last:80", mode)
    assert made.verdict is Verdict.ENDPOINT
    (one,) = made.endpoints
    if mode == "userspace":
        assert (one.source, one.masqueraded) == ("", True)
        assert made.masquerade == "yes: in mode userspace workers connect to endpoints"
    else:
        assert (one.source, one.masqueraded) == (CLIENT, False)
        assert made.masquerade.startswith("no: the source is a pod")
    assert made.rejected == ""


async def test_a_hairpin_needs_no_reason_where_workers_connect_anyway(tmp_path: Path) -> None:
    made = await told(tmp_path, "shop/last:80", source="10.244.1.2")
    assert [(one.masqueraded, one.why) for one in made.endpoints] == [(True, "")]


async def test_what_a_mode_cannot_serve_is_named_with_the_reason(tmp_path: Path) -> None:
    made = await told(tmp_path, "shop/signals:80")
    assert made.verdict is Verdict.UNSERVED
    assert made.why == (
        "not served: mode userspace cannot serve shop/signals at 10.96.1.1:80/SCTP: "
        "userspace mode forwards TCP and UDP only"
    )
    assert (made.endpoints, made.masquerade) == ((), "")
    assert [(one.endpoint, one.why) for one in made.left_out] == [
        ("10.244.1.2:80", "not served here")
    ]
    assert (await told(tmp_path, "shop/signals:80", "nftables")).verdict is Verdict.ENDPOINT


@pytest.mark.parametrize("mode", MODES)
async def test_what_a_dataplane_has_not_taken_is_told_with_what_it_said(
    tmp_path: Path, mode: str
) -> None:
    key = Key(Family.IPV4, parse_address("10.96.1.3"), Protocol.TCP, 80)
    error = Rejected("listen 10.96.1.3:80/TCP", "Address already in use: nginx (pid 7)")
    made = await told(tmp_path, "shop/last:80", mode, rejected={key: error}, without="10.96.1.3")
    assert made.verdict is Verdict.UNSERVED
    assert made.why == (
        f"not served: mode {mode} cannot serve shop/last at 10.96.1.3:80/TCP: "
        "listen 10.96.1.3:80/TCP: Address already in use: nginx (pid 7)"
    )
    made = await told(tmp_path, "shop/last:80", mode, without="10.96.1.3")
    assert made.why == "not served: shop/last at 10.96.1.3:80/TCP is not programmed yet"


async def test_what_was_served_before_and_is_rejected_now(tmp_path: Path) -> None:
    """A change that the kernel refuses leaves what was there."""
    key = Key(Family.IPV4, parse_address("10.96.1.3"), Protocol.TCP, 80)
    made = await told(tmp_path, "shop/last:80", "nftables", rejected={key: Rejected("add", "no")})
    assert (made.verdict, made.rejected) == (Verdict.ENDPOINT, "add: no")


async def test_endpoints_that_workers_never_ask_are_left_out(tmp_path: Path) -> None:
    made = await told(tmp_path, "shop/chain:80")
    assert [(one.endpoint, one.slots, one.of) for one in made.endpoints] == [
        ("10.244.1.2:80", 1, 2),
        ("10.244.1.3:80", 1, 2),
    ]
    (out,) = made.left_out
    assert (out.endpoint, out.why) == (
        "10.96.1.3:80",
        "this node serves it itself, and may not ask itself",
    )
    assert made.rejected == "left out, as this node serves them itself: 10.96.1.3:80"
    assert "10.96.1.3" not in made.path[-1].outcome


async def test_where_no_endpoint_is_left_the_path_and_the_outcome_say_the_same(
    tmp_path: Path,
) -> None:
    made = await told(tmp_path, "shop/loop:80")
    assert made.verdict is Verdict.REJECT
    assert made.why == "refused: there is no usable endpoint in this mode"
    assert made.path[-1].what.endswith("reject with tcp reset")
    assert [one.endpoint for one in made.left_out] == ["10.96.1.3:80"]


def test_the_command_says_it(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(WITHIN)
    asked = ("explain", CLIENT, "shop/signals:80", "-f", str(path), "--mode", "userspace")
    done = vipd(*asked)
    assert (done.returncode, done.stderr) == (0, "")
    assert "outcome    not served: mode userspace cannot serve shop/signals at " in done.stdout
    as_json = msgspec.json.decode(vipd(*asked, "--json").stdout, type=Explanation)
    assert as_json.verdict is Verdict.UNSERVED
    partly = vipd("explain", CLIENT, "shop/chain:80", "-f", str(path), "--mode", "userspace")
    assert "rejected   left out, as this node serves them itself: 10.96.1.3:80\n" in partly.stdout
