"""The daemon over an API server tells those who look at its Node and at Services, with Events."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.netns.cluster import NFT, QuickDaemon, endpoint_slice, node, service, until
from tests.netns.planes import ours

from vipd.bench import api_process, lab_netns
from vipd.bench.api_process import ApiProcess
from vipd.bench.lab import Lab
from vipd.proxy.control import read
from vipd.proxy.names import Family, parse_address

pytestmark = pytest.mark.netns

ADDRESS = parse_address("10.96.0.10")
TAKEN = 31999
"""A health-check node port that another program has."""
PORTS = [{"name": "http", "port": 80, "protocol": "TCP"}]


@pytest.fixture
def api(lab: Lab, tmp_path: Path) -> Iterator[ApiProcess]:
    old, young = (service(name, ADDRESS, ports=PORTS) for name in ("old", "young"))
    old["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
    young["metadata"]["creationTimestamp"] = "2026-02-01T00:00:00Z"
    checked = service("checked", parse_address("10.96.0.11"), ports=PORTS, type="LoadBalancer",
                      externalTrafficPolicy="Local", healthCheckNodePort=TAKEN)  # fmt: skip
    there = [old, young, checked, node("node", lab), endpoint_slice("old", Family.IPV4, [], PORTS)]
    manifests = tmp_path / "cluster.json"
    manifests.write_text(json.dumps({"items": there}))
    with api_process.serving(lab, "node", tmp_path, manifests) as made:
        yield made


def told(api: ApiProcess) -> dict[tuple[str, str], str]:
    """What was told: by kind of object and reason."""
    events = api.get("/apis/events.k8s.io/v1/events")["items"]
    return {(one["regarding"]["kind"], one["reason"]): one["note"] for one in events}


def test_a_start_a_conflict_a_taken_port_and_what_kube_proxy_left(
    lab: Lab, api: ApiProcess, tmp_path: Path
) -> None:
    lab.exec("node", [NFT, "add", "table", "ip", "kube-proxy"])
    other = lab_netns.inside(lab.path("node"), socket.socket)
    other.bind(("0.0.0.0", TAKEN))
    other.listen()
    daemon = QuickDaemon(lab, ("--kubeconfig", str(api.kubeconfig)), tmp_path)
    daemon.start()
    try:
        until(lambda: len(told(api)) >= 4, "four events")
        found = told(api)
        assert "nftables mode" in found["Node", "Starting"]
        assert "table ip kube-proxy" in found["Node", "KubeProxyLeftovers"]
        conflict = found["Service", "AddressConflict"]
        assert "10.96.0.10:80/TCP" in conflict
        assert "service old is older" in conflict
        failed = found["Service", "FailedToStartServiceHealthcheck"]
        assert f"port {TAKEN}: Address already in use" in failed
        counted = 'vipd_events_total{outcome="written"} 4.0'
        until(lambda: counted in msgspec.json.decode(read(str(daemon.socket), "metrics")), counted)
    finally:
        other.close()
        daemon.stop()
        lab.exec("node", [NFT, "flush", "ruleset"])
    assert ours(lab) == []
