"""Notices become Events that an API server takes, ours and the real one."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from structlog.testing import capture_logs
from tests.api.clusters import ApiCluster, Ours
from tests.api.follower import Follower, until

from vipd.bench.api_server import failure
from vipd.bench.api_store import Json
from vipd.proxy.notice import Notice, Subject, health_check_port_failed, on_node, on_service
from vipd.proxy.sources.kubernetes import notice_rates, notice_writer
from vipd.proxy.sources.kubernetes.notice_wire import CORE
from vipd.proxy.sources.kubernetes.source import KubernetesSource

MakeSource = Callable[..., KubernetesSource]
STARTED = on_node("node-1", "Starting", "StartVipd", "vipd serves", warning=False)
PORT = health_check_port_failed("shop", "web", "node-1", 30123, "address already in use")


@pytest.fixture
async def telling(cluster: ApiCluster, source: MakeSource) -> AsyncIterator[KubernetesSource]:
    """A source that is followed, so that it writes."""
    for one in await cluster.listed("Event") + await cluster.listed("Event", "default"):
        about = one["metadata"]
        await cluster.delete("Event", about["name"], about["namespace"])
    made = source()
    follower = Follower(made)
    yield made
    await follower.stop()


async def events(cluster: ApiCluster, namespace: str = "shop") -> list[Json]:
    found = await cluster.listed("Event", namespace)
    return [one for one in found if one.get("reportingController") == "vipd"]


async def test_a_service_gets_an_event(cluster: ApiCluster, telling: KubernetesSource) -> None:
    telling.tell(PORT)
    await until(lambda: telling.notices.written == 1)
    (event,) = await events(cluster)
    (service,) = await cluster.listed("Service")
    assert event["regarding"]["name"] == "web"
    assert event["regarding"]["uid"] == service["metadata"]["uid"]
    assert event["type"] == "Warning"
    assert event["reason"] == "FailedToStartServiceHealthcheck"
    assert "30123: address already in use" in event["note"]
    assert event["reportingInstance"] == "vipd-node-1"


async def test_a_node_gets_an_event(cluster: ApiCluster, telling: KubernetesSource) -> None:
    telling.tell(STARTED)
    await until(lambda: telling.notices.written == 1)
    (event,) = await events(cluster, "default")
    assert event["regarding"] == {
        "apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "node-1",
    }  # fmt: skip
    assert (event["type"], event["reason"]) == ("Normal", "Starting")


async def test_the_same_again_is_a_series(cluster: ApiCluster, telling: KubernetesSource) -> None:
    for _ in range(5):
        telling.tell(PORT)
    await until(lambda: telling.notices.written + telling.notices.held_back == 5)
    (event,) = await events(cluster)
    assert event["series"]["count"] == 2, "told at the second time, later ones wait"
    assert event["series"]["lastObservedTime"] > event["eventTime"]


async def test_an_event_that_the_server_forgot_is_written_anew(
    cluster: ApiCluster, telling: KubernetesSource
) -> None:
    telling.tell(PORT)
    await until(lambda: telling.notices.written == 1)
    (event,) = await events(cluster)
    await cluster.delete("Event", event["metadata"]["name"])
    telling.tell(PORT)
    await until(lambda: telling.notices.written == 2)
    (again,) = await events(cluster)
    assert "series" not in again or again["series"] is None


async def test_what_all_nodes_say_is_written_once(
    cluster: ApiCluster, telling: KubernetesSource, source: MakeSource
) -> None:
    other = source()
    follower = Follower(other)
    notice = on_service("shop", "web", "AddressConflict", "Resolve", "why", shared=True)
    telling.tell(notice)
    other.tell(notice)
    await until(lambda: telling.notices.written + other.notices.written == 2)
    await follower.stop()
    assert len(await events(cluster)) == 1
    assert telling.notices.failed == other.notices.failed == 0


async def test_a_storm_is_bounded(cluster: ApiCluster, telling: KubernetesSource) -> None:
    for number in range(100):
        telling.tell(on_service("shop", "web", "RejectedByKernel", "Commit", f"why {number}"))
    counts = telling.notices
    await until(lambda: counts.written + counts.held_back == 100)
    assert counts.written == notice_rates.SUBJECT_BURST
    assert len(await events(cluster)) == notice_rates.SUBJECT_BURST


async def test_an_object_that_is_gone_gets_none(
    cluster: ApiCluster, telling: KubernetesSource
) -> None:
    telling.tell(on_service("shop", "gone", "RejectedByKernel", "Commit", "why"))
    telling.tell(Notice(Subject("v1", "Service", "nowhere", "x"), "Malformed", "Read", "why"))
    telling.tell(PORT)
    await until(lambda: telling.notices.written == 1)
    assert len(await events(cluster)) == 1
    assert telling.notices.failed == 0


async def test_long_and_strange_texts_are_taken(
    cluster: ApiCluster, telling: KubernetesSource
) -> None:
    telling.tell(on_service("shop", "web", "RejectedByKernel", "Commit", "ß\x00\n\x1b[1m" * 2000))
    await until(lambda: telling.notices.written == 1)
    (event,) = await events(cluster)
    assert len(event["note"].encode()) <= 1024


async def test_events_of_core_v1_are_taken(
    cluster: ApiCluster, telling: KubernetesSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telling._notices, "_version", CORE)
    telling.tell(PORT)
    telling.tell(PORT)
    telling.tell(STARTED)
    await until(lambda: telling.notices.written == 3)
    path = "/api/v1/namespaces/shop/events"
    (event,) = [
        one
        for one in (await cluster.ask("GET", path))["items"]
        if one["reportingComponent"] == "vipd"
    ]
    assert (event["message"], event["count"]) == (PORT.text, 2)
    await cluster.ask("DELETE", f"{path}/{event['metadata']['name']}")


# What only a server that can be told to fail shows.


@pytest.fixture
def faults(cluster: ApiCluster) -> Ours:
    if not isinstance(cluster, Ours):
        pytest.skip("a real server fails when it likes")
    if not cluster.server.watch_list:
        pytest.skip("the same as with WatchList")
    return cluster


async def test_an_old_server_gets_events_of_core_v1(
    faults: Ours, telling: KubernetesSource
) -> None:
    del faults.server.store.collections["/apis/events.k8s.io/v1/events"]
    telling.tell(PORT)
    telling.tell(PORT)
    await until(lambda: telling.notices.written == 2)
    (kept,) = faults.server.store.collections["/api/v1/events"].objects.values()
    event = json.loads(kept.text)
    assert event["involvedObject"]["name"] == "web"
    assert event["message"] == PORT.text
    assert event["count"] == 2
    assert event["source"] == {"component": "vipd", "host": "node-1"}


async def test_who_may_not_write_does_not_ask_again(
    faults: Ours, telling: KubernetesSource
) -> None:
    faults.server.faults.append(answering(403, "Forbidden", 'events is forbidden: User "vipd"'))
    with capture_logs() as logged:
        for number in range(10):
            telling.tell(on_node("node-1", "SwitchFailed", "Switch", f"why {number}"))
        await until(lambda: telling.notices.failed == 10)
    assert len(posts(faults)) == 1
    assert len([one for one in logged if one["event"] == "events are not written"]) == 1


async def test_a_namespace_that_ends_is_no_refusal(faults: Ours, telling: KubernetesSource) -> None:
    why = "unable to create new content in namespace shop because it is being terminated"
    ending = answering(403, "Forbidden", why)
    faults.server.faults.append(ending)
    telling.tell(PORT)
    await until(lambda: len(posts(faults)) == 1)
    faults.server.faults.remove(ending)
    telling.tell(STARTED)
    await until(lambda: telling.notices.written == 1)


async def test_nothing_is_tried_for_ever(faults: Ours, telling: KubernetesSource) -> None:
    faults.server.faults.append(answering(500, "InternalError", "not now"))
    telling.tell(PORT)
    await until(lambda: telling.notices.failed == 1)
    assert len(posts(faults)) == notice_writer.TRIES


async def test_nobody_waits_where_nothing_is_written(source: MakeSource) -> None:
    made = source()  # not followed, so nothing is taken
    for _ in range(notice_writer.MOST_WAITING + 7):
        made.tell(PORT)
    assert made.notices.lost == 7


def answering(
    code: int, reason: str, message: str
) -> Callable[..., Awaitable[web.Response | None]]:
    async def fault(request: web.Request) -> web.Response | None:
        return failure(code, reason, message) if request.method == "POST" else None

    return fault


def posts(cluster: Ours) -> list[str]:
    return [
        path for method, path in cluster.server.requests if method == "POST" and "vents" in path
    ]
