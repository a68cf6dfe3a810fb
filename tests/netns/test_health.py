"""The two servers of HTTP of a whole daemon."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from tests.netns.cluster import TCP4, Cluster, Served, until
from tests.netns.http_asking import asked

pytestmark = [pytest.mark.netns]

DAEMON = """
import asyncio, sys
from ipaddress import ip_address
from msgspec.structs import replace
from vipd.proxy import daemon
from vipd.proxy.cli.source import source
from vipd.proxy.config import Flags, load
from vipd.proxy.settings import HttpSettings
flags = Flags(manifests=(sys.argv[1],), node_name="node", socket=sys.argv[2], mode="nftables")
http = HttpSettings(
    healthz=(ip_address("::"), 10256), metrics=(ip_address("127.0.0.1"), 10249), must_bind=True
)
config = replace(load(flags), http=http)
asyncio.run(daemon.run(config, source(config), flags))
"""


def says(cluster: Cluster, path: str, said: bytes) -> bool:
    status, body, _ = asked(cluster, "node", "127.0.0.1", 10249, path)
    assert status == 200
    return said in body


@pytest.mark.modes("nftables")
def test_the_servers_of_a_daemon(new_cluster: Callable[..., Cluster]) -> None:
    cluster = new_cluster()
    process = cluster.lab.popen(
        "node",
        [sys.executable, "-P", "-c", DAEMON, str(cluster.folder), cluster.socket],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        node = cluster.lab.node("node")

        def answers() -> bool:
            try:
                return asked(cluster, "node", "127.0.0.1", 10249, "/healthz")[1] == b"ok"
            except ConnectionRefusedError:
                assert process.poll() is None
                return False

        until(answers, "the metrics server answers")
        until(lambda: cluster.status().synced, "synced")
        for address in node.addresses:  # "::" is for both families
            status, body, _ = asked(cluster, "outside", address, 10256, "/healthz")
            assert (status, json.loads(body)["nodeEligible"]) == (200, True)
        assert cluster.status().http == ("healthz [::]:10256", "metrics 127.0.0.1:10249")
        with pytest.raises(ConnectionRefusedError):
            asked(cluster, "outside", node.ipv4, 10249)
        served = Served(cluster, TCP4, {})
        cluster.apply(served.manifest(), served.slice())
        until(lambda: cluster.status().services == 1, "the service is known")
        for path, said in (
            ("/proxyMode", b"nftables"),
            ("/configz", b'"healthzBindAddress":"[::]:10256"'),
            ("/statusz", b"services: 1\n"),
            ("/flagz", b"node-name=node\n"),
            ("/", f"test/{served.name}:main".encode()),
            ("/metrics", b""),
        ):
            until(functools.partial(says, cluster, path, said), path)
        # A node that the autoscaler is about to delete gets nothing new, and lives.
        manifest = json.loads((cluster.folder / "node-node.json").read_text())
        manifest["spec"]["taints"] = [
            {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}
        ]
        cluster.apply(manifest)
        until(
            lambda: asked(cluster, "node", "127.0.0.1", 10256, "/healthz")[0] == 503,
            "the node is not eligible",
        )
        assert asked(cluster, "node", "127.0.0.1", 10256, "/livez")[0] == 200
        told = cluster.cli("status", "--socket", cluster.socket)
        assert "http       healthz [::]:10256, metrics 127.0.0.1:10249" in told.stdout
    finally:
        process.terminate()
        process.wait(10)
