"""The daemon with the capabilities of deploy/ and no others: every mode, DNS, and packets."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.netns.cluster import FLAVOURS, REMOTE, Cluster, Served, until
from tests.unit.kube_proxy_rules import iptables_mode
from tests.unit.kustomize import built

from vipd.proxy.names import Family

DEPLOY = Path(__file__).parents[2] / "deploy"
DNS = "10.96.0.53"
WITHOUT_ROOTS_POWER = ("Operation not permitted", "Permission denied", "stays root", "cannot be")

pytestmark = [pytest.mark.netns, pytest.mark.modes("nftables")]


def capabilities(folder: Path) -> list[str]:
    """Return what the DaemonSet with every component adds, as setpriv has it."""
    components = [str(path.parent) for path in DEPLOY.glob("components/*/kustomization.yaml")]
    told = {"resources": [str(DEPLOY / "base")], "components": components}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(told))
    (daemon_set,) = [one for one in built(folder) if one["kind"] == "DaemonSet"]
    (container,) = daemon_set["spec"]["template"]["spec"]["containers"]
    return sorted({one.lower() for one in container["securityContext"]["capabilities"]["add"]})


def workers(cluster: Cluster) -> list[int]:
    told = json.loads(cluster.cli("status", "--json", "--socket", cluster.socket).stdout)
    return [one["pid"] for one in told["workers"]]


def test_the_capabilities_of_the_daemonset_are_enough(
    new_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = new_cluster("--dns-listen", DNS, "--service-cidr", "10.96.0.0/16,fd00:10:96::/112")
    allowed = ",".join(f"+{one}" for one in capabilities(tmp_path))
    cluster.daemon.under = (
        *("setpriv", f"--bounding-set=-all,{allowed}", "--inh-caps=-all", "--no-new-privs"),
    )
    cluster.start()
    served = cluster.serve(FLAVOURS[0], REMOTE)
    for mode in ("iptables", "userspace", "nftables"):
        switched = cluster.cli("mode", mode, "--socket", cluster.socket)
        assert switched.returncode == 0, switched.stdout + switched.stderr
        assert served.ask("client-1").pod == REMOTE
        if mode == "userspace":
            before = workers(cluster)
            cluster.stop()
            cluster.start()
            assert before
            assert workers(cluster) == before
            assert served.ask("client-1").pod == REMOTE
    name = f"{served.name}.test.svc.cluster.local"
    asked = cluster.cli("dns", "query", "--socket", cluster.socket, name)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    log = cluster.daemon.log.read_text()
    assert [
        line for line in log.splitlines() if any(one in line for one in WITHOUT_ROOTS_POWER)
    ] == []
    cluster.stop()
    assert cluster.cli("cleanup", "--socket", cluster.socket).returncode == 0


@pytest.mark.skipif(shutil.which("iptables-legacy") is None, reason="needs iptables-legacy")
def test_kube_proxys_place_is_taken_without_a_moment_of_neither(
    new_cluster: Callable[..., Cluster],
) -> None:
    cluster = new_cluster("--after-kube-proxy")
    served = Served(cluster, FLAVOURS[0], {})
    cluster.apply(served.manifest())

    def left() -> str:
        saved = run("iptables-legacy-save")
        return saved if "KUBE-" in saved else ""

    def run(*command: str, text: str = "") -> str:
        done = subprocess.run(
            cluster.lab.command("node", command),
            input=text, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    # A service of kube-proxy's at the same address, whose endpoint is nowhere.
    rules = iptables_mode(Family.IPV4).replace("10.96.0.10", str(served.address))
    run("iptables-legacy-restore", "--noflush", text=rules)
    assert str(served.address) in left()
    cluster.start()
    said = "kube-proxy's rules are removed"
    until(lambda: said in cluster.daemon.log.read_text(), said)
    assert left() == ""
    served.endpoints(REMOTE)
    assert served.ask("client-1").pod == REMOTE
