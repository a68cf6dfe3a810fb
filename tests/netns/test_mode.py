"""`vipd mode` as an operator types it, where nothing is switched: asked, shown, refused."""

import json
import shutil
from pathlib import Path

import pytest
from tests.netns.cluster import LOCAL, TCP4, Cluster

pytestmark = pytest.mark.netns

NO_IPVS = not Path("/proc/net/ip_vs").exists()


def mode(cluster: Cluster, *arguments: str) -> tuple[int, str, str]:
    done = cluster.cli("mode", *arguments, "--socket", cluster.socket)
    return done.returncode, done.stdout, done.stderr


def test_it_shows_the_mode_in_use(cluster: Cluster) -> None:
    assert mode(cluster) == (0, "nftables\n", "")
    code, printed, _ = mode(cluster, "--json")
    assert code == 0
    assert json.loads(printed)["mode"] == "nftables"


def test_an_unknown_mode_is_refused_with_those_there_are(cluster: Cluster) -> None:
    for more in ((), ("--dry-run",), ("--force",)):
        code, printed, complaint = mode(cluster, "ebpf", *more)
        assert (code, printed) == (2, "")
        assert "'ebpf' is no mode; there is: nftables, iptables, ipvs" in complaint


def test_a_time_that_is_none_is_wrong_usage(cluster: Cluster) -> None:
    code, _, complaint = mode(cluster, "nftables", "--drain", "soon")
    assert code == 2
    assert "'soon' is no time such as 90s, 5m or 1h30m" in complaint


def test_the_mode_that_serves_stays(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    code, printed, _ = mode(cluster, "nftables")
    assert (code, printed) == (0, "nftables serves already\n")
    assert served.outcome("client-1") == f"{LOCAL} saw client-1"


@pytest.mark.skipif(not NO_IPVS, reason="this kernel has IPVS")
def test_what_the_host_lacks_is_named_and_nothing_is_changed(cluster: Cluster) -> None:
    served = cluster.serve(TCP4, LOCAL)
    before = cluster.rules()
    for more in ((), ("--force",)):
        code, printed, complaint = mode(cluster, "ipvs", *more)
        assert code == 1
        assert "mode ipvs does not work here" in complaint
        assert "modprobe ip_vs" in complaint
        assert "nftables goes on serving; nothing was changed" in complaint
        assert printed.startswith("probe ")
    assert cluster.rules() == before
    assert cluster.status().mode == "nftables"
    assert served.outcome("client-1") == f"{LOCAL} saw client-1"


@pytest.mark.skipif(shutil.which("iptables", path="/usr/sbin:/sbin") is None, reason="no iptables")
def test_a_dry_run_says_what_would_be_done(cluster: Cluster) -> None:
    cluster.serve(TCP4, LOCAL)
    before = cluster.rules()
    code, printed, _ = mode(cluster, "iptables", "--dry-run")
    assert code == 0
    assert "would program" in printed
    assert "kernel objects of iptables beside the old ones" in printed
    assert "would drain" in printed
    assert cluster.rules() == before
    assert cluster.cli("cleanup", "--mode", "iptables", "--dry-run").stdout.startswith("nothing")


def test_without_a_daemon_it_says_so(cluster: Cluster) -> None:
    done = cluster.cli("mode", "iptables", "--socket", "/nonexistent/vipd.sock")
    assert done.returncode == 1
    assert "is `vipd run` running?" in done.stderr


def test_check_tells_every_mode_and_what_it_does_otherwise(cluster: Cluster) -> None:
    done = cluster.cli("check", "--json")
    assert done.returncode == 0
    told = {one["mode"]: one for one in json.loads(done.stdout)}
    assert list(told) == ["nftables", "iptables", "ipvs", "userspace"]
    assert told["nftables"]["supported"]
    for one in ("nftables", "ipvs", "userspace"):
        assert all({"name", "what"} <= set(each) for each in told[one]["differences"])
    text = cluster.cli("check").stdout
    assert "nftables: works here (--mode auto takes it)" in text
    for one in told["iptables"]["differences"]:
        assert f"differs: {one['name']}: " in text


def test_an_unknown_mode_to_clean_up_is_wrong_usage(cluster: Cluster) -> None:
    done = cluster.cli("cleanup", "--mode", "ebpf")
    assert done.returncode == 2
    assert "--mode: 'ebpf' is no mode; there is: nftables, iptables, ipvs, userspace" in done.stderr
