"""Metrics of DNS workers as Prometheus reads them, and the server that tells them."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from tests.unit.dns_daemon import SETTINGS, Daemon, has_ended, shown, web
from tests.unit.dns_server import WEB, Client, Datagrams, Stream, question
from tests.waiting import until

from vipd.dns.forward.forwarder import Forwarder
from vipd.dns.server import http, metrics_server
from vipd.dns.server.counters import Sizes
from vipd.dns.server.messages import Told
from vipd.dns.server.metrics import METRICS, Sum, Values, exposition, values_of
from vipd.dns.server.service import leftovers, status_without_daemon
from vipd.proxy.cli.dns import _status_lines
from vipd.proxy.cli.dns_views import is_degraded, status_view
from vipd.proxy.events import Synced

PROMTOOL = shutil.which("promtool")
HTTP = msgspec.structs.replace(SETTINGS, http=("127.0.0.1:0",))
NAME = "coredns_dns_requests_total"


async def get(address: Client, path: str, method: str = "GET") -> tuple[int, str]:
    """Return status and body."""
    return parsed(await sent(address, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()))


async def sent(address: Client, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(data)
    async with asyncio.timeout(20):
        reply = await reader.read()
    writer.close()
    return reply


def parsed(reply: bytes) -> tuple[int, str]:
    head, _, body = reply.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head or not body
    return int(head.split(b" ")[1]), body.decode()


def at(daemon: Daemon) -> Client:
    (listen,) = daemon.service.http
    return str(listen.address), listen.port


def values(text: str) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def total(text: str, name: str, label: str = "") -> float:
    return sum(
        value
        for one, value in values(text).items()
        if one.partition("{")[0] == name and label in one
    )


def check(text: str) -> None:
    """Fail unless Prometheus takes it."""
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)), "the samples of a family stand together"
    samples = [line.rpartition(" ")[0] for line in text.splitlines() if line[0] != "#"]
    assert len(samples) == len(set(samples))
    if PROMTOOL is not None:
        done = subprocess.run(
            [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        return
    assert {one.name for one in text_string_to_metric_families(text)}


@pytest_asyncio.fixture
async def state(tmp_path: Path) -> AsyncIterator[Path]:
    """A state folder; what is left in it is ended."""
    yield tmp_path
    await leftovers(tmp_path, remove=True)


async def test_what_is_exported() -> None:
    settings = msgspec.structs.replace(HTTP, forwards=True)
    daemon = await Daemon(settings, None).start(web("10.96.0.1"), Synced())
    client = Datagrams(daemon.address)
    for kind in ("A", "A", "AAAA", "TYPE1234"):
        await client.ask(question(WEB, kind))
    await client.ask(question("nobody.default.svc.cluster.local."))
    await client.ask(question("localhost."))
    stream = await Stream.to(daemon.address)
    await stream.ask(question())
    status, text = await get(at(daemon), "/metrics")
    assert status == 200
    check(text)
    assert total(text, NAME) == 7
    assert total(text, NAME, 'proto="tcp"') == 1
    assert total(text, NAME, 'type="A"') == 5
    assert total(text, NAME, 'type="other"') == 1
    assert total(text, "coredns_build_info", 'version="vipd-') == 1
    label = 'server="dns://:'
    assert total(text, NAME, label) == 7
    assert total(text, "coredns_dns_responses_total", 'rcode="NXDOMAIN"') == 1
    assert total(text, "coredns_dns_responses_total", 'plugin="kubernetes"') == 6
    assert total(text, "coredns_dns_responses_total", 'plugin="forward"') == 1
    assert total(text, "coredns_dns_request_duration_seconds_count") == 7
    assert total(text, "coredns_dns_request_duration_seconds_bucket", 'le="+Inf"') == 7
    assert total(text, "coredns_dns_response_size_bytes_bucket", 'le="100"') > 0
    assert total(text, "coredns_dns_request_size_bytes_count", 'proto="udp"') == 6
    assert total(text, "coredns_local_localhost_requests_total") == 1
    for name, value in (
        ("vipd_dns_synced", 1),
        ("vipd_dns_stale", 0),
        ("vipd_dns_zone_services", 1),
        ("vipd_dns_workers", 1),
        ("vipd_dns_tcp_connections", 1),
        ("vipd_dns_receive_queue_drops_total", 0),
        ("vipd_dns_worker_restarts_total", 0),
        ("coredns_panics_total", 0),
    ):
        assert values(text)[name] == value
    await stream.close()
    client.close()
    await daemon.service.stop()


async def test_whatever_forwarding_counts_has_a_name_here() -> None:
    forwarder = Forwarder()
    told = Told(
        version="1", pid=1, number=0, samples=[(a, list(b), c) for a, b, c in forwarder.samples()]
    )
    text = exposition(values_of(told, "dns://:53")).decode()
    families = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert families <= set(METRICS)
    await forwarder.close()


async def test_all_workers_together_and_one_that_is_killed() -> None:
    daemon = await Daemon(msgspec.structs.replace(HTTP, workers=3), None).start(
        web("10.96.0.1"), Synced()
    )
    clients = [Datagrams(daemon.address) for _ in range(40)]

    async def ask() -> None:
        for client in clients:
            await client.ask(question())

    await ask()
    _, text = await get(at(daemon), "/metrics")
    check(text)
    assert total(text, NAME) == len(clients)
    assert values(text)["vipd_dns_workers"] == 3
    workers = await daemon.service.told()
    assert all(one.types for one in workers)  # each has had some
    sibling = workers[1].pid
    os.kill(sibling, signal.SIGKILL)
    await until(lambda: has_ended(sibling))
    await until(lambda: daemon.service.restarts == 1)
    await daemon.service.in_step()
    await ask()
    async with asyncio.timeout(20):
        while True:  # a text may be told again for a moment
            _, text = await get(at(daemon), "/metrics")
            if values(text)["vipd_dns_workers"] == 3 and total(text, NAME) == 2 * len(clients):
                break
            await asyncio.sleep(0.05)
    assert values(text)["vipd_dns_worker_restarts_total"] == 1
    # The one that adds up: all counters begin again, as Prometheus expects of a new process.
    first = workers[0].pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: daemon.service.restarts == 2)
    await daemon.service.in_step()
    _, text = await get(at(daemon), "/metrics")
    assert total(text, NAME) == 0
    assert values(text)["vipd_dns_workers"] == 3
    await ask()
    async with asyncio.timeout(20):
        while total(text, NAME) != len(clients):
            await asyncio.sleep(0.05)
            _, text = await get(at(daemon), "/metrics")
    for client in clients:
        client.close()
    await daemon.service.stop()


async def test_ready_once_everything_is_known() -> None:
    daemon = await Daemon(msgspec.structs.replace(HTTP, workers=2), None).start()
    assert await get(at(daemon), "/ready") == (503, "kubernetes")
    assert await get(at(daemon), "/health") == (200, "OK")
    daemon.take(web("10.96.0.1"), Synced())
    await daemon.service.in_step()
    async with asyncio.timeout(20):
        while await get(at(daemon), "/ready") != (200, "OK"):  # noqa: ASYNC110 - not told
            await asyncio.sleep(0.05)
    await daemon.service.stop()


async def test_one_that_hangs_is_no_secret() -> None:
    daemon = await Daemon(msgspec.structs.replace(HTTP, workers=2), None).start(
        web("10.96.0.1"), Synced()
    )
    _, text = await get(at(daemon), "/metrics")
    before = values(text)
    assert (before["vipd_dns_workers"], before["vipd_dns_synced"]) == (2, 1)
    (sibling,) = [one.pid for one in await daemon.service.told() if one.number == 1]
    os.kill(sibling, signal.SIGSTOP)
    try:
        async with asyncio.timeout(20):
            while await get(at(daemon), "/ready") != (503, "kubernetes"):  # noqa: ASYNC110 - not told
                await asyncio.sleep(0.05)
        _, text = await get(at(daemon), "/metrics")
        assert (values(text)["vipd_dns_workers"], values(text)["vipd_dns_synced"]) == (1, 1)
        status = await daemon.service.status()
        assert (status.wanted, [one.number for one in status.workers]) == (2, [0])
        assert is_degraded(status)
        told = json.loads(msgspec.json.encode(status_view(status)))
        assert [(one["number"], one["answers"]) for one in told["workers"]] == [(0, 1), (1, 0)]
        assert (told["degraded"], told["workers_wanted"], told["not_the_nodes"]) == (True, 2, [])
        assert told["workers"][0]["services"] == 1
        assert "worker 1     does not answer" in list(_status_lines(status))
    finally:
        os.kill(sibling, signal.SIGCONT)
    async with asyncio.timeout(20):
        while await get(at(daemon), "/ready") != (200, "OK"):  # noqa: ASYNC110 - not told
            await asyncio.sleep(0.05)
    assert not is_degraded(await daemon.service.status())
    await daemon.service.stop()


async def test_without_the_daemon(state: Path) -> None:
    settings = msgspec.structs.replace(HTTP, workers=2)
    daemon = await Daemon(settings, state).start(web("10.96.0.1"), Synced())
    address, questions = at(daemon), daemon.address
    await daemon.service.stop()
    client = Datagrams(questions)
    await shown(client, "10.96.0.1")
    client.close()
    status, text = await get(address, "/metrics")
    assert status == 200
    check(text)
    assert (values(text)["vipd_dns_stale"], values(text)["vipd_dns_synced"]) == (1, 1)
    assert values(text)["vipd_dns_workers"] == 2
    assert total(text, NAME) == 1
    assert await get(address, "/ready") == (200, "OK")
    told = await status_without_daemon(state)
    assert told is not None
    assert told.listens == (f"{questions[0]}:{questions[1]}",)
    assert told.http == (f"{address[0]}:{address[1]}",)
    assert [one.stale_seconds is not None for one in told.workers] == [True, True]


async def test_the_next_daemon_tells_at_the_same_address(state: Path) -> None:
    first = await Daemon(HTTP, state).start(web("10.96.0.1"), Synced())
    address, before = at(first), await first.pid()
    listen = (f"{first.address[0]}:{first.address[1]}",)
    statuses: list[int] = []
    over = asyncio.Event()

    async def scrape() -> None:
        while not over.is_set():
            statuses.append((await get(address, "/ready"))[0])

    scraping = asyncio.ensure_future(scrape())
    await first.service.stop()
    settings = msgspec.structs.replace(HTTP, listen=listen, http=(f"{address[0]}:{address[1]}",))
    second = await Daemon(settings, state).start(web("10.96.0.1"), Synced())
    await until(lambda: has_ended(before))
    over.set()
    await scraping
    assert set(statuses) == {200}
    _, text = await get(address, "/metrics")
    assert values(text)["vipd_dns_stale"] == 0
    await second.service.stop()


async def test_addresses_for_metrics_come_and_go() -> None:
    daemon = await Daemon(HTTP, None).start(web("10.96.0.1"), Synced())
    before = at(daemon)
    await daemon.service.change(msgspec.structs.replace(HTTP, http=("[::1]:0",)))
    await daemon.service.in_step()
    assert at(daemon)[0] == "::1"
    assert (await get(at(daemon), "/health"))[0] == 200
    with pytest.raises(ConnectionRefusedError):
        await get(before, "/health")
    await daemon.service.stop()


async def test_an_address_of_somebody_else_is_no_reason_not_to_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vipd.dns.server import workers

    monkeypatch.setattr(workers, "HTTP_RETRY_SECONDS", 0.05)
    taken = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    settings = msgspec.structs.replace(HTTP, http=(f"127.0.0.1:{port}",))
    daemon = await Daemon(settings, None).start(web("10.96.0.1"), Synced())
    client = Datagrams(daemon.address)
    await shown(client, "10.96.0.1")
    client.close()
    assert daemon.service.http == []
    taken.close()
    await taken.wait_closed()
    await until(lambda: daemon.service.http)
    await daemon.service.in_step()
    async with asyncio.timeout(20):
        assert (await get(at(daemon), "/health"))[0] == 200
    await daemon.service.stop()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"HEAD /health HTTP/1.0\r\n\r\n", 200),
        (b"GET /health?x=1 HTTP/1.1\r\n\r\n", 200),
        (b"GET /health\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nA: " + bytes(http.LONGEST), 431),
    ],
)
async def test_requests(request_: bytes, status: int) -> None:
    served, address = serve()
    assert parsed(await sent(address, request_))[0] == status
    served.close()


def serve() -> tuple[metrics_server.MetricsServer, Client]:
    """Start a server of metrics in this process."""
    import socket

    made = metrics_server.MetricsServer(lambda: Told(version="1", pid=1, number=0))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    address = listener.getsockname()[:2]
    made.change([(address[0], address[1])], [listener], [])
    made.start()
    return made, (address[0], address[1])


async def test_those_who_never_finish_are_pushed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MOST", 4)
    monkeypatch.setattr(http, "AT_ONCE", 100)
    monkeypatch.setattr(http, "SECONDS", 60.0)
    served, address = serve()
    slow = [await asyncio.open_connection(*address) for _ in range(12)]
    for _, writer in slow:
        writer.write(b"GET /metrics HTTP/1.1\r\n")
    assert (await get(address, "/metrics"))[0] == 200
    for reader, writer in slow[:8]:
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
    for _, writer in slow[8:]:
        writer.close()
    served.close()


async def test_those_who_are_silent_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "SECONDS", 0.1)
    served, address = serve()
    reader, writer = await asyncio.open_connection(*address)
    async with asyncio.timeout(20):
        assert await reader.read() == b""
    writer.close()
    served.close()


async def test_a_flood_is_accepted_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    served, address = serve()
    loop = asyncio.get_running_loop()
    began = loop.time()
    replies = await asyncio.gather(*(get(address, "/metrics") for _ in range(30)))
    assert {status for status, _ in replies} == {200}
    # 10 at once, then 20 a second: the other 20 cannot have been sooner.
    assert loop.time() - began > (30 - http.AT_ONCE) / http.PER_SECOND * 0.9
    served.close()


def test_sums_never_go_back() -> None:
    def one(questions: int, entries: int = 0, age: int = 0) -> Values:
        return {
            (NAME, ()): questions,
            ("coredns_cache_entries", ()): entries,
            ("vipd_dns_stale_seconds", ()): age,
        }

    both = Sum()
    both.meet(1, one(100, 3))
    both.take(0, one(5, 1, age=7))
    assert both.values() == one(5, 4, age=7)
    both.take(1, one(110, 3, age=9))
    assert both.values() == one(15, 4, age=9)
    both.lose(1)
    assert both.values() == one(15, 1, age=7)
    both.meet(1, one(2, 0))
    both.take(1, one(4, 0))
    assert both.values() == one(17, 1, age=7)


def test_lengths_come_into_their_buckets() -> None:
    lengths = [0, 1, 99, 100, 101, 511, 512, 4095, 4096, 4097, 8291, 8500, 65_535]
    sizes = Sizes()
    for one in lengths:
        sizes.add(one)
    buckets, whole = sizes.buckets()
    assert buckets == [1, 3, 1, 0, 0, 1, 1, 0, 1, 3, 1, 0, 0, 0, 1]
    assert abs(whole - sum(lengths)) < 4 * 256  # above 4096 they are told roughly


def test_labels_are_escaped() -> None:
    text = exposition({("vipd_dns_events_total", (("event", 'a"\\\n'),)): 1.5}).decode()
    assert text.splitlines()[-1] == 'vipd_dns_events_total{event="a\\"\\\\\\n"} 1.5'
    check(text)


async def test_json_of_the_status_holds_it() -> None:
    daemon = await Daemon(HTTP, None).start(Synced())
    told = json.loads(msgspec.json.encode(await daemon.service.status()))
    assert told["http"] == [f"{at(daemon)[0]}:{at(daemon)[1]}"]
    assert (told["refused"], told["restart_needed"]) == ("", [])
    daemon.service.reread("the file is broken", ["mode"])
    status = await daemon.service.status()
    assert (status.refused, status.restart_needed) == ("the file is broken", ("mode",))
    async with asyncio.timeout(20):
        text = ""
        while not total(text, "coredns_reload_failed_total"):
            _, text = await get(at(daemon), "/metrics")
            await asyncio.sleep(0.05)
    await daemon.service.stop()
