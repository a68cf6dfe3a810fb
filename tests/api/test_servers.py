"""The API server as a source: what holds against our server holds against the real one.

The real one is kube-apiserver with etcd, where their binaries are found (kube_apiserver.py).
"""

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tests.api.clusters import BAD_TOKEN, GOOD_TOKEN, ApiCluster
from tests.api.follower import Follower, endpoint_slice, name, service, until

from vipd.proxy.events import Applied, Deleted, Kind
from vipd.proxy.sources.kubernetes import following
from vipd.proxy.sources.kubernetes.resources import Wanted

Follow = Callable[..., Awaitable[Follower]]


async def test_what_there_is_and_what_changes(cluster: ApiCluster, follow: Follow) -> None:
    follower = await follow()
    await follower.until(lambda: follower.synced)
    assert follower.of("shop/web") == ("10.244.1.10", "10.244.2.10")
    assert set(follower.snapshot.nodes) == {"node-1"}
    await cluster.put(service("more", "10.96.0.11"))
    await follower.has("shop/web", "shop/more")
    await cluster.put(endpoint_slice("web-1", "10.244.1.11"))
    await follower.until(lambda: follower.of("shop/web") == ("10.244.1.11",))
    await cluster.delete("Service", "more")
    await follower.has("shop/web")
    await cluster.delete("EndpointSlice", "web-1")
    await follower.until(lambda: follower.of("shop/web") == ())
    assert follower.problems == {}


async def test_a_cluster_without_services_is_synced(cluster: ApiCluster, follow: Follow) -> None:
    await cluster.delete("Service", "web")
    await cluster.delete("EndpointSlice", "web-1")
    follower = await follow()
    await follower.until(lambda: follower.synced)
    await follower.has()
    assert follower.problems == {}


async def test_many_pages_are_one_list(
    cluster: ApiCluster, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "PAGE_OBJECTS", 7)
    for number in range(20):
        await cluster.put(service(f"many-{number}", f"10.96.1.{number + 1}"))
    follower = await follow()
    await follower.until(lambda: follower.synced)
    assert len(follower.services()) == 21
    assert not any(isinstance(one, Deleted) for one in follower.events)


async def test_what_other_proxies_serve_is_not_asked_for(
    cluster: ApiCluster, follow: Follow
) -> None:
    label = {"service.kubernetes.io/service-proxy-name": "other"}
    other = service("other", "10.96.0.12")
    other["metadata"]["labels"] = label
    await cluster.put(other)
    await cluster.put(service("headless", "None"))
    headless = endpoint_slice("headless-1", "10.244.1.12", of="headless")
    headless["metadata"]["labels"]["service.kubernetes.io/headless"] = ""
    await cluster.put(headless)
    follower = await follow()
    await follower.until(lambda: follower.synced)
    await follower.has("shop/web")
    assert follower.of("shop/headless") == ()
    web_too = service("web")
    web_too["metadata"]["labels"] = label
    await cluster.put(web_too)  # and one that turns away is gone
    await follower.has()
    await cluster.put(service("web"))
    await follower.has("shop/web")


async def test_names_need_more_of_the_cluster(cluster: ApiCluster, follow: Follow) -> None:
    await cluster.put(service("headless", "None"))
    if not await cluster.listed("Namespace", ""):
        await cluster.put({"kind": "Namespace", "metadata": {"name": "shop"}})
    follower = await follow(Wanted(names=True))
    await follower.until(lambda: follower.synced)
    await follower.has("shop/web", "shop/headless")
    told = [one.object for one in follower.events if isinstance(one, Applied)]
    assert "shop" in [one.name for one in told if type(one).__name__ == "Namespace"]


async def test_a_cut_watch_goes_on_where_it_was(cluster: ApiCluster, follow: Follow) -> None:
    follower = await follow()
    await follower.until(lambda: follower.synced)
    assert cluster.relay.cut() > 0
    await cluster.put(service("more", "10.96.0.11"))
    await follower.has("shop/web", "shop/more")
    assert not any(isinstance(one, Deleted) for one in follower.events)


async def test_a_watch_that_the_server_ends_goes_on_where_it_was(
    cluster: ApiCluster, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "WATCH_SECONDS", 1)
    with capture_logs() as logged:
        follower = await follow()
        await follower.until(lambda: follower.synced)

        def has_ended(times: int) -> bool:
            told = [one["what"] for one in logged if "watch ended" in str(one.get("why"))]
            return told.count("services") >= times

        for number in range(2):
            await until(partial(has_ended, number + 1))
            await cluster.put(service(f"more-{number}", f"10.96.0.{20 + number}"))
        await follower.has("shop/web", "shop/more-0", "shop/more-1")
    assert not [one for one in logged if one["event"] == "list again"]
    assert not any(isinstance(one, Deleted) for one in follower.events)


async def test_what_was_missed_while_the_server_was_away(
    cluster: ApiCluster, follow: Follow
) -> None:
    follower = await follow()
    await follower.until(lambda: follower.synced)
    await cluster.relay.stop()
    await follower.until(lambda: len(follower.problems) >= 1)
    assert "what was read before is kept" in next(iter(follower.problems.values()))
    await cluster.delete("Service", "web")
    await cluster.put(service("other", "10.96.0.11"))
    assert follower.services() == {"shop/web"}
    await cluster.relay.start()
    await follower.has("shop/other")
    await follower.until(lambda: not follower.problems)
    told = [one for one in follower.events if isinstance(one, Deleted)]
    assert told == [Deleted(Kind.SERVICE, name("shop/web"))]


async def test_what_was_missed_beyond_history_is_listed_again(
    cluster: ApiCluster, follow: Follow
) -> None:
    follower = await follow()
    await follower.until(lambda: follower.synced)
    await cluster.relay.stop()
    await cluster.delete("Service", "web")
    await cluster.put(service("other", "10.96.0.11"))
    await cluster.forget()
    assert follower.services() == {"shop/web"}
    began = len(follower.events)
    await cluster.relay.start()
    await follower.has("shop/other")
    await follower.until(lambda: not follower.problems)
    told = [one for one in follower.events[began:] if isinstance(one, Deleted)]
    assert told == [Deleted(Kind.SERVICE, name("shop/web"))]


async def test_a_token_that_is_good_no_more_is_read_again(
    cluster: ApiCluster, follow: Follow, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text(BAD_TOKEN)
    follower = await follow(user={"tokenFile": str(token)})
    await follower.until(lambda: any("401" in one for one in follower.problems.values()))
    assert not follower.synced
    token.write_text(GOOD_TOKEN)
    await follower.until(lambda: follower.synced and not follower.problems)
    await follower.has("shop/web")
    token.write_text(BAD_TOKEN)
    cluster.relay.cut()
    await cluster.put(service("more", "10.96.0.11"))
    token.write_text(GOOD_TOKEN)
    await follower.has("shop/web", "shop/more")
