"""kube-proxy's own file: what kubeadm writes works unchanged; every field counts or is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vipd.proxy.config import Config, Flags, Loaded, as_file, examined, load
from vipd.proxy.config.fields import paths
from vipd.proxy.config.kube_proxy_configuration import KubeProxyConfiguration
from vipd.proxy.config.kube_proxy_meaning import SAME, TRANSLATED, WITHOUT_EFFECT
from vipd.proxy.errors import ConfigError
from vipd.proxy.names import parse_address, parse_network
from vipd.proxy.settings import (
    ConntrackSettings,
    DataplaneSettings,
    DetectLocal,
    HttpSettings,
    IpvsSettings,
    NodeSettings,
)

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"
VIPD = "---\napiVersion: vipd/v1alpha1\nkind: VipdConfiguration\n"
KUBEADM = Path(__file__).parents[1] / "cases/configuration/kubeadm.conf"
"""As kubeadm 1.31 to 1.36 writes it into the ConfigMap kube-proxy."""
EVERYWHERE = (parse_network("0.0.0.0/0"), parse_network("::/0"))

Read = Callable[..., Loaded]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.conf"


@pytest.fixture
def read(file: Path) -> Read:
    def examine(text: str, **flags: Any) -> Loaded:
        file.write_text(HEAD + text)
        return examined(Flags(config=str(file), **flags))

    return examine


def fields_of(found: Loaded, file: Path) -> list[str]:
    return [one.where.removeprefix(f"{file}: ") for one in found.notes]


def test_what_kubeadm_writes_means_what_it_means_to_kube_proxy() -> None:
    found = examined(Flags(config=str(KUBEADM), node_name="n1"))
    assert found.wrong == ()
    assert found.config == Config(
        mode="iptables",
        manifests=(),
        kubeconfig="/var/lib/kube-proxy/kubeconfig.conf",
        socket="/run/vipd/vipd.sock",
        node=NodeSettings(
            node_name="n1",
            cluster_cidrs=(parse_network("10.244.0.0/16"),),
            node_port_addresses=EVERYWHERE,
        ),
        conntrack=ConntrackSettings(),
        http=HttpSettings(
            healthz=(parse_address("0.0.0.0"), 10256), metrics=(parse_address("127.0.0.1"), 10249)
        ),
        oom_score_adjust=-999,
    )
    assert fields_of(found, KUBEADM) == ["iptables.localhostNodePorts"]


def test_every_field_there_is_counts_or_is_named() -> None:
    known = [*SAME, *TRANSLATED, *WITHOUT_EFFECT]
    assert sorted(known) == sorted(set(paths(KubeProxyConfiguration)) - {"apiVersion", "kind"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mode: nftables", {"mode": "nftables"}),
        ("mode: ''", {"mode": "iptables"}),
        ("hostnameOverride: Node-7", {"node.node_name": "node-7"}),
        ("clientConnection: {kubeconfig: /k}", {"kubeconfig": "/k"}),
        ("bindAddress: 192.0.2.1", {"node.node_ips": (parse_address("192.0.2.1"),)}),
        (
            "bindAddress: '2001:db8::1'",
            {
                "node.node_ips": (parse_address("2001:db8::1"),),
                "http.healthz": (parse_address("::"), 10256),
                "http.metrics": (parse_address("::1"), 10249),
            },
        ),
        (
            "bindAddress: '::'",
            {"node.node_ips": (), "http.healthz": (parse_address("::"), 10256)},
        ),
        (
            "clusterCIDR: '10.1.0.0/16,fd01::/48'",
            {"node.cluster_cidrs": (parse_network("10.1.0.0/16"), parse_network("fd01::/48"))},
        ),
        (
            "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: cali}",
            {
                "node.detect_local": DetectLocal.INTERFACE_NAME_PREFIX,
                "node.local_interface": "cali",
            },
        ),
        (
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cni0}",
            {"node.detect_local": DetectLocal.BRIDGE_INTERFACE, "node.local_interface": "cni0"},
        ),
        ("detectLocalMode: ''", {"node.detect_local": DetectLocal.CLUSTER_CIDR}),
        ("nodePortAddresses: []", {"node.node_port_addresses": EVERYWHERE}),
        ("mode: nftables\nnodePortAddresses: []", {"node.node_port_addresses": None}),
        ("nodePortAddresses: [primary]", {"node.node_port_addresses": None}),
        ("nodePortAddresses: [all]", {"node.node_port_addresses": EVERYWHERE}),
        (
            "nodePortAddresses: [primary, 10.0.0.0/8]",
            {
                "node.node_port_addresses": (parse_network("10.0.0.0/8"),),
                "node.node_port_primary": True,
            },
        ),
        (
            "nodePortAddresses: [localhost]",
            {
                "node.node_port_addresses": (
                    parse_network("127.0.0.0/8"),
                    parse_network("::1/128"),
                )
            },
        ),
        ("iptables: {masqueradeBit: 3}", {"node.masquerade_bit": 3}),
        ("iptables: {masqueradeBit: 0}", {"node.masquerade_bit": 0}),
        ("mode: ipvs\niptables: {masqueradeAll: true}", {"node.masquerade_all": True}),
        ("mode: nftables\nnftables: {masqueradeAll: true}", {"node.masquerade_all": True}),
        ("nftables: {masqueradeAll: true}", {"node.masquerade_all": False}),
        (
            "mode: nftables\nnftables: {masqueradeBit: 5}\niptables: {masqueradeBit: 6}",
            {"node.masquerade_bit": 5},
        ),
        (
            "ipvs: {scheduler: wlc, strictARP: true, tcpTimeout: 15m0s, tcpFinTimeout: 2m0s,"
            " udpTimeout: 5m0s}",
            {
                "dataplane.ipvs": IpvsSettings(
                    scheduler="wlc",
                    tcp_timeout=900,
                    tcp_fin_timeout=120,
                    udp_timeout=300,
                    strict_arp=True,
                )
            },
        ),
        (
            "conntrack: {maxPerCore: 0, min: 5, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 1m,"
            " tcpBeLiberal: true, udpTimeout: 30s, udpStreamTimeout: 2m}",
            {
                "conntrack": ConntrackSettings(
                    max_per_core=0,
                    min=5,
                    tcp_established_seconds=0,
                    tcp_close_wait_seconds=60,
                    tcp_be_liberal=True,
                    udp_seconds=30,
                    udp_stream_seconds=120,
                )
            },
        ),
        ("healthzBindAddress: 127.0.0.2", {"http.healthz": (parse_address("127.0.0.2"), 10256)}),
        ("healthzBindAddress: '[::1]:7'", {"http.healthz": (parse_address("::1"), 7)}),
        ("metricsBindAddress: '::1'", {"http.metrics": (parse_address("::1"), 10249)}),
        ("metricsBindAddress: 0.0.0.0:9", {"http.metrics": (parse_address("0.0.0.0"), 9)}),
        ("bindAddressHardFail: true", {"http.must_bind": True}),
        ("oomScoreAdj: 0", {"oom_score_adjust": 0}),
        ("logging: {format: json}", {"log_format": "json"}),
        (
            "featureGates: {AllowServiceExternalIPs: false}",
            {"node.serve_external_ips": False},
        ),
    ],
)
def test_a_field_that_counts(read: Read, text: str, expected: dict[str, object]) -> None:
    found = read(text)
    assert found.wrong == ()
    for path, value in expected.items():
        got: Any = found.config
        for name in path.split("."):
            got = getattr(got, name)
        assert got == value, path


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("clientConnection: {acceptContentTypes: text/plain}", "acceptContentTypes"),
        ("clientConnection: {contentType: application/json}", "clientConnection.contentType"),
        ("clientConnection: {qps: 100}", "clientConnection.qps"),
        ("clientConnection: {burst: 200}", "clientConnection.burst"),
        ("logging: {verbosity: 4}", "logging.verbosity"),
        ("logging: {flushFrequency: 5000000000}", "logging.flushFrequency"),
        ("logging: {vmodule: [{filePattern: x, verbosity: 3}]}", "logging.vmodule"),
        ("logging: {options: {json: {splitStream: true}}}", "logging.options.json.splitStream"),
        ("logging: {options: {text: {infoBufferSize: 1M}}}", "options.text.infoBufferSize"),
        ("featureGates: {Foo: true}", "featureGates.Foo"),
        ("enableProfiling: true", "enableProfiling"),
        ("showHiddenMetricsForVersion: '1.36'", "showHiddenMetricsForVersion"),
        ("iptables: {localhostNodePorts: true}", "iptables.localhostNodePorts"),
        ("iptables: {snatNodeInternalIP: true}", "iptables.snatNodeInternalIP"),
        ("iptables: {syncPeriod: 1m}", "iptables.syncPeriod"),
        ("iptables: {minSyncPeriod: 10s}", "iptables.minSyncPeriod"),
        ("ipvs: {syncPeriod: 1m}", "ipvs.syncPeriod"),
        ("ipvs: {minSyncPeriod: 1m}", "ipvs.minSyncPeriod"),
        ("ipvs: {excludeCIDRs: [10.0.0.0/8]}", "ipvs.excludeCIDRs"),
        ("nftables: {syncPeriod: 1m}", "nftables.syncPeriod"),
        ("nftables: {minSyncPeriod: 1m}", "nftables.minSyncPeriod"),
        ("nftables: {masqueradeBit: 3}", "nftables.masqueradeBit"),
        ("nodePortAddresses: [localhost]", "nodePortAddresses"),
        ("winkernel: {networkName: x}", "winkernel.networkName"),
        ("winkernel: {sourceVip: 10.0.0.1}", "winkernel.sourceVip"),
        ("winkernel: {enableDSR: true}", "winkernel.enableDSR"),
        ("winkernel: {rootHnsEndpointName: x}", "winkernel.rootHnsEndpointName"),
        ("winkernel: {forwardHealthCheckVip: true}", "winkernel.forwardHealthCheckVip"),
        ("configSyncPeriod: 1m", "configSyncPeriod"),
        ("portRange: 1-2", "portRange"),
        ("windowsRunAsService: true", "windowsRunAsService"),
        ("udpIdleTimeout: 250ms", "udpIdleTimeout"),
        ("conntrack: {max: 3}", "conntrack.max"),
        ("mode: ''\nmode: iptables", "mode"),
        ("conntrack: {min: 1, min: 2}", "conntrack.min"),
    ],
)
def test_a_field_without_effect_is_named(read: Read, file: Path, text: str, field: str) -> None:
    before = read("iptables: {localhostNodePorts: false}")
    assert before.notes == ()
    found = read(text)
    assert found.wrong == ()
    named = [one for one in fields_of(found, file) if one.endswith(field)]
    assert len(named) == 1, found.notes


def test_the_last_of_a_field_that_is_there_twice_counts(read: Read, file: Path) -> None:
    found = read("mode: ipvs\nconntrack: {min: 1, min: 2}\nmode: nftables\n")
    assert found.config.mode == "nftables"
    assert found.config.conntrack == ConntrackSettings(min=2)
    assert fields_of(found, file) == ["mode", "conntrack.min"]
    text = '{"kind": "KubeProxyConfiguration", "mode": "ipvs", "mode": "nftables",'
    file.write_text(text + '"apiVersion": "kubeproxy.config.k8s.io/v1alpha1"}')
    found = examined(Flags(config=str(file)))
    assert (found.config.mode, fields_of(found, file)) == ("nftables", ["mode"])


def test_kube_proxys_own_defaults_ask_for_nothing(read: Read) -> None:
    found = read(
        "clientConnection: {burst: 10, contentType: application/vnd.kubernetes.protobuf, qps: 5}\n"
        "iptables: {localhostNodePorts: false, minSyncPeriod: 1s, syncPeriod: 30s}\n"
        "nftables: {masqueradeBit: 14, minSyncPeriod: 1s, syncPeriod: 30s}\n"
        "ipvs: {syncPeriod: 30s}\nlogging: {flushFrequency: 5s, format: text}\n"
        "configSyncPeriod: 15m0s\n"
    )
    assert (found.notes, found.wrong) == ((), ())


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        ("mode: kernelspace", "mode", "'kernelspace' is no mode; there is: auto, nftables"),
        ("mode: [ipvs]", "mode", "Expected `str`, got `array`"),
        ("hostnameOverride: ' '", "hostnameOverride", "must not be empty"),
        ("hostnameOverride: 7", "hostnameOverride", "Expected `str`, got `int`"),
        ("bindAddress: here", "bindAddress", "'here' is no address"),
        ("clusterCIDR: 10.0.0.0/8,11.0.0.0/8", "clusterCIDR", "one range of each IP family"),
        ("clusterCIDR: x", "clusterCIDR", "'x' is no CIDR"),
        ("clusterCIDR: [10.0.0.0/8]", "clusterCIDR", "Expected `str`, got `array`"),
        ("nodePortAddresses: primary", "nodePortAddresses", "Expected `array`, got `str`"),
        ("nodePortAddresses: [1]", "nodePortAddresses[0]", "Expected `str`, got `int`"),
        ("nodePortAddresses: [far]", "nodePortAddresses", "'far' is no CIDR"),
        ("detectLocalMode: Guess", "detectLocalMode", "Invalid enum value 'Guess'"),
        (
            "detectLocalMode: BridgeInterface",
            "detectLocal.bridgeInterface",
            "'' is no interface name, which detectLocalMode BridgeInterface needs",
        ),
        ("iptables: {masqueradeBit: 32}", "iptables.masqueradeBit", "not between 0 and 31"),
        ("iptables: {masqueradeAll: 'no'}", "iptables.masqueradeAll", "Expected `bool`"),
        ("iptables: {syncPeriod: soon}", "iptables.syncPeriod", "'soon' is no time"),
        ("iptables: []", "iptables", "Expected `object`, got `array`"),
        ("ipvs: {scheduler: best}", "ipvs.scheduler", "'best' is no IPVS scheduler"),
        ("ipvs: {tcpTimeout: -1s}", "ipvs.tcpTimeout", "'-1s' is no time"),
        ("ipvs: {excludeCIDRs: x}", "ipvs.excludeCIDRs", "Expected `array`, got `str`"),
        ("conntrack: {min: -1}", "conntrack.min", "-1 is not between 0 and"),
        ("conntrack: {maxPerCore: many}", "conntrack.maxPerCore", "Expected `int`, got `str`"),
        ("conntrack: {udpTimeout: 3}", "conntrack.udpTimeout", "Expected `str`, got `int`"),
        ("healthzBindAddress: localhost:1", "healthzBindAddress", "is no ADDRESS:PORT"),
        ("metricsBindAddress: 0.0.0.0:70000", "metricsBindAddress", "is no ADDRESS:PORT"),
        ("metricsBindAddress: '[::1'", "metricsBindAddress", "is no ADDRESS:PORT"),
        ("oomScoreAdj: -1001", "oomScoreAdj", "not between -1000 and 1000"),
        ("logging: {format: xml}", "logging.format", "'xml' is no format of log lines"),
        ("featureGates: {X: maybe}", "featureGates[...]", "Expected `bool`, got `str`"),
        ("configSyncPeriod: often", "configSyncPeriod", "'often' is no time"),
    ],
)
def test_a_wrong_field_is_named(read: Read, file: Path, text: str, where: str, why: str) -> None:
    found = read(text)
    assert [one.where for one in found.wrong] == [f"{file}: {where}"]
    assert why in found.wrong[0].why
    with pytest.raises(ConfigError, match="^" + str(file)):
        load(Flags(config=str(file)))


def test_everything_wrong_is_told_at_once(read: Read, file: Path) -> None:
    found = read(f"mode: x\noomScoreAdj: y\n{VIPD}drainSeconds: -1\nnodeNmae: z\n")
    assert [one.where.removeprefix(f"{file}: ") for one in found.wrong] == [
        "oomScoreAdj",
        "nodeNmae",
        "mode",
        "drainSeconds",
    ]


def test_vipds_own_document_wins_and_flags_win_over_both(read: Read, file: Path) -> None:
    kube_proxy = (
        "mode: ipvs\nclientConnection: {kubeconfig: /k}\nhostnameOverride: a\n"
        "conntrack: {min: 1, maxPerCore: 2}\nmetricsBindAddress: 127.0.0.1:1\n"
        "nftables: {masqueradeBit: 5}\niptables: {masqueradeBit: 6}\n"
    )
    found = read(f"{kube_proxy}{VIPD}")
    assert (found.config.mode, found.config.node.masquerade_bit) == ("ipvs", 6)
    vipd = "mode: nftables\nmanifests: [/m]\nconntrack: {min: 3}\nhttp: {metrics: ''}\n"
    found = read(f"{kube_proxy}{VIPD}{vipd}")
    assert (found.config.mode, found.config.node.masquerade_bit) == ("nftables", 5)
    assert (found.config.manifests, found.config.kubeconfig) == (("/m",), "")
    assert found.config.conntrack == ConntrackSettings(min=3, max_per_core=2)
    assert found.config.http.metrics is None
    assert found.origins["conntrack.min"] == f"{file}: conntrack.min"
    found = read(
        f"{kube_proxy}{VIPD}{vipd}",
        mode="userspace",
        kubeconfig="/f",
        node_name="b",
        conntrack_min=4,
        metrics_bind_address="127.0.0.1",
    )
    assert (found.config.mode, found.config.node.masquerade_bit) == ("userspace", 6)
    assert (found.config.manifests, found.config.kubeconfig) == ((), "/f")
    assert found.config.node.node_name == "b"
    assert found.config.conntrack == ConntrackSettings(min=4, max_per_core=2)
    assert found.config.http.metrics == (parse_address("127.0.0.1"), 10249)
    assert found.origins["conntrack.min"] == "--conntrack-min"
    assert found.wrong == ()


def test_which_wins_does_not_depend_on_the_order_of_the_documents(file: Path) -> None:
    file.write_text(f"{VIPD}mode: nftables\n---\n{HEAD}mode: ipvs\n")
    assert load(Flags(config=str(file))).mode == "nftables"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (HEAD.replace("v1alpha1", "v1alpha2"), "must be kubeproxy.config.k8s.io/v1alpha1"),
        (f"{HEAD}---\n{HEAD}", "more than one document of kind KubeProxyConfiguration"),
        (f"{HEAD}---\nkind: KubeletConfiguration\n", "kind is 'KubeletConfiguration'"),
        (f"{HEAD}mode: [\n", "not YAML"),
        (f"{HEAD}mode: a\nmode: [\n", "not YAML"),
        (f"{HEAD}mode: a\nmode: b\nipvs: &a [*a]\n", "not YAML"),
        ("[]", "is not an object"),
        ("\0", "not YAML"),
        (f"{HEAD}? [a]\n: b\n", "."),
    ],
)
def test_a_file_that_is_none(file: Path, text: str, why: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=why) as caught:
        load(Flags(config=str(file)))
    assert str(file) in str(caught.value)


def test_the_file_that_says_the_same_is_read_as_the_same(tmp_path: Path) -> None:
    text = KUBEADM.read_text().replace('detectLocalMode: ""', "detectLocalMode: NodeCIDR")
    (tmp_path / "a").write_text(
        f"{text}{VIPD}dns: {{listen: [10.96.0.10]}}\nnodePortAddresses: [primary, 10.0.0.0/8]\n"
    )
    config = load(Flags(config=str(tmp_path / "a")))
    (tmp_path / "b").write_bytes(msgspec.json.encode(as_file(config)))
    assert load(Flags(config=str(tmp_path / "b"))) == config
    shown = msgspec.json.decode(msgspec.json.encode(config, enc_hook=str))
    assert shown["http"]["metrics"] == ["127.0.0.1", 10249]


def test_without_kube_proxys_document_only_this_node_is_told(tmp_path: Path) -> None:
    """Load balancers and the kubelet ask at the node's address: in a pod /healthz is open."""
    config = load(Flags(manifests=("/m",)))
    assert (config.conntrack, config.oom_score_adjust) == (None, None)
    assert config.http.healthz == (parse_address("127.0.0.1"), 10256)
    assert config.http.metrics == (parse_address("127.0.0.1"), 10249)
    assert load(Flags(kubeconfig="/k")).http.healthz == (parse_address("127.0.0.1"), 10256)
    in_pod = load(Flags())
    assert in_pod.http.healthz == (parse_address("0.0.0.0"), 10256)
    assert in_pod.http.metrics == (parse_address("127.0.0.1"), 10249)
    assert config.dataplane == DataplaneSettings()
