"""What was counted, as programs and people are told it: views, `vipd services`, `vipd status`."""

import asyncio
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from immutables import Map

from vipd.backends.usage import (
    Counting,
    EndpointUsage,
    ServerUsage,
    SetAside,
    Usage,
    WorkerUsage,
)
from vipd.proxy import answers, counted, views, words
from vipd.proxy.answers import Answers
from vipd.proxy.cli.reads import MOST_WORKERS, worker_lines
from vipd.proxy.cli.services import table
from vipd.proxy.errors import Busy, Rejected
from vipd.proxy.names import Family, NamespacedName, Protocol, ServicePortName, parse_address
from vipd.proxy.settings import NodeSettings
from vipd.proxy.snapshot import Snapshot
from vipd.proxy.virtualserver import Endpoint, Key, Kind, NodeNetwork, Table, Use, VirtualServer

ENDPOINTS = tuple(Endpoint(parse_address(f"10.244.0.{number}"), 80) for number in range(1, 6))


def server(name: str, number: int = 1, **how: Any) -> VirtualServer:
    key = Key(Family.IPV4, parse_address(f"10.96.0.{number}"), Protocol.TCP, 80)
    owner = ServicePortName(NamespacedName("shop", name), "http", Protocol.TCP)
    made: dict[str, Any] = {"key": key, "owner": owner, "kind": Kind.CLUSTER}
    made |= {"cluster": ENDPOINTS, "local": ()}
    return VirtualServer(**(made | how))


WEB, API = server("web"), server("api", 2)
COUNTED = ServerUsage(
    open=3,
    so_far=40,
    denied=0,
    unserved=2,
    workers=(0, 1),
    endpoints=(
        EndpointUsage(endpoint=ENDPOINTS[0], open=2, so_far=30, failures=0),
        EndpointUsage(
            endpoint=ENDPOINTS[1], open=0, so_far=9, failures=4, set_aside=(SetAside(1, 11.7),)
        ),
        EndpointUsage(
            endpoint=ENDPOINTS[2],
            open=0,
            so_far=0,
            failures=7,
            set_aside=(SetAside(0, 0.0), SetAside(1, 0.0)),
        ),
        EndpointUsage(
            endpoint=Endpoint(parse_address("10.244.0.9"), 80), open=1, so_far=1, departed=True
        ),
    ),
)
WORKER = WorkerUsage(
    number=0,
    pid=7,
    seconds=200.0,
    restarts=0,
    retired=False,
    listeners=4,
    open=3,
    counters={"tcp_accept_paused": 2, "udp_evicted": 0},
)


class Counts:
    """A driver that counts, as far as it is asked about something."""

    def __init__(self) -> None:
        self.asked: list[list[VirtualServer]] = []
        self.error: Exception | None = None
        self.answers = asyncio.Event()
        self.answers.set()

    async def usage(self, servers: Collection[VirtualServer], client: str = "") -> Usage:
        self.asked.append(list(servers))
        await self.answers.wait()
        if self.error is not None:
            raise self.error
        return Usage({one.key: COUNTED for one in servers}, (WORKER,))


def answering(driver: object, **rejected: Exception) -> Answers:
    """The daemon's answers; `rejected` are services by their names."""
    everything = Map({one.key: (one,) for one in (WEB, API)})
    table = Table(Map(), everything, Map(), NodeNetwork())
    sync = SimpleNamespace(table=table, snapshot=Snapshot(), settings=NodeSettings(node_name="n"))
    switching = SimpleNamespace(
        serving=SimpleNamespace(
            driver=driver,
            rejected={
                one.key: rejected[one.owner.service.name]
                for one in (WEB, API)
                if one.owner.service.name in rejected
            },
        )
    )
    nothing: Any = None
    made: Any = (nothing, sync, switching, nothing, nothing, 0.0, nothing, nothing, tuple)
    return Answers(*made)


async def test_counters_are_asked_for_and_told_with_the_virtual_servers() -> None:
    driver = Counts()
    asking = answering(driver)
    plain = await asking.services()
    assert (driver.asked, [one.counters for one in plain]) == ([], [None, None])
    told = await asking.services("counters")
    assert [one.service for one in told] == ["shop/api:http", "shop/web:http"]
    assert {one.counters.open if one.counters else None for one in told} == {3}
    for name in ("shop/web", "shop/web:http"):
        assert [one.service for one in await asking.services(f"counters {name}")] == [
            "shop/web:http"
        ]
        assert driver.asked[-1] == [WEB]
    assert await asking.services("counters shop/we") == []


async def test_a_mode_that_counts_nothing_is_shown_as_before() -> None:
    asking = answering(object())
    told = await asking.services("counters")
    assert told == await asking.services()
    headings, rows = table(told)
    assert headings == ("SERVICE", "KIND", "ADDRESS", "ENDPOINTS", "NOTES")
    assert {len(row) for row in rows} == {len(headings)}
    assert await asking._workers() == (Usage(), ())


async def test_what_was_rejected_is_told_with_the_reason() -> None:
    asking = answering(Counts(), web=Rejected("", "the port is taken"))
    for told in (await asking.services(), await asking.services("counters")):
        assert [one.rejected for one in told] == [None, "the port is taken"]
        _, rows = table(told)
        assert ["REJECTED: the port is taken" in row[-1] for row in rows] == [False, True]
    told = await asking.services()
    again = msgspec.json.decode(msgspec.json.encode(told), type=list[views.VirtualServerView])
    assert again == told
    sentence = views.rejected(asking._sync.table, {WEB.key: Rejected("", "the port is taken")})
    assert list(sentence) == ["shop/web:http at 10.96.0.1:80/TCP: the port is taken"]


