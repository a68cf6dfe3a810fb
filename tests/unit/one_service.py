"""One service with a TCP and a UDP port, whose endpoints a test changes.

Lives here: its manifest and what is read of it. Must not: know what follows from a change.
"""

from pathlib import Path

from vipd.proxy.events import Applied, Event
from vipd.proxy.names import Family, Protocol, parse_address
from vipd.proxy.sources.manifests import load
from vipd.proxy.virtualserver import Key

SERVICE = """
apiVersion: v1
kind: Service
metadata: {{name: web, namespace: test, annotations: {{{annotations}}}}}
spec:
  clusterIP: 10.96.0.1
  ports: [{{port: 80, name: t}}, {{port: 53, protocol: UDP, name: u}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: web, namespace: test, labels: {{kubernetes.io/service-name: web}}}}
addressType: IPv4
ports: [{{name: t, port: 8080}}, {{name: u, port: 5300, protocol: UDP}}]
endpoints: [{endpoints}]
"""
ONE, TWO, THREE, FOUR = "10.244.1.21", "10.244.1.22", "10.244.1.23", "10.244.1.24"
TCP = Key(Family.IPV4, parse_address("10.96.0.1"), Protocol.TCP, 80)
UDP = Key(Family.IPV4, parse_address("10.96.0.1"), Protocol.UDP, 53)
STATES = {
    "": "",
    "unready": "ready: false",
    "silent": "ready: false, serving: false",
    "terminating": "ready: false, serving: true, terminating: true",
    "ending": "ready: false, serving: false, terminating: true",
}


def applied(file: Path, *endpoints: str, annotations: str = "") -> list[Event]:
    """Return what is told once the service has these: each an address, or `address state`."""
    texts = []
    for one in endpoints:
        address, _, state = one.partition(" ")
        texts.append(f"{{addresses: [{address}], conditions: {{{STATES[state]}}}}}")
    file.write_text(SERVICE.format(annotations=annotations, endpoints=", ".join(texts)))
    return [one for one in load([str(file)]) if isinstance(one, Applied)]
