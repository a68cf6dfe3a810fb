"""Configuration: flags win over the file, and every problem names its place."""

from pathlib import Path

import pytest

from vipd.proxy.config import DEFAULT_SOCKET, Flags, load
from vipd.proxy.durations import parse_duration
from vipd.proxy.errors import ConfigError
from vipd.proxy.names import parse_address, parse_network
from vipd.proxy.settings import (
    ConntrackSettings,
    DataplaneSettings,
    DetectLocal,
    HttpSettings,
    IpvsSettings,
    UserspaceSettings,
)

HEAD = "apiVersion: vipd/v1alpha1\nkind: VipdConfiguration\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "vipd.yaml"


def written(file: Path, text: str) -> Flags:
    file.write_text(HEAD + text)
    return Flags(config=str(file))


def test_defaults() -> None:
    config = load(Flags(node_name="N1"))
    assert (config.mode, config.socket, config.manifests) == ("auto", DEFAULT_SOCKET, ())
    assert config.node.node_name == "n1"
    assert config.node.node_port_addresses is None
    assert (config.node.masquerade_all, config.node.masquerade_bit) == (False, 14)
    assert config.dataplane == DataplaneSettings()


def test_every_field_of_a_file(file: Path) -> None:
    config = load(
        written(
            file,
            "mode: nftables\nmanifests: [/a, /b]\nnodeName: ' Node-1 '\n"
            "nodeIPs: [192.0.2.1, '2001:db8::1']\nclusterCIDRs: [10.244.0.0/16, 'fd00::/48']\n"
            "serviceCIDRs: [10.96.0.0/16]\ndetectLocalMode: InterfaceNamePrefix\n"
            "detectLocal: {interfaceNamePrefix: cali}\nmasqueradeAll: true\nmasqueradeBit: 3\n"
            "nodePortAddresses: [0.0.0.0/0]\nsocket: /tmp/s\ndrainSeconds: 60\n"
            "ipvs: {scheduler: wlc, tcpTimeout: 15m0s, tcpFinTimeout: 2m, udpTimeout: 300s,"
            " strictARP: true}\nuserspace: {workers: 3, transparent: true, transparentBit: 5}\n"
            "conntrack: {maxPerCore: 1, min: 2, tcpEstablishedTimeout: 3s, tcpCloseWaitTimeout: 4s,"
            " tcpBeLiberal: true, udpTimeout: 5s, udpStreamTimeout: 6s}\n"
            "http: {healthz: 192.0.2.1, metrics: '[::]:7', mustBind: true,"
            " countsEndpoints: false}\n"
            "oomScoreAdj: -5\nlogFormat: json\nserveExternalIPs: false\n",
        )
    )
    assert config.conntrack == ConntrackSettings(
        max_per_core=1,
        min=2,
        tcp_established_seconds=3,
        tcp_close_wait_seconds=4,
        tcp_be_liberal=True,
        udp_seconds=5,
        udp_stream_seconds=6,
    )
    assert config.http == HttpSettings(
        healthz=(parse_address("192.0.2.1"), 10256),
        metrics=(parse_address("::"), 7),
        must_bind=True,
        counts_endpoints=False,
    )
    assert (config.oom_score_adjust, config.log_format) == (-5, "json")
    assert config.node.serve_external_ips is False
    node = config.node
    assert (config.manifests, config.socket) == (("/a", "/b"), "/tmp/s")
    assert node.node_name == "node-1"
    assert node.node_ips == (parse_address("192.0.2.1"), parse_address("2001:db8::1"))
    assert node.cluster_cidrs == (parse_network("10.244.0.0/16"), parse_network("fd00::/48"))
    assert node.service_cidrs == (parse_network("10.96.0.0/16"),)
    assert (node.detect_local, node.local_interface) == (DetectLocal.INTERFACE_NAME_PREFIX, "cali")
    assert (node.masquerade_all, node.masquerade_bit) == (True, 3)
    assert node.node_port_addresses == (parse_network("0.0.0.0/0"),)
    assert config.dataplane == DataplaneSettings(
        ipvs=IpvsSettings(
            scheduler="wlc",
            tcp_timeout=900,
            tcp_fin_timeout=120,
            udp_timeout=300,
            strict_arp=True,
        ),
        userspace=UserspaceSettings(workers=3, transparent=True, transparent_bit=5),
        drain_seconds=60,
    )


def test_a_section_of_connection_tracking_that_is_there_counts(file: Path) -> None:
    assert load(written(file, "")).conntrack is None
    assert load(written(file, "conntrack: {}")).conntrack == ConntrackSettings()
    assert load(written(file, "conntrack: null")).conntrack is None


