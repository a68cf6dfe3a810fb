"""kube-proxy's flags at `vipd run`: those that mean something, and those that are named."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vipd.proxy.cli.config import config
from vipd.proxy.cli.kube_proxy_options import SWITCHES_WITHOUT_EFFECT, TEXTS_WITHOUT_EFFECT
from vipd.proxy.cli.run import run
from vipd.proxy.errors import ConfigError
from vipd.proxy.version import VERSION


def shown(*arguments: str) -> Any:
    """Return what `vipd config show` says, which reads flags as `vipd run` does."""
    told = CliRunner().invoke(config, ["show", *arguments, "--json"], catch_exceptions=False)
    assert told.exit_code == 0, told.output
    return json.loads(told.stdout)


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--proxy-mode", "ipvs"], "mode", "ipvs"),
        (["--mode", "ipvs"], "mode", "ipvs"),
        (["--proxy-mode="], "mode", "auto"),
        (["--hostname-override", "A"], "nodeName", "a"),
        (["--kubeconfig", "/k"], "kubeconfig", "/k"),
        (["--bind-address", "192.0.2.1"], "nodeIPs", ["192.0.2.1"]),
        (["--bind-address", "0.0.0.0"], "nodeIPs", []),
        (["--bind-address", "192.0.2.1", "--node-ip", "192.0.2.2"], "nodeIPs", ["192.0.2.2"]),
        (["--cluster-cidr", "10.0.0.0/8,fd00::/8"], "clusterCIDRs", ["10.0.0.0/8", "fd00::/8"]),
        (["--nodeport-addresses=10.0.0.0/8"], "nodePortAddresses", ["10.0.0.0/8"]),
        (
            ["--nodeport-addresses=primary", "--nodeport-addresses=10.0.0.0/8,fd00::/8"],
            "nodePortAddresses",
            ["primary", "10.0.0.0/8", "fd00::/8"],
        ),
        (
            ["--cluster-cidr=10.0.0.0/8", "--cluster-cidr=fd00::/8"],  # a text in kube-proxy
            "clusterCIDRs",
            ["fd00::/8"],
        ),
        (["--nodeport-addresses=all"], "nodePortAddresses", ["0.0.0.0/0", "::/0"]),
        (["--detect-local-mode", "NodeCIDR"], "detectLocalMode", "NodeCIDR"),
        (
            ["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0"],
            "detectLocal.bridgeInterface",
            "cni0",
        ),
        (
            ["--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=cali"],
            "detectLocal.interfaceNamePrefix",
            "cali",
        ),
        (["--masquerade-all"], "masqueradeAll", True),
        (["--masquerade-all=true"], "masqueradeAll", True),
        (["--masquerade-all=F"], "masqueradeAll", False),
        (["--iptables-masquerade-bit", "3"], "masqueradeBit", 3),
        (["--iptables-masquerade-bit", "3", "--mode", "nftables"], "masqueradeBit", 14),
        (["--ipvs-scheduler", "lc"], "ipvs.scheduler", "lc"),
        (["--ipvs-strict-arp"], "ipvs.strictARP", True),
        (["--ipvs-tcp-timeout", "15m"], "ipvs.tcpTimeout", "15m0s"),
        (["--ipvs-tcpfin-timeout", "2m"], "ipvs.tcpFinTimeout", "2m0s"),
        (["--ipvs-udp-timeout", "5m"], "ipvs.udpTimeout", "5m0s"),
        (["--conntrack-max-per-core", "0"], "conntrack.maxPerCore", 0),
        (["--conntrack-max-per-core", "0"], "conntrack.tcpEstablishedTimeout", "24h0m0s"),
        (["--conntrack-min=7"], "conntrack.min", 7),
        (["--conntrack-tcp-timeout-established=1h"], "conntrack.tcpEstablishedTimeout", "1h0m0s"),
        (["--conntrack-tcp-timeout-close-wait=1m"], "conntrack.tcpCloseWaitTimeout", "1m0s"),
        (["--conntrack-tcp-be-liberal=true"], "conntrack.tcpBeLiberal", True),
        (["--conntrack-udp-timeout", "9s"], "conntrack.udpTimeout", "9s"),
        (["--conntrack-udp-timeout-stream", "8s"], "conntrack.udpStreamTimeout", "8s"),
        (["--healthz-bind-address", "192.0.2.1"], "http.healthz", "192.0.2.1:10256"),
        (["--healthz-bind-address", "[::]:1"], "http.healthz", "[::]:1"),
        (["--healthz-bind-address", "::", "--healthz-port", "2"], "http.healthz", "[::]:2"),
        (["--healthz-bind-address", ""], "http.healthz", ""),
        (["--healthz-port", "0"], "http.healthz", ""),
        (["--metrics-bind-address", "0.0.0.0"], "http.metrics", "0.0.0.0:10249"),
        (["--metrics-bind-address="], "http.metrics", ""),
        (["--metrics-port=0", "--metrics-bind-address=0.0.0.0:1"], "http.metrics", ""),
        (["--bind-address-hard-fail"], "http.mustBind", True),
        (["--oom-score-adj", "-998"], "oomScoreAdj", -998),
        (["--logging-format", "json"], "logFormat", "json"),
        (["--feature-gates=AllowServiceExternalIPs=false"], "serveExternalIPs", False),
        (
            ["--feature-gates=AllowServiceExternalIPs=false", "--feature-gates="],
            "serveExternalIPs",
            False,
        ),
        (["--drain", "5m"], "drainSeconds", 300),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_that_counts(arguments: Sequence[str], field: str, value: object) -> None:
    told = shown(*arguments)
    assert told["fields"][field]["value"] == value
    if "--iptables-masquerade-bit" not in arguments:
        assert told["withoutEffect"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        *([f"{name}=3"] for name in TEXTS_WITHOUT_EFFECT),
        *([f"{name}=true"] for name in SWITCHES_WITHOUT_EFFECT),
        *([name] for name in SWITCHES_WITHOUT_EFFECT),
        ["-v", "4"],
        ["-v4"],
        ["-v=4"],
        ["--feature-gates", "Foo=true,AllowServiceExternalIPs=true"],
        ["--iptables-masquerade-bit=3", "--proxy-mode=nftables"],
        ["--healthz-port=10000"],
        ["--metrics-port=10000", "--metrics-bind-address=0.0.0.0:1"],
    ],
    ids=" ".join,
)
def test_a_flag_without_effect_is_taken_and_named(arguments: Sequence[str]) -> None:
    (named,) = shown(*arguments)["withoutEffect"]
    name = arguments[0].partition("=")[0]
    assert named["where"].split()[0] == ("--v" if name.startswith("-v") else name)
    assert named["instead"]


@pytest.mark.parametrize("name", SWITCHES_WITHOUT_EFFECT)
def test_a_switch_that_is_off_asks_for_nothing(name: str) -> None:
    assert shown(f"{name}=false")["withoutEffect"] == []


@pytest.mark.parametrize(
    ("arguments", "where", "why"),
    [
        (["--bind-address", "x"], "--bind-address", "'x' is no address"),
        (["--detect-local-mode", "X"], "--detect-local-mode", "Invalid enum value 'X'"),
        (["--detect-local-mode", "BridgeInterface"], "--detect-local-mode", "needs"),
        (["--iptables-masquerade-bit", "32"], "--iptables-masquerade-bit", "between 0 and 31"),
        (["--ipvs-tcp-timeout", "x"], "--ipvs-tcp-timeout", "no time"),
        (["--conntrack-min", "-1"], "--conntrack-min", "not between"),
        (["--conntrack-udp-timeout", "x"], "--conntrack-udp-timeout", "no time"),
        (["--healthz-bind-address", "x"], "--healthz-bind-address", "no ADDRESS:PORT"),
        (["--metrics-bind-address", "x:1"], "--metrics-bind-address", "no ADDRESS:PORT"),
        (["--oom-score-adj", "2000"], "--oom-score-adj", "between -1000 and 1000"),
        (["--feature-gates", "Foo"], "--feature-gates", "'Foo' is not NAME=true"),
        (["--kubeconfig", "/k", "--manifests", "/m"], "--kubeconfig", "there is one source"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_named(arguments: Sequence[str], where: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        shown(*arguments)
    assert caught.value.where == where
    assert why in caught.value.why


def test_what_is_neither_true_nor_false_is_wrong_usage() -> None:
    told = CliRunner().invoke(config, ["show", "--masquerade-all=perhaps"])
    assert told.exit_code == 2
    assert "--masquerade-all: 'perhaps' is neither true nor false" in told.output


def test_gates_that_are_given_one_by_one_all_count() -> None:
    told = shown("--feature-gates=Foo=true", "--feature-gates=AllowServiceExternalIPs=false")
    assert [one["where"] for one in told["withoutEffect"]] == ["--feature-gates Foo"]
    assert told["fields"]["serveExternalIPs"]["value"] is False


@pytest.mark.parametrize("flag", ["--version", "--version=true", "--version=raw"])
def test_the_version(flag: str) -> None:
    told = CliRunner().invoke(run, [flag, "--mode", "none"])
    assert (told.exit_code, told.output) == (0, f"vipd, version {VERSION}\n")


def test_no_version() -> None:
    assert shown("--version=false", "--mode=ipvs")["fields"]["mode"]["value"] == "ipvs"
    told = CliRunner().invoke(run, ["--version=v1.37.0"])
    assert told.exit_code == 2
    assert "--version: 'v1.37.0' is neither true, false nor raw" in told.output


def test_what_follows_two_hyphens_is_no_flag(tmp_path: Path) -> None:
    told = CliRunner().invoke(run, ["--", "--masquerade-all=true"])
    assert "unexpected argument '--masquerade-all=true'" in told.output


def test_the_configuration_is_written_for_every_node(tmp_path: Path) -> None:
    path = tmp_path / "vipd.yaml"
    flags = ["--proxy-mode=ipvs", "--conntrack-min=7", "--metrics-port=0"]
    told = CliRunner().invoke(run, [*flags, "--write-config-to", str(path)], catch_exceptions=False)
    assert told.exit_code == 0
    assert "nodeName" not in path.read_text()
    given = {name: one["value"] for name, one in shown(*flags)["fields"].items()}
    read = {name: one["value"] for name, one in shown("--config", str(path))["fields"].items()}
    assert read == given


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        CliRunner().invoke(
            run,
            ["--manifests", str(tmp_path), "--write-config-to", str(tmp_path / "no" / "file")],
            catch_exceptions=False,
        )
