"""What `vipd explain` says: who is meant, who is chosen, who is left out and why."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from tests.unit.test_cli import vipd

from vipd.backends.iptables.live import last_seen, read_clock
from vipd.backends.ipvs.kernel import Kernel
from vipd.backends.ipvs.live import entries as ipvs_entries
from vipd.backends.live import known
from vipd.backends.nftables.tool import Nft
from vipd.backends.protocol import Packet
from vipd.backends.registry import MODES, backend
from vipd.backends.xtables import Xtables
from vipd.proxy.cli.explain import WIDTH
from vipd.proxy.cli.main import cli
from vipd.proxy.errors import ConfigError, QuestionError, Unsupported
from vipd.proxy.explain import Explanation, Verdict, explain
from vipd.proxy.names import Protocol, parse_address, parse_network
from vipd.proxy.question import Question, asked, own_addresses, parse_destination
from vipd.proxy.remembering import passing_over, remembering
from vipd.proxy.resolve import resolve
from vipd.proxy.settings import DetectLocal, NodeSettings
from vipd.proxy.snapshot import Snapshot, fold
from vipd.proxy.sources.manifests import load
from vipd.proxy.virtualserver import Endpoint

CLUSTER = """
apiVersion: v1
kind: Node
metadata: {name: node-a, labels: {topology.kubernetes.io/zone: zone-1}}
status: {addresses: [{type: InternalIP, address: 192.168.0.10}]}
---
apiVersion: v1
kind: Node
metadata: {name: node-b}
status: {addresses: [{type: InternalIP, address: 192.168.0.11}]}
---
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: all}
spec: {cidrs: [10.96.0.0/16]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop, annotations: {vipd/weights: "10.244.1.2=3"}}
spec:
  type: LoadBalancer
  clusterIP: 10.96.0.1
  loadBalancerSourceRanges: [172.16.0.0/12]
  ports: [{name: http, port: 80, nodePort: 30080}]