def test_flags_win_over_the_file(file: Path) -> None:
    told = written(
        file,
        "mode: ipvs\nmanifests: [/a]\nnodeName: a\nclusterCIDRs: [10.0.0.0/8]\nsocket: /a\n"
        "ipvs: {scheduler: sh, strictARP: true}\ndrainSeconds: 60\n",
    )
    flags = Flags(
        config=told.config,
        manifests=("/b",),
        node_name="b",
        cluster_cidr="10.1.0.0/16, fd00::/48",
        socket="/b",
        node_port_addresses="primary",
        masquerade_all=True,
        mode="iptables",
        ipvs_scheduler="lc",
        drain="1h30m",
    )
    config = load(flags)
    assert (config.manifests, config.socket, config.node.node_name) == (("/b",), "/b", "b")
    assert [str(one) for one in config.node.cluster_cidrs] == ["10.1.0.0/16", "fd00::/48"]
    assert config.node.masquerade_all is True
    assert config.mode == "iptables"
    assert config.dataplane.ipvs == IpvsSettings(scheduler="lc", strict_arp=True)
    assert config.dataplane.drain_seconds == 5400


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("clusterCDIRs: []", "", "clusterCDIRs"),
        ("detectLocal: {bridge: x}", "detectLocal", "bridge"),
        ("masqueradeAll: maybe", "masqueradeAll", "bool"),
        ("masqueradeBit: 32", "masqueradeBit", "between 0 and 31"),
        ("masqueradeBit: -1", "masqueradeBit", "between 0 and 31"),
        ("manifests: /a", "manifests", "array"),
        ("mode: magic", "mode", "'magic' is no mode; there is: auto, nftables, iptables, ipvs"),
        (
            "ipvs: {scheduler: fastest}",
            "ipvs.scheduler",
            "'fastest' is no IPVS scheduler; there is: rr, wrr, lc, wlc, lblc, lblcr, sh, mh, dh",
        ),
        ("ipvs: {strictArp: true}", "ipvs", "strictArp"),
        ("ipvs: {tcpTimeout: soon}", "ipvs.tcpTimeout", "'soon' is no time"),
        ("ipvs: {tcpTimeout: -5s}", "ipvs.tcpTimeout", "'-5s' is no time"),
        ("ipvs: {udpTimeout: 1500ms}", "ipvs.udpTimeout", "not whole seconds"),
        ("ipvs: {tcpFinTimeout: 700h}", "ipvs.tcpFinTimeout", "up to 2147483s"),
        ("userspace: {transparent: 1}", "userspace.transparent", "bool"),
        ("userspace: {transparentBit: 32}", "userspace.transparentBit", "between 0 and 31"),
        (
            "masqueradeBit: 12\nuserspace: {transparent: true}",
            "userspace.transparentBit",
            "12 is the masqueradeBit, too",
        ),
        ("drainSeconds: -1", "drainSeconds", "between 0 and 86400"),
        ("drainSeconds: 86401", "drainSeconds", "between 0 and 86400"),
        ("drainSeconds: 5m", "drainSeconds", "int"),
        ("http: {healthz: here}", "http.healthz", "'here' is no ADDRESS:PORT"),
        ("http: {metrics: 127.0.0.1:0}", "http.metrics", "is no ADDRESS:PORT"),
        ("http: {port: 3}", "http.port", "there is no such field"),
        ("http: 3", "http", "Expected `object`, got `int`"),
        ("conntrack: {min: -1}", "conntrack.min", "-1 is not between 0"),
        ("conntrack: {udpTimeout: 1h1}", "conntrack.udpTimeout", "without a unit"),
        ("conntrack: {udpTimeout: 700h}", "conntrack.udpTimeout", "up to 2147483s"),
        ("oomScoreAdj: 1001", "oomScoreAdj", "not between -1000 and 1000"),
        ("logFormat: xml", "logFormat", "'xml' is no format of log lines"),
        ("nodeName: ' '", "nodeName", "must not be empty"),
        ("clusterCIDRs: [10.0.0.0/33]", "clusterCIDRs", "'10.0.0.0/33' is no CIDR"),
        ("clusterCIDRs: [10.0.0.0/8, 11.0.0.0/8]", "clusterCIDRs", "one range of each IP family"),
        ("serviceCIDRs: [x]", "serviceCIDRs", "'x' is no CIDR"),
        ("nodeIPs: [1.2.3]", "nodeIPs", "'1.2.3' is no address"),
        ("nodePortAddresses: [primary, near]", "nodePortAddresses", "'near' is no CIDR"),
        ("detectLocalMode: Guess", "detectLocalMode", "Guess"),
        ("detectLocalMode: BridgeInterface", "detectLocal.bridgeInterface", "no interface name"),
        (
            "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: 'a\" b'}",
            "detectLocal.interfaceNamePrefix",
            "no interface name",
        ),
    ],
)
def test_a_wrong_field_is_named_with_its_file(file: Path, text: str, place: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(file, text))
    assert str(file) in caught.value.where
    assert place in caught.value.where
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        (Flags(mode="magic"), "--mode"),
        (Flags(node_name=" "), "--node-name"),
        (Flags(node_ip="x"), "--node-ip"),
        (Flags(cluster_cidr="x"), "--cluster-cidr"),
        (Flags(service_cidr="10.0.0.0/8,x"), "--service-cidr"),
        (Flags(node_port_addresses="x"), "--nodeport-addresses"),
        (Flags(ipvs_scheduler="x"), "--ipvs-scheduler"),
        (Flags(drain="x"), "--drain"),
        (Flags(drain="25h"), "--drain"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_flag_is_named(flags: Flags, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(flags)
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("apiVersion: vipd/v1alpha1\nkind: Service\n", "kind is 'Service'"),
        ("apiVersion: vipd/v2\nkind: VipdConfiguration\n", "must be vipd/v1alpha1"),
        ("- a\n- b\n", "not"),
        ("{", ""),
        ("", "holds no document of kind VipdConfiguration or KubeProxyConfiguration"),
        (HEAD + "---\n" + HEAD, "holds more than one document of kind VipdConfiguration"),
        (HEAD + "mode: ipvs\nmode: iptables\n", "mode: is there twice"),
    ],
)
def test_a_file_that_is_no_configuration(file: Path, text: str, why: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(Flags(config=str(file)))
    assert str(file) in str(caught.value)
    assert why in str(caught.value)


def test_a_file_that_is_not_there(file: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as caught:
        load(Flags(config=str(file)))
    assert caught.value.where == "--config"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("90", 90),
        ("15m0s", 900),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("500ms", 0.5),
        (".5s", 0.5),
    ],
)
def test_a_time_is_read_as_kube_proxy_reads_it(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 s", "1d", "1m30", "1e3s", "٣s", "1m\n"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"no time|without a unit"):
        parse_duration(text)
