"""How long it takes to forget the flows of an endpoint that is gone, and what a change meets then.

    python -m vipd.bench.stale_flows --entries 200000 --gone 40000

Lives here: the whole measurement. A table of connection tracking is filled with flows to one UDP
service of five endpoints, then one endpoint leaves; the real daemon, over a folder of manifests,
forgets its flows. Meanwhile new services are written, one after the other, and a client connects to
each as soon as it can. Needs root. Must not: be needed by anything else.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from msgspec import Struct

from vipd.bench.lab import Lab, running
from vipd.bench.lab_daemon import Daemon
from vipd.bench.pod import TCP_PORT
from vipd.bench.sync_cluster import objects
from vipd.proxy.names import Address

SERVICE = IPv4Address("10.96.0.10")
ENDPOINTS = [IPv4Address(f"10.244.2.{number}") for number in range(101, 106)]
ATTEMPT_SECONDS = 0.003
IDLE_CHANGES = 100
TIMEOUT_SECONDS = 60.0
_AT_ONCE = 100


class Round(Struct):
    """One endpoint that left: milliseconds of the look, and of the changes that it met."""

    flows: int
    look: float
    changes: list[float]


def main() -> None:
    """Print one line for each round, then the whole."""
    told = argparse.ArgumentParser(prog="python -m vipd.bench.stale_flows")
    told.add_argument("--entries", type=int, default=200_000, help="in the table, altogether")
    told.add_argument("--gone", type=int, default=40_000, help="of the endpoint that leaves")
    told.add_argument("--rounds", type=int, default=5)
    asked = told.parse_args()
    with running(f"vb{os.getpid()}") as lab, tempfile.TemporaryDirectory() as folder:
        idle, rounds = _measure(lab, Path(folder), asked.entries, asked.gone, asked.rounds)
    for one in rounds:
        met = ", ".join(f"{ms:.1f}" for ms in one.changes) or "none"
        print(f"{one.flows} of {asked.entries} forgotten in {one.look:.0f} ms; changes: {met} ms")
    print(f"changes without a look: {_summary(idle)}")
    print(f"changes during a look:  {_summary([ms for one in rounds for ms in one.changes])}")


def _summary(times: Sequence[float]) -> str:
    if len(times) < 2:
        return f"{len(times)} only"
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return f"{len(times)}, p50 {cuts[49]:.1f}, p99 {cuts[98]:.1f}, worst {max(times):.1f} ms"


def _measure(
    lab: Lab, folder: Path, entries: int, gone: int, rounds: int
) -> tuple[list[float], list[Round]]:
    manifests = folder / "manifests"
    manifests.mkdir()
    pod = lab.node("web-1").ipv4
    _write(manifests, "dns", _dns(ENDPOINTS))
    daemon = Daemon(lab, manifests, folder)
    daemon.arguments = (*daemon.arguments, "--log-format", "json")
    daemon.start()
    numbers = iter(range(1, 60_000))
    try:
        lab.run("node", lambda: _fill(entries, gone))
        idle = [_change(lab, manifests, next(numbers), pod)[1] for _ in range(IDLE_CHANGES)]
        done: list[Round] = []
        for _ in range(rounds):
            _write(manifests, "dns", _dns(ENDPOINTS))
            lab.run("node", lambda: _fill(entries, gone))
            met: list[tuple[float, float]] = []
            told = threading.Event()

            def go_on(met: list[tuple[float, float]] = met, told: threading.Event = told) -> None:
                while not told.is_set():
                    met.append(_change(lab, manifests, next(numbers), pod))

            changing = threading.Thread(target=go_on)
            changing.start()
            try:
                _write(manifests, "dns", _dns(ENDPOINTS[1:]))
                flows, look, end = _forgotten(daemon, len(done), gone)
            finally:
                told.set()
                changing.join()
            begin = end - look / 1000
            during = [ms for at, ms in met if at + ms / 1000 > begin and at < end]
            done.append(Round(flows, look, during))
        return idle, done
    finally:
        daemon.stop()
        lab.exec("node", ["nft", "flush", "ruleset"])


def _forgotten(daemon: Daemon, number: int, gone: int) -> tuple[int, float, float]:
    """Wait for the daemon's line about this round; return flows, milliseconds and its time.

    The other lines are about clients that connected to a service before it was served.
    """
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        lines = [json.loads(one) for one in daemon.log.read_text().splitlines() if one[:1] == "{"]
        found = [one for one in lines if one.get("flows", 0) >= gone]
        if len(found) > number:
            at = datetime.fromisoformat(found[number]["timestamp"]).timestamp()
            return found[number]["flows"], found[number]["ms"], at
        time.sleep(0.05)
    sys.exit(f"nothing was forgotten within {TIMEOUT_SECONDS:.0f} s:\n{daemon.log_tail()}")


def _change(lab: Lab, manifests: Path, number: int, pod: Address) -> tuple[float, float]:
    """Write a new service; return when, and the milliseconds until a client is connected."""
    address = IPv4Address("10.96.10.0") + number
    items = objects(f"new-{number}", address, [IPv4Address(int(pod))])
    items[1]["ports"][0]["port"] = TCP_PORT
    _write(manifests, f"new-{number}", items)
    at, start = time.time(), time.monotonic()
    lab.run("client-1", lambda: _until_connected(str(address)))
    return at, (time.monotonic() - start) * 1000


def _until_connected(address: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((address, 80), timeout=ATTEMPT_SECONDS):
                return
        except OSError:
            continue
    raise TimeoutError(address)


def _dns(endpoints: Sequence[IPv4Address]) -> list[dict[str, Any]]:
    items = objects("dns", SERVICE, list(endpoints))
    items[0]["spec"]["ports"] = [{"name": "http", "port": 53, "protocol": "UDP"}]
    items[0]["spec"]["ports"][0]["targetPort"] = 53
    items[1]["ports"] = [{"name": "http", "port": 53, "protocol": "UDP"}]
    return items


def _write(manifests: Path, name: str, items: list[dict[str, Any]]) -> None:
    draft = manifests / f".{name}"
    draft.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    draft.rename(manifests / f"{name}.json")


def _fill(entries: int, gone: int) -> None:
    """Make flows to the service: so many, of which so many to the first endpoint."""
    Path("/proc/sys/net/netfilter/nf_conntrack_udp_timeout").read_text()  # loads the module
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netfilter:
        made = _flows(entries, gone)
        while batch := b"".join(itertools.islice(made, _AT_ONCE)):
            netfilter.send(batch)


def _flows(entries: int, gone: int) -> Iterator[bytes]:
    """Yield what makes each entry (IPCTNL_MSG_CT_NEW); only errors are answered."""
    others = ENDPOINTS[1:]
    for number in range(entries):
        client = IPv4Address("10.1.0.1") + number // 50_000
        port = 1024 + number % 50_000
        endpoint = ENDPOINTS[0] if number < gone else others[number % len(others)]
        told = (
            _told(1 | _NESTED, _tuple(client, port, SERVICE, 53))
            + _told(2 | _NESTED, _tuple(endpoint, 53, client, port))
            + _told(3, struct.pack(">I", 0x1 << 3 | 0x1 << 1 | 0x1 << 2))
            + _told(7, struct.pack(">I", 600))
        )
        yield struct.pack("=IHHIIBBH", 20 + len(told), 1 << 8, 0x401, 1, 0, 2, 0, 0) + told


_NESTED = 0x8000


def _tuple(source: IPv4Address, port: int, to: IPv4Address, to_port: int) -> bytes:
    addresses = _told(1, source.packed) + _told(2, to.packed)
    ports = _told(2, struct.pack(">H", port)) + _told(3, struct.pack(">H", to_port))
    return _told(1 | _NESTED, addresses) + _told(2 | _NESTED, _told(1, b"\x11") + ports)


def _told(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


if __name__ == "__main__":
    main()
