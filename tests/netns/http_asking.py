"""Asking a node over HTTP, from any host of the lab."""

import http.client

from tests.netns.cluster import Cluster

from vipd.proxy.names import Address

Answer = tuple[int, bytes, str | None]


def asked(cluster: Cluster, client: str, to: Address | str, port: int, path: str = "/") -> Answer:
    """What a host is answered over HTTP: status, body, weight."""

    def ask() -> Answer:
        asking = http.client.HTTPConnection(str(to), port, timeout=10)
        try:
            asking.request("GET", path)
            told = asking.getresponse()
            return told.status, told.read(), told.getheader("X-Load-Balancing-Endpoint-Weight")
        finally:
            asking.close()

    return cluster.lab.run(client, ask)