async def test_workers_that_do_not_answer_are_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Counts()
    asking = answering(driver)
    told, silence = await asking._workers()
    assert ([one.pid for one in told.workers], silence) == ([7], ())
    driver.error = Busy("worker 0 has ended")
    assert await asking._workers() == (Usage(), ("workers do not answer: worker 0 has ended",))
    driver.answers.clear()
    monkeypatch.setattr(answers, "PATIENCE_SECONDS", 0.01)
    silence = ("workers do not answer: nothing within 0.01 s",)
    assert await asking._workers() == (Usage(), silence)


def test_a_driver_that_counts_is_known_by_what_it_can() -> None:
    assert isinstance(Counts(), Counting)
    assert not isinstance(object(), Counting)


def test_json_leaves_out_what_is_not_counted() -> None:
    usage = ServerUsage(so_far=9, endpoints=(EndpointUsage(endpoint=ENDPOINTS[0], so_far=9),))
    (told,) = views.services([WEB], {WEB.key: usage})
    assert msgspec.to_builtins(told.counters) == {
        "so_far": 9,
        "endpoints": [{"address": "10.244.0.1:80", "so_far": 9}],
    }
    (told,) = views.services([WEB])
    assert "counters" not in msgspec.to_builtins(told)
    document = msgspec.json.encode(views.services([WEB], {WEB.key: COUNTED}))
    (told,) = msgspec.json.decode(document, type=list[views.VirtualServerView])
    assert told.counters == counted.counters(COUNTED)


def row(one: VirtualServer, usage: ServerUsage | None, *, every: bool = False) -> dict[str, str]:
    shown = views.services([one, API], {} if usage is None else {one.key: usage, API.key: usage})
    headings, rows = table(shown, every=every)
    found = [dict(zip(headings, each, strict=True)) for each in rows]
    (mine,) = [each for each in found if each["SERVICE"] == str(one.owner)]
    return mine


def test_three_endpoints_with_what_is_wrong_with_them() -> None:
    told = row(WEB, COUNTED)
    assert (told["OPEN"], told["SO FAR"]) == ("3", "40")
    assert told["ENDPOINTS"] == (
        "10.244.0.1:80, 10.244.0.2:80 (set aside 12 s by 1 of 2 workers), "
        "10.244.0.3:80 (set aside, tried next), … 5 in all"
    )
    assert told["NOTES"] == "11 failed, 2 set aside, 2 unserved, 1 open to endpoints that left"


def test_every_endpoint_with_everything() -> None:
    told = row(WEB, COUNTED, every=True)
    assert told["ENDPOINTS"].split("), ") == [
        "10.244.0.1:80 (2 open, 30 so far",
        "10.244.0.2:80 (0 open, 9 so far, 4 failed, set aside 12 s by 1 of 2 workers",
        "10.244.0.3:80 (0 open, 0 so far, 7 failed, set aside, tried next",
        "10.244.0.4:80, 10.244.0.5:80, 10.244.0.9:80 (left, 1 open)",
    ]


def test_clients_that_affinity_remembers_are_told() -> None:
    sticky = server("web", affinity_seconds=60)
    some = ServerUsage(open=0, so_far=5, remembered=2, forgotten=3)
    assert row(sticky, some)["NOTES"] == "affinity 60s, 3 forgotten for lack of room"
    assert row(sticky, some, every=True)["NOTES"] == (
        "affinity 60s, 2 remembered, 3 forgotten for lack of room"
    )
    assert counted.counters(some).remembered == 2


def test_options_of_a_service_are_notes() -> None:
    asked = server("web", proxy_protocol=True, keeps_failing=True, use=Use.LOCAL)
    told = row(asked, None)
    assert told["NOTES"] == "local only, PROXY protocol, failing endpoints stay"
    assert "OPEN" not in told
    assert row(server("web", allowed_sources=()), None)["NOTES"] == "from nobody"


def test_what_a_mode_does_not_count_is_a_dash() -> None:
    told = row(WEB, ServerUsage(so_far=9))
    assert (told["OPEN"], told["SO FAR"], told["NOTES"]) == ("-", "9", "")


def test_one_thing_is_one_thing() -> None:
    one = msgspec.structs.replace(counted.worker(WORKER), restarts=1, listeners=1)
    (line, _) = worker_lines([one])
    assert line == "workers    0: pid 7, up 3 min, 1 listener, 3 open, 1 restart"
    assert [words.counted(count, "flow") for count in range(3)] == ["0 flows", "1 flow", "2 flows"]


def test_workers_are_told_one_by_one_as_far_as_there_is_room() -> None:
    one = counted.worker(WORKER)
    ended = msgspec.structs.replace(one, number=1, restarts=3, retired=True, missing=2)
    assert list(worker_lines([one, ended])) == [
        "workers    0: pid 7, up 3 min, 4 listeners, 3 open",
        "           1: pid 7, up 3 min, 4 listeners, 3 open, "
        "cannot listen at 2 places yet, 3 restarts, takes nothing new",
        "counted    tcp accept paused 4",
    ]
    many = list(worker_lines([one] * (MOST_WORKERS + 2)))
    assert (
        many[-2]
        == f"           … {MOST_WORKERS + 2} in all, {3 * (MOST_WORKERS + 2)} open (--json)"
    )
    assert len(many) == MOST_WORKERS + 2
    assert list(worker_lines([])) == []
