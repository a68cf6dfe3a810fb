"""The daemon's DNS as operators meet it: its file changes, it is scraped, it goes and comes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import dns.exception
import pytest
from tests.netns.cluster import Cluster, service, until
from tests.netns.test_dns_server import ASK, WEB, WEB4, WEB6, ask, query

from vipd.bench.lab import Lab
from vipd.proxy.control import read

pytestmark = pytest.mark.netns

FIRST, SECOND = "169.254.20.10", "169.254.20.11"
SCRAPE = """
import sys, urllib.request, urllib.error
try:
    print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except urllib.error.URLError as error:
    print(error.reason)
"""


class Configured:
    """A daemon with a file."""

    def __init__(self, cluster: Cluster, path: Path) -> None:
        self.cluster, self.path = cluster, path

    def write(self, dns: str, more: str = "") -> None:
        head = "apiVersion: vipd/v1alpha1\nkind: VipdConfiguration\n"
        draft = self.path.with_suffix(".new")
        draft.write_text(f"{head}dns: {dns}\n{more}")
        draft.replace(self.path)

    def status(self) -> dict[str, object]:
        found = json.loads(read(self.cluster.socket, "dns"))
        assert isinstance(found, dict)
        return found

    def scrape(self, path: str = "metrics", host: str = "node") -> str:
        where = f"http://127.0.0.1:9153/{path}"
        done = self.cluster.lab.exec(host, [sys.executable, "-c", SCRAPE, where])
        return done.stdout.strip()

    def value(self, name: str) -> float:
        lines = self.scrape().splitlines()
        return sum(float(one.rpartition(" ")[2]) for one in lines if one.startswith(name))


@pytest.fixture
def configured(lab: Lab, tmp_path: Path) -> Iterator[Configured]:
    path = tmp_path / "vipd.yaml"
    built = Cluster(lab, tmp_path, "--config", str(path))
    made = Configured(built, path)
    made.write(f"{{listen: [{FIRST}]}}")
    try:
        built.start()
        yield made
    finally:
        built.stop()
        done = built.cli("cleanup", "--socket", built.socket)
        assert done.returncode == 0, done.stdout + done.stderr
        assert built.nft("list", "ruleset") == ""


def test_a_changed_file_is_taken_under_load(configured: Configured) -> None:
    cluster = configured.cluster
    cluster.apply(service("web", WEB4, WEB6, ports=[{"name": "http", "port": 80}]))
    until(lambda: ask(cluster.lab, WEB, "A", FIRST) == [str(WEB4)], "web is answered")

    def ttl(at: str = FIRST) -> int:
        return int(query(cluster.lab, "client-1", WEB, "A", at, tcp=False).answer[0].ttl)

    asking = cluster.lab.popen(
        "client-1",
        [sys.executable, "-c", ASK, FIRST, WEB],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert asking.stdout is not None
    with asking:
        assert asking.stdout.readline() == b"first\n"
        configured.write(f"{{listen: [{FIRST}], ttl: 7}}")
        until(lambda: ttl() == 7, "the changed file is taken")
        # A broken one is refused and named; the old one stays.
        configured.write(f"{{listen: [{FIRST}], ttl: seven}}")
        until(lambda: configured.status()["refused"], "the broken file is refused")
        assert f"{configured.path}: dns.ttl: Expected `int`" in str(configured.status()["refused"])
        assert ttl() == 7
        told = cluster.cli("dns", "status", "--socket", cluster.socket)
        assert "dns.ttl: Expected `int`" in told.stdout
        # Another address, and what counts at the next start only.
        configured.write(
            f"{{listen: [{FIRST}, {SECOND}], ttl: 8, workers: 2}}", "masqueradeBit: 3\n"
        )
        until(lambda: configured.status()["listens"] == [f"{FIRST}:53", f"{SECOND}:53"], "both")
        until(lambda: ttl() == 8, "the next file is taken")
        until(lambda: _answers(lambda: ttl(SECOND) == 8), "the other address is reached")
        later = ["masqueradeBit", "dns.workers"]
        until(
            lambda: configured.status()["restart_needed"] == later, "what cannot be taken is told"
        )
        assert f"{SECOND} . 53" in cluster.nft("list", "table", "inet", "vipd-dns")
        configured.write(f"{{listen: [{FIRST}]}}")
        until(lambda: configured.status()["listens"] == [f"{FIRST}:53"], "one is left")
        until(lambda: SECOND not in cluster.nft("list", "ruleset"), "its way is gone")
        counts, _ = asking.communicate(b"", timeout=60)
    assert json.loads(counts)["lost"] == 0
    assert json.loads(counts)["answered"] > 100


def _answers(holds: Callable[[], bool]) -> bool:
    try:
        return holds()
    except (OSError, dns.exception.Timeout):
        return False


def test_metrics_outlive_the_daemon(configured: Configured) -> None:
    cluster = configured.cluster
    cluster.apply(service("web", WEB4, WEB6, ports=[{"name": "http", "port": 80}]))
    until(lambda: ask(cluster.lab, WEB, "A", FIRST) == [str(WEB4)], "web is answered")
    until(lambda: configured.value("coredns_dns_requests_total") >= 1, "it is counted")
    assert configured.scrape("ready") == "OK"
    assert (configured.value("vipd_dns_stale "), configured.value("vipd_dns_workers ")) == (0, 1)
    assert configured.value("vipd_dns_zone_services ") >= 1
    assert "refused" in configured.scrape(host="client-1"), "nobody else is told"
    cluster.stop()
    until(lambda: configured.value("vipd_dns_stale ") == 1, "it is told that nobody tells")
    asked = configured.value("coredns_dns_requests_total")
    assert ask(cluster.lab, WEB, "A", FIRST) == [str(WEB4)]
    until(lambda: configured.value("coredns_dns_requests_total") > asked, "it goes on counting")
    assert configured.scrape("ready") == "OK"
    done = cluster.cli("dns", "status", "--socket", cluster.socket)
    assert done.returncode == 3, done.stderr
    assert "stale for" in done.stdout
    cluster.start()
    until(lambda: configured.value("vipd_dns_stale ") == 0, "the next daemon's workers tell")
    assert configured.scrape("ready") == "OK"
