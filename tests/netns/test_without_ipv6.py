"""A node on which IPv6 is switched off: its services of IPv6 are rejected, all others go on.

In a network namespace of its own: the switch takes the addresses of IPv6 away from all interfaces.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.netns.cluster import DEADLINE_SECONDS, endpoint_slice, service
from tests.netns.planes import need

from vipd.bench.lab import obstacle
from vipd.proxy.names import Family, parse_address

pytestmark = pytest.mark.netns

INSIDE = """
import contextlib, json, socket, subprocess, sys, time
from pathlib import Path
from vipd.proxy.control import read
from vipd.proxy.errors import ControlError

mode, here = sys.argv[1], Path(sys.argv[2])
manifests, control = here / "manifests", str(here / "control")
for command in ("link set lo up", "addr add 10.99.0.1/32 dev lo"):
    subprocess.run(["ip", *command.split()], check=True)
Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
endpoint = socket.create_server(("10.99.0.1", 8080))

def works(address):
    with contextlib.suppress(OSError), socket.create_connection((address, 80), 10):
        return endpoint.accept() is not None
    return False

def until(holds, what):
    limit = time.monotonic() + float(sys.argv[3])
    while not holds():
        assert time.monotonic() < limit, (what, read(control, "status"))
        time.sleep(0.02)

def rejected():
    with contextlib.suppress(ControlError):
        status = json.loads(read(control, "status"))
        return status["rejected"] if status["synced"] else None

def named(*names):
    found = rejected()
    return found is not None and len(found) == len(names) and all(
        any(f"test/{name}" in one and "IPv6 is switched off on lo" in one for one in found)
        for name in names
    )

def show(name):
    draft = manifests / ".draft"
    draft.write_text((here / name).read_text())
    draft.rename(manifests / f"{name}.json")

checked = json.loads(
    subprocess.run([sys.executable, "-m", "vipd.proxy.cli", "check", "--json"],
                   capture_output=True).stdout
)
(mine,) = [one for one in checked if one["mode"] == mode]
assert mine["supported"], mine
(told,) = [one for one in mine["found"] if one["name"] == "IPv6"]
assert not told["present"] and "disable_ipv6=0" in told["remedy"], told

show("four")
show("six")
daemon = subprocess.Popen(
    [sys.executable, "-m", "vipd.proxy.cli", "run", "--mode", mode, "--manifests", manifests,
     "--node-name", "node", "--node-ip", "10.99.0.1", "--socket", control]
)
try:
    until(lambda: named("six"), "the service of IPv6 is named, and no other")
    assert works("10.96.0.4")
    show("later")
    show("more")
    until(lambda: named("six", "more"), "both are named")
    until(lambda: works("10.96.0.5"), "a service comes beside one that is rejected")
    (manifests / "four.json").unlink()
    (manifests / "six.json").unlink()
    until(lambda: named("more"), "a rejected service goes")
    until(lambda: not works("10.96.0.4"), "a service goes")
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("0")
    assert daemon.poll() is None
finally:
    daemon.terminate()
    daemon.wait()
    subprocess.run(
        [sys.executable, "-m", "vipd.proxy.cli", "cleanup", "--socket", control], check=True
    )
"""


@pytest.mark.parametrize("mode", ["userspace", "ipvs"])
def test_services_of_ipv6_are_rejected_and_all_else_goes_on(mode: str, tmp_path: Path) -> None:
    need(mode)
    if reason := obstacle():
        pytest.skip(f"no network namespaces here: {reason}")
    (tmp_path / "manifests").mkdir()
    for name, family, address, endpoint in (
        ("four", Family.IPV4, "10.96.0.4", "10.99.0.1"),
        ("later", Family.IPV4, "10.96.0.5", "10.99.0.1"),
        ("six", Family.IPV6, "fd00:96::6", "fd00:99::1"),
        ("more", Family.IPV6, "fd00:96::7", "fd00:99::1"),
    ):
        ports = [{"name": "main", "port": 80, "protocol": "TCP"}]
        made = service(name, parse_address(address), ports=ports)
        ends = [{"addresses": [endpoint], "conditions": {"ready": True}}]
        listed = endpoint_slice(name, family, ends, [{**ports[0], "port": 8080}])
        whole = {"apiVersion": "v1", "kind": "List", "items": [made, listed]}
        (tmp_path / name).write_text(json.dumps(whole))
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", INSIDE, mode, tmp_path, str(DEADLINE_SECONDS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
