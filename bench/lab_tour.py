"""The steps of the guided tour: each asks, tells what it asked, and checks what came out.

Lives here: what is shown of vipd, with the addresses and ports of examples/. Must not: start or
stop anything (demo.py), nor know how requests are made (lab_ask.py) or drawn (lab_show.py).
"""

import http.client
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from vipd.bench.lab import Lab
from vipd.bench.lab_ask import Answer, Way
from vipd.bench.lab_daemon import CLI
from vipd.bench.lab_show import Shown, milliseconds
from vipd.proxy.names import Address

WEB = (IPv4Address("10.96.0.10"), IPv6Address("fd00:10:96::a"))
EMPTY = (IPv4Address("10.96.0.50"), IPv6Address("fd00:10:96::32"))
STICKY = IPv4Address("10.96.0.30")
BOTH = IPv4Address("10.96.0.60")
NODE_PORT, NODE_PORT_LOCAL = 30080, 30081

PODS = tuple(f"web-{n}" for n in range(1, 7))
LOCAL_PODS = PODS[:3]
KEPT_PODS = PODS[:2]

_MANY = 120
"""Requests that find all of six pods: one tour in 500 million misses one by chance."""
_IN_A_ROW = 40
"""Connections in a row to only two of six pods that chance does not explain."""
_CHANGE_DEADLINE_SECONDS = 10.0
_AT_ONCE_SECONDS = 1.0
"""Below the first retransmission of a SYN, so an answer within it was an answer to the first."""


class Stage:
    """What the steps act on: the lab, and the manifests that the daemon follows."""

    def __init__(self, lab: Lab, manifests: Path, socket: Path) -> None:
        self.lab = lab
        self.manifests = manifests
        self.socket = socket
        """The daemon's control socket."""

    def ask(self, name: str, way: Way, address: Address, port: int, count: int) -> list[Answer]:
        """Ask `count` times, over a new connection each."""
        return [self.lab.ask(name, way, address, port) for _ in range(count)]

    def rewrite(self, name: str, text: str) -> None:
        """Replace a manifest in one step, as an editor or `kubectl` would: never half a file."""
        new = self.manifests.parent / f"{name}.new"
        new.write_text(text)
        new.replace(self.manifests / name)


Step = Callable[[Stage], Shown]


def spread(stage: Stage) -> Shown:
    """Connections to a cluster IP spread over all endpoints."""
    client = stage.lab.node("client-1")
    by_family = [stage.ask(client.name, "http", address, 80, _MANY) for address in WEB]
    counts = [Counter(answer.pod for answer in answers) for answers in by_family]
    sources = {answer.source for answers in by_family for answer in answers}
    shown = Shown(
        what=f"{_MANY} connections from client-1 to each cluster IP of `web`",
        command=f"exec client-1 curl -s http://{WEB[0]}/",
        header=("pod", "IPv4", "IPv6"),
        rows=[(pod, *(str(count[pod]) for count in counts)) for pod in PODS],
    )
    shown.check(all(set(count) == set(PODS) for count in counts), "all six pods answer")
    shown.check(sources <= set(client.addresses), "pods see the client's own address")
    return shown


class Followed:
    """What clients saw after an edit: when each connection began, in seconds, and its pod."""

    def __init__(self) -> None:
        self.answers: list[tuple[float, str]] = []
        self.failed = 0
        self.settled = False

    def last(self, count: int) -> list[str]:
        """The pods of the last `count` connections."""
        return [pod for _, pod in self.answers[-count:]]


def _follow(stage: Stage, text: str, is_settled: Callable[[Followed], bool]) -> Followed:
    """Write web.yaml and ask, one connection after the other, until it is settled or too late."""
    seen = Followed()
    stage.rewrite("web.yaml", text)
    start = time.monotonic()
    while not seen.settled and (at := time.monotonic() - start) < _CHANGE_DEADLINE_SECONDS:
        try:
            answer = stage.lab.ask("client-1", "http", WEB[0], 80, timeout=1.0)
            seen.answers.append((at, answer.pod))
        except OSError:
            seen.failed += 1
        seen.settled = is_settled(seen)
    return seen


