"""Settings of connection tracking: what is written, what is left alone, and what is told."""

import os
from pathlib import Path

import pytest
from msgspec import structs

from vipd.backends import sysctl
from vipd.proxy.config import Flags, load
from vipd.proxy.kernel_settings import KernelSettings, adjust_oom_score, apply
from vipd.proxy.settings import ConntrackSettings

BASE = Path(__file__).parents[2] / "deploy/base"
DEFAULTS = ConntrackSettings()
NAMES = {
    "max": "65536",
    "buckets": "16384",
    "tcp_timeout_established": "432000",
    "tcp_timeout_close_wait": "60",
    "tcp_be_liberal": "0",
    "udp_timeout": "30",
    "udp_timeout_stream": "120",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel with what a node has after its start, and four processors."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    folder = tmp_path / "net/netfilter"
    folder.mkdir(parents=True)
    for name, value in NAMES.items():
        (folder / f"nf_conntrack_{name}").write_text(f"{value}\n")
    return tmp_path


def setting(root: Path, name: str) -> Path:
    return root / f"net/netfilter/nf_conntrack_{name}"


def settings(root: Path) -> dict[str, str]:
    return {name: setting(root, name).read_text().strip() for name in NAMES}


def test_the_defaults_are_those_of_kube_proxy(root: Path) -> None:
    assert apply(DEFAULTS, root) == ()
    assert settings(root) == {
        **NAMES,
        "max": "131072",
        "buckets": "32768",
        "tcp_timeout_established": "86400",
        "tcp_timeout_close_wait": "3600",
    }


def test_everything_that_is_told_is_set(root: Path) -> None:
    told = ConntrackSettings(
        max_per_core=50_000,
        tcp_established_seconds=0,
        tcp_close_wait_seconds=7,
        tcp_be_liberal=True,
        udp_seconds=8,
        udp_stream_seconds=9,
    )
    assert apply(told, root) == ()
    assert settings(root) == {
        "max": "200000",
        "buckets": "50000",
        "tcp_timeout_established": "432000",
        "tcp_timeout_close_wait": "7",
        "tcp_be_liberal": "1",
        "udp_timeout": "8",
        "udp_timeout_stream": "9",
    }


def test_the_table_is_never_made_smaller(root: Path) -> None:
    for limit, size in (("1000000", "250000"), ("131072", "32768")):
        setting(root, "max").write_text(limit)
        setting(root, "buckets").write_text(size)
        assert apply(DEFAULTS, root) == ()
        assert (settings(root)["max"], settings(root)["buckets"]) == (limit, size)


def test_without_a_number_for_each_processor_the_table_is_left_alone(root: Path) -> None:
    assert apply(ConntrackSettings(max_per_core=0), root) == ()
    assert (settings(root)["max"], settings(root)["buckets"]) == ("65536", "16384")


def test_what_is_refused_is_told_and_the_rest_is_set(root: Path) -> None:
    refusing = setting(root, "max")
    refusing.unlink()
    refusing.mkdir()  # nobody can write it, root neither
    setting(root, "tcp_timeout_established").unlink()
    told = apply(DEFAULTS, root)
    assert [one.split(":")[0] for one in told] == [
        "net.netfilter.nf_conntrack_max stays unknown instead of 131072",
        "net.netfilter.nf_conntrack_tcp_timeout_established is not set to 86400",
    ]
    assert setting(root, "buckets").read_text() == "32768"
    assert setting(root, "tcp_timeout_close_wait").read_text() == "3600"


async def test_what_is_not_configured_any_more_is_as_it_was_found(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container, where the host's sysctls are mounted beside its own."""
    monkeypatch.setattr(sysctl, "MOUNTED", root)
    monkeypatch.setattr(sysctl, "ROOT", root / "read-only")
    made = KernelSettings(None, None)
    configured = structs.replace(
        DEFAULTS, tcp_be_liberal=True, tcp_close_wait_seconds=7, udp_seconds=41
    )
    await made.change(configured, None)
    assert settings(root)["tcp_be_liberal"] == "1"
    assert settings(root)["udp_timeout"] == "41"
    setting(root, "udp_timeout").write_text("42")  # somebody else's since
    await made.change(structs.replace(configured, tcp_be_liberal=False, udp_seconds=0), None)
    assert settings(root)["tcp_be_liberal"] == "0"
    assert settings(root)["udp_timeout"] == "42"
    assert settings(root)["tcp_timeout_close_wait"] == "7"
    await made.change(None, None)
    changed = {"max": "131072", "buckets": "32768", "udp_timeout": "42"}
    assert settings(root) == {**NAMES, **changed}
    assert made.refused == ()


def test_the_oom_score(tmp_path: Path) -> None:
    path = tmp_path / "oom_score_adj"
    path.write_text("0\n")
    assert adjust_oom_score(-999, path) == ()
    assert path.read_text() == "-999"
    path.unlink()
    assert len(adjust_oom_score(-999, path)) == 1


def test_a_pod_asks_for_the_oom_score_that_it_has() -> None:
    """Lowering it takes a privilege that the DaemonSet's container has not.

    The kubelet gives -997 where the priority is system-node-critical (pkg/kubelet/qos/policy.go).
    """
    found = load(Flags(config=str(BASE / "vipd.yaml"), node_name="n", kubeconfig="/k"))
    assert found.oom_score_adjust == -997
    assert "priorityClassName: system-node-critical" in (BASE / "daemonset.yaml").read_text()
