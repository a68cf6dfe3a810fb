"""Commands that need a daemon or the node: status, services, plan, check, run."""

import json
import socket
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from tests.netns.cluster import CLI, LOCAL, TCP4, TCP6, Cluster, Served, until
from tests.netns.processes import frozen

from vipd.proxy.control import read
from vipd.proxy.errors import ControlError, VipdError
from vipd.proxy.status import Status

pytestmark = pytest.mark.netns


def ask(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return cluster.cli(*arguments, "--socket", cluster.socket)


class TestStatus:
    def test_good(self, cluster: Cluster) -> None:
        cluster.serve(TCP4, LOCAL)
        text = ask(cluster, "status")
        assert (text.returncode, text.stderr) == (0, "")
        assert "mode       nftables on node node" in text.stdout
        assert "serving    1 service, 1 virtual server, 1 endpoint\n" in text.stdout
        assert text.stdout.endswith("health     good\n")
        told = ask(cluster, "status", "--json")
        assert msgspec.json.decode(told.stdout, type=Status).synced is True

    def test_degraded_by_a_problem_that_is_named(self, cluster: Cluster) -> None:
        manifest = cluster.serve(TCP4, LOCAL).manifest()
        manifest["spec"]["ports"][0]["port"] = "eighty"
        manifest["metadata"]["name"] = "broken"
        cluster.apply(manifest)
        until(lambda: cluster.status().problems, "the problem is told")
        told = ask(cluster, "status")
        assert told.returncode == 3
        (line,) = [one for one in told.stdout.splitlines() if one.startswith("not read")]
        assert "broken" in line
        assert "spec.ports[0].port" in line

    @pytest.mark.parametrize("command", ["status", "services"])
    def test_nobody_listens(self, cluster: Cluster, tmp_path: Path, command: str) -> None:
        told = cluster.cli(command, "--socket", str(tmp_path / "none"))
        assert (told.returncode, told.stdout) == (1, "")
        assert told.stderr == f"vipd: no vipd listens on {tmp_path}/none (is `vipd run` running?)\n"


class TestServices:
    def test_of_all_and_of_one(self, cluster: Cluster) -> None:
        one, other = cluster.serve(TCP4, LOCAL, "web-4"), cluster.serve(TCP6, type="NodePort")
        every = ask(cluster, "services")
        assert every.returncode == 0
        for word in (one.name, other.name, "10.244.1.21:9000, 10.244.2.24:9000", "none: reject"):
            assert word in every.stdout
        for name in (f"test/{one.name}", f"test/{one.name}:main"):
            told = json.loads(ask(cluster, "services", name, "--json").stdout)
            assert [view["address"] for view in told] == [f"{one.address}:80"]
        places = {v["address"] for v in json.loads(ask(cluster, "services", "--json").stdout)}
        assert places == {f"{one.address}:80", f"[{other.address}]:80", f"[*]:{other.node_port}"}

    def test_an_unknown_one(self, cluster: Cluster) -> None:
        told = ask(cluster, "services", "nothing")
        assert (told.returncode, told.stderr) == (
            1,
            "vipd: no service default/nothing is served here "
            "(what could not be read: `vipd status`)\n",
        )


class TestPlan:
    def test_nothing_where_nothing_changes(self, cluster: Cluster) -> None:
        cluster.serve(TCP4, LOCAL, annotations={"vipd/algorithm": "round-robin"})
        cluster.serve(TCP6, LOCAL, "web-4", type="NodePort", sessionAffinity="ClientIP")
        told = ask(cluster, "plan", "-f", str(cluster.folder))
        assert (told.returncode, told.stdout, told.stderr) == (0, "", "")

    def test_the_change_and_nothing_else(self, cluster: Cluster, tmp_path: Path) -> None:
        served, other = cluster.serve(TCP4, LOCAL), cluster.serve(TCP4, LOCAL)
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in cluster.folder.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        served._endpoints = [served.endpoint("web-2")]
        (copy / f"endpointslice-{served.name}.json").write_text(json.dumps(served.slice()))
        told = ask(cluster, "plan", "-f", str(copy))
        assert told.returncode == 0
        assert str(served.address) in told.stdout
        assert "10.244.1.22 . 9000" in told.stdout
        assert str(other.address) not in told.stdout
        # It is a dry run: the kernel takes the text, and does what it says. The daemon would take
        # it back at once.
        with frozen(cluster.status().pid):
            cluster.nft("-f", "-", input=told.stdout)
            assert served.outcome("client-1") == "web-2 saw client-1"

    def test_settings_given_beside_a_daemon_are_said_to_be_of_no_use(
        self, cluster: Cluster
    ) -> None:
        told = ask(cluster, "plan", "-f", str(cluster.folder), "--masquerade-all")
        assert (told.returncode, told.stdout) == (0, "")
        assert "settings are the daemon's" in told.stderr


def test_check(cluster: Cluster) -> None:
    told = cluster.cli("check")
    assert told.returncode == 0
    assert "nftables: works here" in told.stdout
    (mode,) = [
        m for m in json.loads(cluster.cli("check", "--json").stdout) if m["mode"] == "nftables"
    ]
    assert mode["supported"] is True
    assert {one["name"] for one in mode["found"]} >= {"nft"}


class TestControlSocket:
    def test_only_this_user_may_connect(self, cluster: Cluster) -> None:
        assert stat.S_IMODE(cluster.daemon.socket.stat().st_mode) == 0o600

    @pytest.mark.parametrize(
        "garbage",
        [
            b"",
            b"\n",
            b"nonsense\n",
            b"\xff\xfe\x00\n",
            b"x" * 100_000,
            b"status",
            b"GET / HTTP/1.1\r\n\r\n",
        ],
        ids=repr,
    )
    def test_garbage_harms_nobody(self, cluster: Cluster, garbage: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(20)
            asking.connect(cluster.socket)
            try:
                asking.sendall(garbage)
                asking.shutdown(socket.SHUT_WR)
                while asking.recv(65536):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                pass
        assert cluster.status().synced
        with pytest.raises(ControlError, match="no request 'nothing'"):
            read(cluster.socket, "nothing")

    def test_many_at_once_and_clients_that_say_nothing(self, cluster: Cluster) -> None:
        silent = [socket.socket(socket.AF_UNIX) for _ in range(50)]
        for one in silent:
            one.connect(cluster.socket)
        assert all(cluster.status().synced for _ in range(20))
        for one in silent:
            one.close()
        assert cluster.status().synced


def test_the_socket_of_a_killed_daemon_is_replaced(module_cluster: Cluster, tmp_path: Path) -> None:
    # The module's daemon holds the node; this one lives on node-2.
    second = Cluster(module_cluster.lab, tmp_path)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(second.socket)
    process = second.lab.popen("node-2", list(second.daemon.command))

    def synced() -> bool:
        try:
            return second.status().synced
        except VipdError:
            return False

    try:
        until(synced, "it answers")
        assert second.status().pid == process.pid
    finally:
        process.terminate()
        process.wait(20)
        second.lab.exec("node-2", ["nft", "flush", "ruleset"])


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.write_text("precious"), "exists and is no socket"),
        (lambda path: path.mkdir(), "exists and is no socket"),
    ],
    ids=["file", "folder"],
)
def test_what_is_no_socket_is_refused_and_left(
    module_cluster: Cluster, tmp_path: Path, make: Callable[[Path], object], why: str
) -> None:
    path = tmp_path / "precious"
    make(path)
    arguments = ["run", "--manifests", str(tmp_path), "--socket", str(path)]
    told = module_cluster.lab.exec("node-2", [*CLI, *arguments])
    assert told.returncode == 2
    assert why in told.stderr
    assert path.exists()
    assert module_cluster.lab.exec("node-2", ["nft", "list", "tables"]).stdout == ""


def test_the_socket_of_a_living_daemon_is_refused(module_cluster: Cluster, tmp_path: Path) -> None:
    arguments = ["run", "--manifests", str(tmp_path), "--socket", module_cluster.socket]
    told = module_cluster.lab.exec("node-2", [*CLI, *arguments])
    assert told.returncode == 1
    assert f"somebody listens on {module_cluster.socket}, such as another vipd" in told.stderr
    assert module_cluster.status().synced


def test_render_is_what_the_daemon_programs(cluster: Cluster) -> None:
    """What `render` prints loads into an empty kernel and serves."""
    served = Served(cluster, TCP4, {})
    served._endpoints = [served.endpoint("web-4")]
    cluster.apply(served.manifest(), served.slice())
    cluster.settled()
    text = cluster.cli("render", "-f", str(cluster.folder), "--node-name", "node").stdout
    lab = cluster.lab
    assert lab.exec("node-2", ["nft", "-f", "-"], input=text).returncode == 0
    try:
        assert lab.ask("node-2", "tcp", served.address, 80).pod == "web-4"
    finally:
        lab.exec("node-2", ["nft", "flush", "ruleset"])