def _only_kept(seen: Followed) -> bool:
    recent = seen.last(_IN_A_ROW)
    return len(recent) == _IN_A_ROW and set(recent) <= set(KEPT_PODS)


def scale(stage: Stage) -> Shown:
    """A change of the endpoints is followed while requests keep coming."""
    whole = (stage.manifests / "web.yaml").read_text()
    gone = [f"name: {pod}\n" for pod in PODS if pod not in KEPT_PODS]
    fewer = [text for text in whole.split("\n---\n") if not any(name in text for name in gone)]
    down = _follow(stage, "\n---\n".join(fewer) + "\n", _only_kept)
    up = _follow(stage, whole, lambda seen: {pod for _, pod in seen.answers} == set(PODS))
    stale = [at for at, pod in down.answers if pod not in KEPT_PODS]
    fresh = [at for at, pod in up.answers if pod not in KEPT_PODS]
    shown = Shown(
        what="web.yaml is edited while client-1 keeps asking: four of six pods go, and come back",
        command=f"exec client-1 sh -c 'while :; do curl -s http://{WEB[0]}/; done'",
        header=("change", "seen live after", "requests", "failed"),
        rows=[
            ("6 pods to 2", *_outcome(down, max(stale, default=0.0))),
            ("2 pods to 6", *_outcome(up, min(fresh, default=0.0))),
        ],
    )
    shown.check(down.settled, "after the first edit only the two remaining pods get connections")
    shown.check(up.settled, "after the second edit all six do again")
    shown.check(down.failed + up.failed == 0, "no request failed meanwhile")
    return shown


def _outcome(seen: Followed, live_after: float) -> tuple[str, str, str]:
    requests = len(seen.answers) + seen.failed
    return milliseconds(live_after), str(requests), str(seen.failed)


def refused(stage: Stage) -> Shown:
    """A service without endpoints refuses at once."""
    shown = Shown(
        what="a connection to the service `empty`, which no pod matches",
        command=f"exec client-1 curl -s http://{EMPTY[0]}/",
        header=("cluster IP", "result", "after"),
    )
    for address in EMPTY:
        start = time.monotonic()
        try:
            result = f"answered by {stage.lab.ask('client-1', 'http', address, 80, 3.0).pod}"
        except ConnectionRefusedError:
            result = "refused"
        except OSError as failure:
            result = str(failure)
        seconds = time.monotonic() - start
        shown.rows.append((str(address), result, milliseconds(seconds)))
        shown.check(
            result == "refused" and seconds < _AT_ONCE_SECONDS, f"{address} refuses at once"
        )
    return shown


def node_port(stage: Stage) -> Shown:
    """Node ports from outside: the two traffic policies differ in pods and in the source."""
    node, outside = stage.lab.node("node"), stage.lab.node("outside")
    cluster = stage.ask("outside", "http", node.ipv4, NODE_PORT, _MANY)
    local = stage.ask("outside", "http", node.ipv4, NODE_PORT_LOCAL, _MANY)
    shown = Shown(
        what="connections from outside to two node ports of `node`",
        command=f"exec outside curl -s http://{node.ipv4}:{NODE_PORT}/",
        header=("port", "externalTrafficPolicy", "pods that answer", "source they see"),
        rows=[
            (str(NODE_PORT), "Cluster", _pods(cluster), _sources(cluster)),
            (str(NODE_PORT_LOCAL), "Local", _pods(local), _sources(local)),
        ],
    )
    shown.check({a.source for a in cluster} == {node.ipv4}, "Cluster: pods see the node")
    shown.check({a.source for a in local} == {outside.ipv4}, "Local: pods see the client")
    shown.check({a.pod for a in local} == set(LOCAL_PODS), "Local: only pods of this node")
    return shown


def _pods(answers: list[Answer]) -> str:
    return " ".join(sorted({answer.pod for answer in answers}))