status: {loadBalancer: {ingress: [{ip: 198.51.100.1}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- addresses: [10.244.1.2]
  nodeName: node-a
  targetRef: {kind: Pod, name: web-1}
  hints: {forZones: [{name: zone-1}]}
- addresses: [10.244.1.3]
  nodeName: node-a
  targetRef: {kind: Pod, name: web-2}
  conditions: {ready: false}
- addresses: [10.244.2.2]
  nodeName: node-b
  targetRef: {kind: Pod, name: web-3}
  hints: {forZones: [{name: zone-1}]}
- addresses: [10.244.2.3]
  nodeName: node-b
  targetRef: {kind: Pod, name: web-4}
  conditions: {ready: false, serving: true, terminating: true}
- addresses: [10.244.2.4]
  nodeName: node-b
  targetRef: {kind: Pod, name: web-5}
  hints: {forZones: [{name: zone-2}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-old, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: admin, port: 9000}]
endpoints: [{addresses: [10.244.2.9], nodeName: node-b}]
---
apiVersion: v1
kind: Service
metadata: {name: near, namespace: shop}
spec: {clusterIP: 10.96.0.2, internalTrafficPolicy: Local, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata:
  name: asking
  namespace: shop
  annotations: {vipd/proxy-protocol: v2, vipd/keep-failing-endpoints: "true"}
spec: {clusterIP: 10.96.0.4, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: near, namespace: shop, labels: {kubernetes.io/service-name: near}}
addressType: IPv4
ports: [{name: "", port: 8080}]
endpoints: [{addresses: [10.244.2.2], nodeName: node-b}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: other}
spec: {clusterIP: 10.96.0.3, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: dns, namespace: kube-system}
spec: {clusterIP: 10.96.0.10, ports: [{port: 53, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, ports: [{port: 80}]}
"""
NODE = NodeSettings(node_name="node-a", cluster_cidrs=(parse_network("10.244.0.0/16"),))
OUTSIDE = "203.0.113.9"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("manifests") / "cluster.yaml"
    made.write_text(CLUSTER)
    return made


@pytest.fixture(scope="module")
def snapshot(path: Path) -> Snapshot:
    return fold(Snapshot(), load([str(path)]))[0]


def told(
    snapshot: Snapshot, source: str, destination: str, node: NodeSettings = NODE, **more: str
) -> Explanation:
    table = resolve(snapshot, node)
    meant = asked(
        Question(source=source, destination=destination, **more),  # type: ignore[arg-type]
        snapshot,
        table,
        node,
    )
    return explain(
        snapshot,
        table,
        node,
        meant.packet,
        own=own_addresses(snapshot, node),
        sender=meant.sender,
        notes=meant.notes,
    )


@pytest.mark.parametrize(
    ("text", "sender"),
    [
        ("10.244.1.2", "pod shop/web-1 on this node"),
        ("shop/web-1", "pod shop/web-1 on this node"),
        ("web-3", "pod shop/web-3 on node-b"),
        ("node", "this node itself"),
        ("node-a", "this node itself"),
        ("192.168.0.10", "this node itself"),
        ("node-b", "node node-b"),
        ("10.244.9.9", "an address of the pod network"),
        (OUTSIDE, "an address outside the pod network"),
    ],
)
def test_who_asks(snapshot: Snapshot, text: str, sender: str) -> None:
    assert told(snapshot, text, "10.96.0.1:80").sender == sender


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("10.96.0.1:80/TCP", "10.96.0.1:80/TCP"),
        ("shop/web:80", "10.96.0.1:80/TCP"),
        ("shop/web:http", "10.96.0.1:80/TCP"),
        ("web.shop:80/tcp", "10.96.0.1:80/TCP"),
        ("web.shop.svc.cluster.local:80", "10.96.0.1:80/TCP"),
        ("dns:53", "10.96.0.10:53/UDP"),
        ("node:30080", "192.168.0.10:30080/TCP"),
        ("10.96.0.10:53/SCTP", "10.96.0.10:53/SCTP"),
    ],
)
def test_where_it_goes(snapshot: Snapshot, text: str, place: str) -> None:
    said = told(snapshot, OUTSIDE, text)
    assert f"{said.destination}/{said.protocol}" == place


@pytest.mark.parametrize(
    "text",
    ["10.96.0.1", "", ":80", "10.96.0.1:", "[10:80", "fd00::1:80", "x:0", "x:65536", "a:80/ICMP"],
)
def test_a_destination_that_means_nothing_is_wrong_usage(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^DST: "):
        parse_destination(text)


@pytest.mark.parametrize(
    ("source", "destination", "why"),
    [
        ("nobody", "10.96.0.1:80", "SRC: no endpoint is a pod called nobody"),
        (OUTSIDE, "web:80", "DST: web may be other/web, shop/web"),
        (OUTSIDE, "nothing:80", "DST: no service is called nothing"),
        (OUTSIDE, "shop/headless:80", "shop/headless has no cluster IP .it is headless"),
        (OUTSIDE, "shop/web:https", r"has no port https; it has http/TCP"),
        ("fd00::1", "10.96.0.1:80", "no address of the family"),
    ],
)
def test_a_name_that_nobody_has_is_said(
    snapshot: Snapshot, source: str, destination: str, why: str
) -> None:
    with pytest.raises(QuestionError, match=why):
        told(snapshot, source, destination)


def test_the_node_itself_cannot_be_meant_where_its_addresses_are_not_known() -> None:
    with pytest.raises(QuestionError, match="--node-ip"):
        told(Snapshot(), "node", "10.96.0.1:80")


def test_shares_go_by_weight_and_the_others_are_left_out_with_the_reason(
    snapshot: Snapshot,
) -> None:
    said = told(snapshot, "10.244.9.9", "shop/web:80")
    assert {one.pod: one.share for one in said.endpoints} == {"web-1": 0.75, "web-3": 0.25}
    assert {one.endpoint: one.why for one in said.left_out} == {
        "10.244.1.3:8080": "not ready",
        "10.244.2.3:8080": "terminating: gets no new connection while another endpoint is ready",
        "10.244.2.4:8080": "hinted for zone zone-2, others for this one (zone-1)",
        "10.244.2.9": "slice shop/web-old has no port http/TCP (it has admin/TCP)",
    }


def test_what_each_endpoint_sees(snapshot: Snapshot) -> None:
    from_pod = told(snapshot, "shop/web-1", "shop/web:80")
    assert from_pod.masquerade.startswith("no: the source is a pod")
    assert {one.pod: one.source for one in from_pod.endpoints} == {
        "web-1": "",
        "web-3": "10.244.1.2",
    }
    from_outside = told(snapshot, OUTSIDE, "shop/web:80")
    assert from_outside.masquerade.startswith("yes: the source is not a pod")
    assert {one.source for one in from_outside.endpoints} == {""}
    node_port = told(snapshot, OUTSIDE, "node:30080")
    assert node_port.masquerade.startswith("yes: external traffic")


@pytest.mark.parametrize(
    ("source", "destination", "verdict", "why"),
    [
        (OUTSIDE, "198.51.100.1:80", Verdict.DROP, "is not in loadBalancerSourceRanges"),
        ("172.16.1.1", "198.51.100.1:80", Verdict.ENDPOINT, "one of 2 endpoints"),
        (OUTSIDE, "10.96.0.1:81", Verdict.REJECT, r"which has no port 81/TCP \(it has 80/TCP\)"),
        (OUTSIDE, "10.96.0.99:80", Verdict.DROP, "a service address that no service has"),
        (OUTSIDE, "192.0.2.1:80", Verdict.PASS, "no virtual server answers 192.0.2.1:80/TCP"),
        (OUTSIDE, "node:22", Verdict.PASS, "this node's own"),
        ("node", "127.0.0.1:30080", Verdict.PASS, "never on loopback"),
        (OUTSIDE, "other/web:80", Verdict.REJECT, "no usable endpoint"),
        ("10.244.1.2", "shop/near:80", Verdict.DROP, "every endpoint is on another node"),
    ],
)
def test_what_becomes_of_it(
    snapshot: Snapshot, source: str, destination: str, verdict: Verdict, why: str
) -> None:
    said = told(snapshot, source, destination)
    assert said.verdict is verdict
    assert why.replace("\\", "") in said.why


def test_an_endpoint_of_another_node_is_left_out_under_policy_local(snapshot: Snapshot) -> None:
    (one,) = told(snapshot, OUTSIDE, "shop/near:80").left_out
    assert one.why == "runs on node-b; policy Local takes those of node-a"


def test_everyone_is_left_out_where_the_source_may_not_connect(snapshot: Snapshot) -> None:
    said = told(snapshot, OUTSIDE, "198.51.100.1:80")
    why = {one.pod: one.why for one in said.left_out}
    assert "loadBalancerSourceRanges" in why["web-1"]
    assert why["web-2"] == "not ready"


def test_a_node_port_of_an_address_that_nobody_is_known_to_have_is_an_assumption(
    snapshot: Snapshot,
) -> None:
    everywhere = NodeSettings(
        node_name="node-a",
        cluster_cidrs=NODE.cluster_cidrs,
        node_port_addresses=(parse_network("0.0.0.0/0"),),
    )
    said = told(snapshot, OUTSIDE, "192.168.9.9:30080", everywhere)
    assert (said.verdict, len(said.notes)) == (Verdict.ENDPOINT, 1)
    of_another = told(snapshot, OUTSIDE, "192.168.0.11:30080", everywhere)
    assert (of_another.verdict, of_another.notes) == (Verdict.PASS, ())


def test_pods_told_by_interface(snapshot: Snapshot) -> None:
    bridge = NodeSettings(
        node_name="node-a", detect_local=DetectLocal.BRIDGE_INTERFACE, local_interface="cni0"
    )
    assumed = told(snapshot, "web-1", "shop/web:80", bridge)
    assert (assumed.interface, len(assumed.notes)) == ("cni0", 1)
    assert told(snapshot, "web-3", "shop/web:80", bridge).masquerade.startswith("yes")
    said = told(snapshot, "web-3", "shop/web:80", bridge, interface="cni0")
    assert said.masquerade.startswith("no")


def packet(source: str, destination: str, port: int = 80) -> Packet:
    return Packet(
        source=parse_address(source),
        destination=parse_address(destination),
        protocol=Protocol.TCP,
        port=port,
    )


def test_ipvs_entries_of_one_client_and_virtual_server() -> None:
    # As Linux 6.1.0-56-amd64 printed them.
    listing = """\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP fd96:0000:0000:0000:0000:0000:0000:0001 9B18 fd96:0000:0000:0000:0000:0000:0000:0001 0050 \
fd09:0000:0000:0000:0000:0000:0000:0002 1F90 ESTABLISHED     899
UDP 0A600001 D80C 0A600001 0035 0A090002 14E9 UDP             299
TCP 0A600001 979E 0A600001 0050 0A090002 1F90 CLOSE_WAIT       59
TCP 0A600001 979C 0A600001 0050 0A090002 1F90 ESTABLISHED     899
TCP 0A600001 0000 0A600001 0050 0A090002 1F90 ASSURED         599
TCP fd96:0000:0000:0000:0000:0000:0000:0001 0000 fd96:0000:0000:0000:0000:0000:0000:0001 0050 \
fd09:0000:0000:0000:0000:0000:0000:0002 1F90 ASSURED         599
"""

    def entries(source: str, destination: str, port: int = 80) -> list[str]:
        asked_for = packet(source, destination, port)
        return list(map(str, ipvs_entries(listing.splitlines(), asked_for)))

    assert entries("10.96.0.1", "10.96.0.1") == [
        "IPVS entry of affinity: to 10.9.0.2:8080, ASSURED, 599 s left",
        "IPVS entry, source port 38812: to 10.9.0.2:8080, ESTABLISHED, 899 s left",
        "IPVS entry, source port 38814: to 10.9.0.2:8080, CLOSE_WAIT, 59 s left",
    ]
    assert entries("fd96::1", "fd96::1") == [
        "IPVS entry of affinity: to [fd09::2]:8080, ASSURED, 599 s left",
        "IPVS entry, source port 39704: to [fd09::2]:8080, ESTABLISHED, 899 s left",
    ]
    assert entries("10.96.0.1", "10.96.0.2") == []
    assert entries("10.96.0.1", "10.96.0.1", 53) == []
    assert entries("10.96.0.2", "10.96.0.1") == []


def test_the_lists_of_xt_recent_and_the_clock_that_they_go_by() -> None:
    # As Linux 6.18 prints them.
    lines = [
        "src=10.244.1.11 ttl: 64 last_seen: 4296712000 oldest_pkt: 2 4296711000, 4296712000",
        "src=fd00:0000:0000:0000:0000:0000:0000:0001 ttl: 64 last_seen: 7 oldest_pkt: 1 7",
    ]
    assert last_seen(lines, packet("10.244.1.11", "10.96.0.1")) == 4296712000
    assert last_seen(lines, packet("fd00::1", "fd96::1")) == 7
    assert last_seen(lines, packet("10.244.1.12", "10.96.0.1")) is None
    timers = "now at 7263971395835 nsecs\n  .last_jiffies   : 4296712298\njiffies: 4296708289\n"
    assert read_clock(timers) == (4296708289, 250)
    with pytest.raises(ValueError, match="does not tell the time"):
        read_clock("")


def test_the_endpoint_that_affinity_remembers_leaves_the_others_out(snapshot: Snapshot) -> None:
    of_a_new_one = told(snapshot, "10.244.9.9", "shop/web:80")
    said = remembering(of_a_new_one, Endpoint(parse_address("10.244.2.2"), 8080))
    assert [(one.pod, one.share) for one in said.endpoints] == [("web-3", 1.0)]
    assert said.left_out[0].pod == "web-1"
    assert said.left_out[0].why.startswith("affinity: 10.244.9.9 is remembered")
    assert said.left_out[1:] == of_a_new_one.left_out
    gone = remembering(of_a_new_one, Endpoint(parse_address("10.244.2.4"), 8080))
    assert gone == of_a_new_one


def test_what_a_service_asks_of_one_mode_is_told_with_the_mode(snapshot: Snapshot) -> None:
    said = told(snapshot, "10.244.9.9", "shop/asking:80").policy
    assert "endpoints are told the client's address by PROXY protocol v2, in mode userspace" in said
    assert "endpoints that fail get connections like others, in mode userspace too" in said
    without = {
        mode
        for mode in MODES
        if any(one.name == "no-proxy-protocol" for one in backend(mode).compiler.differences)
    }
    assert without == {"nftables", "iptables", "ipvs"}


def test_endpoints_that_get_nothing_now_leave_their_share_to_the_others(snapshot: Snapshot) -> None:
    usual = told(snapshot, "10.244.9.9", "shop/web:80")
    failing = Endpoint(parse_address("10.244.2.2"), 8080)
    said = passing_over(usual, [(failing, "set aside")])
    assert said.why == "goes to the one endpoint that is in use now"
    assert [(one.pod, one.share) for one in said.endpoints] == [("web-1", 1.0)]
    assert (said.left_out[0].pod, said.left_out[0].why) == ("web-3", "set aside")
    assert said.left_out[1:] == usual.left_out
    assert passing_over(usual, []) == usual
    everybody = [(Endpoint(parse_address(f"10.244.{each}"), 8080), "") for each in ("1.2", "2.2")]
    assert passing_over(usual, everybody) == usual
    everywhere = usual.endpoints + tuple(
        replace(one, endpoint=f"x-{one.endpoint}") for one in usual.endpoints
    )
    more = passing_over(replace(usual, endpoints=everywhere), [(failing, "")])
    assert more.why == "goes to one of 3 endpoints that are in use now"


async def test_what_cannot_be_read_is_a_sentence(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse() -> None:
        raise OSError(22, "Invalid argument")

    class Tools(Xtables):
        def __init__(self) -> None:
            super().__init__(find_program=lambda name: None)

    class NoIpvs(Kernel):
        def _family_id(self) -> int:
            raise Unsupported("IPVS", "modprobe ip_vs")

    monkeypatch.setattr("vipd.backends.conntrack_messages._netlink", refuse)
    monkeypatch.setattr("vipd.backends.nftables.live.Nft", lambda: Nft(str(tmp_path / "nft")))
    monkeypatch.setattr("vipd.backends.iptables.live.Xtables", Tools)
    monkeypatch.setattr("vipd.backends.ipvs.live.Kernel", NoIpvs)
    monkeypatch.setattr("vipd.backends.ipvs.live.CONNECTIONS", tmp_path / "none")
    monkeypatch.setattr("vipd.backends.iptables.live.TIMERS", tmp_path / "none")
    table = resolve(snapshot, NODE)
    servers = [replace(one, affinity_seconds=60) for one in table.virtual_servers()]
    for mode, words in (
        ("nftables", ["counters are not known"]),
        ("iptables", ["counters of the table nat are not known", "memory is not known"]),
        ("ipvs", ["counters are not known: IPVS", "connections are not known"]),
    ):
        program = backend(mode).compiler.compile(servers, table.network)
        lines = (await known(mode, program, packet("10.244.9.9", "10.96.0.1"))).lines
        for word in [*words, "flows are not known"]:
            assert [one for one in lines if word in one], (mode, word, lines)


class TestCommand:
    def test_the_text_has_every_section_and_fits_a_terminal(self, path: Path) -> None:
        asked_for = ["explain", "shop/web-1", "shop/web:80", "-f", str(path)]
        done = CliRunner().invoke(
            cli, [*asked_for, "--node-name", "node-a", "--cluster-cidr", "10.244.0.0/16"]
        )
        assert done.exit_code == 0, done.output
        for heading in ("from", "to", "outcome", "server", "policy", "masquerade", "path",
                        "endpoints that may be chosen", "endpoints left out"):  # fmt: skip
            assert f"\n{heading} " in f"\n{done.output}".replace("\n", " \n"), heading
        assert max(map(len, done.output.splitlines())) <= WIDTH
        assert "10.96.0.1 . tcp . 80 : goto random-4" in done.output

    def test_json_is_the_whole_explanation(self, path: Path) -> None:
        import msgspec

        done = vipd("explain", "10.244.9.9", "shop/web:80", "--json", "-f", str(path))
        said = msgspec.json.decode(done.stdout, type=Explanation)
        assert (said.verdict, said.mode) == (Verdict.ENDPOINT, "nftables")
        assert said.path

    @pytest.mark.parametrize(
        ("arguments", "code", "word"),
        [
            (("a:b:c", "10.96.0.1:80"), 2, "SRC: 'a:b:c'"),
            (("10.0.0.1", "10.96.0.1"), 2, "DST: '10.96.0.1' is not understood"),
            (("nobody", "10.96.0.1:80"), 1, "SRC: no endpoint is a pod called nobody"),
            (("10.0.0.1", "10.96.0.1:80", "--mode", "magic"), 2, "--mode"),
        ],
    )
    def test_bad_input_is_one_sentence(
        self, path: Path, arguments: tuple[str, ...], code: int, word: str
    ) -> None:
        done = vipd("explain", *arguments, "-f", str(path))
        assert (done.returncode, done.stdout) == (code, "")
        assert word in done.stderr
        assert done.stderr.count("\n") == 1
