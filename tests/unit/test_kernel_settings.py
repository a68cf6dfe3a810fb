"""Settings of connection tracking: what is written, what is left alone, and what is told."""

import os
from pathlib import Path

import pytest

from vipd.proxy.kernel_settings import adjust_oom_score, apply
from vipd.proxy.settings import ConntrackSettings

DEFAULTS = ConntrackSettings()
NAMES = {
    "max": "65536",
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
    folder = tmp_path / "proc/sys/net/netfilter"
    folder.mkdir(parents=True)
    for name, value in NAMES.items():
        (folder / f"nf_conntrack_{name}").write_text(f"{value}\n")
    buckets = tmp_path / "sys/module/nf_conntrack/parameters/hashsize"
    buckets.parent.mkdir(parents=True)
    buckets.write_text("16384\n")
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/oom_score_adj").write_text("0\n")
    return tmp_path


def settings(root: Path) -> dict[str, str]:
    folder = root / "proc/sys/net/netfilter"
    return {name: (folder / f"nf_conntrack_{name}").read_text().strip() for name in NAMES}


def buckets(root: Path) -> str:
    return (root / "sys/module/nf_conntrack/parameters/hashsize").read_text().strip()


def test_the_defaults_are_those_of_kube_proxy(root: Path) -> None:
    assert apply(DEFAULTS, root) == ()
    changed = {"max": "131072", "tcp_timeout_established": "86400"}
    assert settings(root) == {**NAMES, **changed, "tcp_timeout_close_wait": "3600"}
    assert buckets(root) == "32768"


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
        "tcp_timeout_established": "432000",
        "tcp_timeout_close_wait": "7",
        "tcp_be_liberal": "1",
        "udp_timeout": "8",
        "udp_timeout_stream": "9",
    }


def test_the_table_is_never_made_smaller(root: Path) -> None:
    for limit, size in (("1000000", "250000"), ("131072", "32768")):
        (root / "proc/sys/net/netfilter/nf_conntrack_max").write_text(limit)
        (root / "sys/module/nf_conntrack/parameters/hashsize").write_text(size)
        assert apply(DEFAULTS, root) == ()
        assert (settings(root)["max"], buckets(root)) == (limit, size)


def test_without_a_number_for_each_processor_the_table_is_left_alone(root: Path) -> None:
    assert apply(ConntrackSettings(max_per_core=0), root) == ()
    assert (settings(root)["max"], buckets(root)) == ("65536", "16384")


def test_what_is_refused_is_told_and_the_rest_is_set(root: Path) -> None:
    refusing = root / "proc/sys/net/netfilter/nf_conntrack_max"
    refusing.unlink()
    refusing.mkdir()  # nobody can write it, root neither
    (root / "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established").unlink()
    told = apply(DEFAULTS, root)
    assert [one.split(":")[0] for one in told] == [
        "net.netfilter.nf_conntrack_max stays unknown instead of 131072",
        "net.netfilter.nf_conntrack_tcp_timeout_established is not set to 86400",
    ]
    assert buckets(root) == "32768"
    close_wait = root / "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait"
    assert close_wait.read_text() == "3600"


def test_the_oom_score(root: Path) -> None:
    assert adjust_oom_score(-999, root) == ()
    assert (root / "proc/self/oom_score_adj").read_text() == "-999"
    (root / "proc/self/oom_score_adj").unlink()
    assert len(adjust_oom_score(-999, root)) == 1
