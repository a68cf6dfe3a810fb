"""`vipd cleanup` on the real kernel where it cannot do everything: it says so."""

import json
import os
import shutil
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
