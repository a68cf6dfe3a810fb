"""A crowd of streams over one service: its endpoint processes, and all of its clients.

Lives here: the service of both families with four endpoints, and who of the crowd lost what. Must
not: know why anybody may lose something.
"""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.netns import streams
from tests.netns.cluster import Cluster, cluster_ip, endpoint_slice, service, until
from tests.netns.stream_client import Talk

from vipd.proxy.names import Family

PORT = 7000
PODS = ("web-1", "web-2", "web-4", "web-5")
CLIENTS = ("client-1", "client-2")
ADDRESSES = {family: cluster_ip(900, family) for family in Family}


class Endpoints:
    """The endpoint processes of streams.py, and what they said."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, pod: str) -> None:
        said = self._folder / f"{pod}.txt"
        before = said.stat().st_size if said.exists() else 0
        command = [sys.executable, "-P", streams.__file__, pod, str(PORT)]
        with said.open("ab") as output:
            self._running[pod] = self.cluster.lab.popen(pod, command, stdout=output)
        until(lambda: said.stat().st_size > before, f"{pod} serves")

    def kill(self, pod: str) -> None:
        process = self._running.pop(pod)
        process.kill()
        process.wait()

    def close(self) -> None:
        for pod in list(self._running):
            self.kill(pod)

    def said(self, word: str) -> dict[int, str]:
        """The connections that an endpoint said something of, and what."""
        lines = [line for one in self._folder.iterdir() for line in one.read_text().splitlines()]
        told = [line.split() for line in lines if line.startswith(word)]
        return {int(words[1]): " ".join(words) for words in told}


def dual_stack(cluster: Cluster) -> None:
    """Serve one service of both families with all four endpoints."""
    port = {"name": "main", "protocol": "TCP", "port": 80}
    cluster.apply(
        service(
            "streams",
            *ADDRESSES.values(),
            type="ClusterIP",
            ipFamilies=[str(one) for one in ADDRESSES],
            ipFamilyPolicy="RequireDualStack",
            ports=[{**port, "targetPort": PORT}],
        )
    )
    for family in Family:
        cluster.apply(
            endpoint_slice(
                f"streams-{family}".lower(),
                family,
                [
                    {"addresses": [str(cluster.lab.node(one).address(family))], "conditions": {}}
                    for one in PODS
                ],
                [{**port, "port": PORT}],
                of="streams",
            )
        )
    cluster.settled()


class Crowd:
    """All the connections of a test."""

    def __init__(self, cluster: Cluster) -> None:
        self.talks: list[Talk] = []
        self._cluster = cluster
        self._tasks: list[asyncio.Task[None]] = []

    async def greet(
        self, count: int, go: asyncio.Event, end: asyncio.Event | None = None
    ) -> list[Talk]:
        """Begin so many more, in turn from both hosts by both families; all know their endpoint.

        `go` and `end` are those of Talk; without `end` they end as soon as they have said all.
        Before that is set, none may have ended, whatever the reason.
        """
        new: list[Talk] = []
        for number, (host, family) in enumerate(
            (host, family) for host in CLIENTS for family in Family
        ):
            kind = socket.AF_INET6 if family is Family.IPV6 else socket.AF_INET
            share = len(range(number, count, len(CLIENTS) * len(Family)))
            made = self._cluster.lab.run(host, lambda: [socket.socket(kind) for _ in range(share)])  # noqa: B023
            first = len(self.talks) + len(new)
            to = (str(ADDRESSES[family]), 80)
            new += [Talk(first + at, one, to, go, end or go) for at, one in enumerate(made)]
        self.talks += new
        self._tasks += [asyncio.create_task(one.run()) for one in new]
        await asyncio.gather(*(one.greeted.wait() for one in new))
        assert [str(one) for one in new if one.ended] == []
        return new

    async def has_arrived(self, share: float) -> None:
        """Wait until this share of all bytes has come, of those that still talk."""
        while self._share() < share:  # noqa: ASYNC110 (bytes, no event)
            await asyncio.sleep(0.01)

    def _share(self) -> float:
        lasting = [one.reply for one in self.talks if not one.ended]
        return sum(one.count for one in lasting) / sum(one.size for one in lasting)

    async def ended(self) -> None:
        await asyncio.gather(*self._tasks)

    def lost(self) -> list[Talk]:
        return [one for one in self.talks if not one.is_whole]


def known(talks: Iterable[Talk]) -> list[str]:
    return [str(one) for one in talks]
