"""Lab, daemon and packets without root: a part of test_cluster_ip.py in a user namespace."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.netns

# The uid outside is the caller's: as root this still drops every privilege over the machine.
WAY_IN = ("unshare", "--user", "--map-root-user", "--net", "--mount")
PART = "nftables and (keep_their_source or without_endpoints or unknown_port or TestHairpin)"


def test_a_part_of_the_tests_in_a_user_namespace(tmp_path: Path) -> None:
    probe = subprocess.run([*WAY_IN, "true"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        pytest.skip(f"the kernel forbids user namespaces: {probe.stderr.strip()}")
    module = Path(__file__).with_name("test_cluster_ip.py")
    options = ["-q", "-k", PART, "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "inner")]
    done = subprocess.run(
        [*WAY_IN, sys.executable, "-m", "pytest", str(module), *options],
        cwd=module.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert "passed" in last
    assert "skipped" not in last