def _sources(answers: list[Answer]) -> str:
    return " ".join(sorted({str(answer.source) for answer in answers}))


def affinity(stage: Stage) -> Shown:
    """With session affinity a client keeps its pod."""
    clients = ("client-1", "client-2")
    asked = {client: stage.ask(client, "http", STICKY, 80, 20) for client in clients}
    shown = Shown(
        what="20 connections from each client to `web-sticky` (sessionAffinity: ClientIP)",
        command=f"exec client-1 curl -s http://{STICKY}/",
        header=("client", "pods that answer"),
        rows=[(client, _pods(answers)) for client, answers in asked.items()],
    )
    for client, answers in asked.items():
        shown.check(len({answer.pod for answer in answers}) == 1, f"{client} keeps one pod")
    return shown


def datagrams(stage: Stage) -> Shown:
    """UDP and TCP on one port of one address."""
    client = stage.lab.node("client-1")
    ways: tuple[Way, Way] = ("udp", "tcp")
    asked = {way: stage.ask("client-1", way, BOTH, 53, _MANY) for way in ways}
    shown = Shown(
        what=f"{_MANY} UDP and {_MANY} TCP requests to port 53 of `both`",
        # Of bash, which every Debian has: nc is not there by itself.
        command=f"exec client-1 bash -c 'exec 3<>/dev/udp/{BOTH}/53; echo who >&3; "
        "timeout 1 head -n 1 <&3'",
        header=("protocol", "pods that answer", "source they see"),
        rows=[(way.upper(), _pods(got), _sources(got)) for way, got in asked.items()],
    )
    for way, answers in asked.items():
        shown.check({a.pod for a in answers} == set(PODS), f"{way.upper()} reaches all six pods")
        shown.check({a.source for a in answers} == {client.ipv4}, f"{way.upper()} keeps the source")
    return shown


def switch(stage: Stage) -> Shown:
    """The dataplane is switched while requests keep coming, and back again."""
    shown = Shown(
        what="client-1 keeps asking, over new connections and one that stays open",
        command=f"exec node vipd mode iptables --socket {stage.socket}",
        header=("switch", "took", "requests meanwhile", "failed", "open connection"),
    )
    with stage.lab.socket("client-1") as kept:
        kept.settimeout(_CHANGE_DEADLINE_SECONDS)
        kept.connect((str(WEB[0]), 80))
        pod = _who(kept)
        for mode in ("iptables", "nftables"):
            start = time.monotonic()
            process = stage.lab.popen(
                "node",
                [*CLI, "mode", mode, "--drain", "5s", "--socket", str(stage.socket)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            asked = failed = after = 0
            took = 0.0
            while after < _IN_A_ROW:
                if process.poll() is None:
                    took = time.monotonic() - start
                else:
                    after += 1
                asked += 1
                try:
                    stage.lab.ask("client-1", "http", WEB[0], 80, timeout=1.0)
                except OSError:
                    failed += 1
            said, _ = process.communicate()
            goes_on = _who(kept) == pod
            shown.rows.append(
                (
                    f"to {mode}",
                    milliseconds(took),
                    str(asked),
                    str(failed),
                    "goes on" if goes_on else "broken",
                )
            )
            done = process.returncode == 0
            why = "" if done else f" ({said.decode(errors='replace').strip()})"
            shown.check(done, f"{mode} serves{why}")
            shown.check(failed == 0, f"no request failed on the way to {mode}")
            shown.check(goes_on, f"the open connection goes on under {mode}")
    return shown


def _who(kept: socket.socket) -> str:
    """Ask over a connection that stays open; return the pod's name."""
    try:
        kept.sendall(b"GET / HTTP/1.1\r\nHost: web\r\n\r\n")
        response = http.client.HTTPResponse(kept)
        response.begin()
        return response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as failure:
        return str(failure)


STEPS: tuple[Step, ...] = (spread, scale, refused, node_port, affinity, datagrams, switch)
"""The tour, in its order."""
