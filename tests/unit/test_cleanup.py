"""`vipd cleanup` on the real kernel where it cannot do everything: it says so."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

NFT = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin")
pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(NFT is None, reason="needs nft (Debian's package nftables)"),
]
CLEANUP = f"{sys.executable} -P -m vipd.proxy.cli cleanup"
NO_NFT = f"mount --bind /dev/null {NFT}"


def node(*lines: str) -> subprocess.CompletedProcess[str]:
    """Run shell lines in a network namespace and a mount namespace of their own."""
    return subprocess.run(
        ["unshare", "--net", "--mount", "bash", "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Return a directory with the record of a daemon."""
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / "mode.json").write_text("{}")
    return folder


@pytest.mark.parametrize("dry_run", ["", "--dry-run"])
def test_what_it_cannot_look_for_without_a_tool_is_told(tmp_path: Path, dry_run: str) -> None:
    done = node(
        f"{NFT} add table ip vipd",
        NO_NFT,
        f"{CLEANUP} {dry_run} --socket {tmp_path}/s; code=$?",
        f"umount {NFT}; {NFT} list tables >&2; exit $code",
    )
    assert (done.returncode, done.stdout) == (0, "")
    for part in ("nftables", "skeleton"):
        assert f"vipd: {part}: cannot look: nft is not there: install " in done.stderr
    assert done.stderr.endswith("table ip vipd\n")


def test_the_other_modes_are_cleaned_up_all_the_same(tmp_path: Path) -> None:
    done = node(NO_NFT, f"{CLEANUP} --mode ipvs --socket {tmp_path}/s")
    assert done.returncode == 0
    assert done.stdout == (
        f"nothing of vipd's mode ipvs was here (looked in this network namespace and {tmp_path})\n"
    )


def test_without_the_capability_it_has_failed(tmp_path: Path) -> None:
    done = node(f"exec setpriv --bounding-set=-net_admin {CLEANUP} --socket {tmp_path}/s")
    assert (done.returncode, done.stdout) == (1, "")
    assert "vipd: nftables: CAP_NET_ADMIN: " in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_there_only_where_all_was_looked_at(tmp_path: Path) -> None:
    done = node(f"{CLEANUP} --socket {tmp_path}/s")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"nothing of vipd was here (looked in this network namespace and {tmp_path})\n"
    )


def test_the_socket_of_the_configuration_says_where_the_record_is(
    tmp_path: Path, state: Path
) -> None:
    config = tmp_path / "vipd.yaml"
    config.write_text(
        f"kind: VipdConfiguration\napiVersion: vipd/v1alpha1\nsocket: {state}/vipd.sock\n"
    )
    done = node(f"{CLEANUP} --config {config}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"removed file {state}/mode.json\n"
    assert list(state.iterdir()) == []


def test_a_draft_of_the_record_goes_too(state: Path) -> None:
    (state / ".mode.json").write_text("{")
    done = node(f"{CLEANUP} --socket {state}/vipd.sock")
    assert done.returncode == 0
    assert done.stdout == f"removed file {state}/mode.json\nremoved file {state}/.mode.json\n"
    assert list(state.iterdir()) == []


def test_a_record_that_cannot_be_removed_is_a_failure(state: Path) -> None:
    (state / "mode.json").unlink()
    (state / "mode.json").mkdir()
    done = node(f"{NFT} add table ip vipd", f"{CLEANUP} --json --socket {state}/vipd.sock")
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["removed"] == ["table ip vipd"]
    assert told["failed"] == [f"file {state}/mode.json: Is a directory"]
    assert told["unknown"] == []


def test_refused_while_a_daemon_of_another_network_namespace_has_the_folder(state: Path) -> None:
    path = state / "vipd.sock"
    other = f"{NFT} add table ip vipd"
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(path))
        daemon.listen()
        done = node(other, f"{CLEANUP} --socket {path}")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(
            f"vipd: a daemon (pid {os.getpid()}) listens on {path}: stop it first, or name another "
        )
        assert sorted(one.name for one in state.iterdir()) == ["mode.json", "vipd.sock"]
        only_one = node(other, f"{CLEANUP} --mode nftables --socket {path}")
        assert (only_one.returncode, only_one.stdout) == (1, "")
        dry = node(other, f"{CLEANUP} --dry-run --socket {path}")
        assert (dry.returncode, dry.stderr) == (0, done.stderr)
        assert "would remove table ip vipd\n" in dry.stdout
        elsewhere = node(other, f"{CLEANUP} --socket {state}/other/vipd.sock")
        assert (elsewhere.returncode, elsewhere.stdout) == (0, "removed table ip vipd\n")
    done = node(other, f"{CLEANUP} --socket {path}")  # it is gone, and its socket is not
    assert done.returncode == 0
    assert list(state.iterdir()) == []


WEB = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}
"""
LEFT = ("table ip vipd-userspace", "local route 10.96.0.10", "2 workers with 0 open connections")


def test_workers_are_counted_and_their_folder_goes(tmp_path: Path) -> None:
    state, config = tmp_path / "state", tmp_path / "vipd.yaml"
    (tmp_path / "web.yaml").write_text(WEB)
    config.write_text(
        "kind: VipdConfiguration\napiVersion: vipd/v1alpha1\nmode: userspace\n"
        f"manifests: [{tmp_path}/web.yaml]\nsocket: {state}/vipd.sock\nnodeIPs: [192.0.2.1]\n"
        "userspace: {workers: 2}\n"
    )
    vipd = f"{sys.executable} -P -m vipd.proxy.cli"
    done = node(
        "ip link set lo up; ip address add 192.0.2.1/32 dev lo",
        f"{vipd} run --config {config} 2> {tmp_path}/log & daemon=$!",
        "for try in $(seq 50)",
        f"do {vipd} status --json --socket {state}/vipd.sock | grep -q '\"synced\":true' && break",
        f"kill -0 $daemon || cat {tmp_path}/log; done 2> /dev/null",
        "kill $daemon; wait $daemon",
        f"{CLEANUP} --dry-run --config {config}; echo",
        f"{CLEANUP} --config {config}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    would, did = (part.splitlines() for part in done.stdout.split("\n\n"))
    for line in (*LEFT, f"folder {state}/workers", f"file {state}/mode.json"):
        assert f"would remove {line}" in would
        assert f"removed {line}" in did
    assert list(state.iterdir()) == []


def test_only_kube_proxys_is_removed_beside_a_daemon(state: Path) -> None:
    path = state / "vipd.sock"
    both = f"{NFT} add table ip vipd; {NFT} add table ip kube-proxy"
    listing = f"{NFT} list tables"
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(path))
        daemon.listen()
        done = node(both, f"{CLEANUP} --only-kube-proxy --socket {path}", listing)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "removed kube-proxy's nft table ip kube-proxy\ntable ip vipd\n"
    assert sorted(one.name for one in state.iterdir()) == ["mode.json", "vipd.sock"]
    done = node(f"{CLEANUP} --only-kube-proxy --socket {path}")
    assert done.stdout.startswith("nothing of kube-proxy was here ")
    wrong = node(f"{CLEANUP} --only-kube-proxy --mode ipvs --socket {path}")
    assert wrong.returncode == 2
