"""The API servers that a test runs against, one after the other."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from tests.api import kube_apiserver
from tests.api.clusters import GOOD_TOKEN, ApiCluster, ours
from tests.api.follower import FOR_SERVICES, Follower, endpoint_slice, kubeconfig, service

from vipd.bench.api_store import Json
from vipd.proxy.sources.kubernetes import pace
from vipd.proxy.sources.kubernetes.following import Following, ListAgain
from vipd.proxy.sources.kubernetes.resources import Wanted
from vipd.proxy.sources.kubernetes.source import KubernetesSource

Follow = Callable[..., Awaitable[Follower]]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait long after failures."""
    monkeypatch.setattr(pace, "LONGEST_SECONDS", 0.2)
    monkeypatch.setattr(pace, "FIRST_SECONDS", 0.02)


@pytest.fixture(scope="session")
def real(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[kube_apiserver.KubeApiserver | None]:
    if kube_apiserver.missing():
        yield None
        return
    with kube_apiserver.running(tmp_path_factory.mktemp("kube-apiserver")) as made:
        yield made


@pytest.fixture(params=["ours watch-list", "ours pages", "real watch-list", "real pages"])
async def cluster(
    request: pytest.FixtureRequest,
    real: kube_apiserver.KubeApiserver | None,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[ApiCluster]:
    """A server with a service, its endpoints and two nodes."""
    which, how = request.param.split()
    if which == "ours":
        async with ours(watch_list=how == "watch-list") as mine:
            for name in ("node-1", "node-2"):
                await mine.put({"kind": "Node", "metadata": {"name": name}})
            await _fill(mine)
            yield mine
        return
    if real is None:
        pytest.skip(kube_apiserver.missing())
    if how == "pages":

        async def refuse(_: Following) -> str:
            raise ListAgain("the test wants pages")

        monkeypatch.setattr(Following, "_list_by_watching", refuse)
    theirs = kube_apiserver.Real(real)
    await theirs.start()
    try:
        await _fill(theirs)
        yield theirs
    finally:
        await theirs.stop()


async def _fill(cluster: ApiCluster) -> None:
    await cluster.put(service("web"))
    await cluster.put(endpoint_slice("web-1", "10.244.1.10", "10.244.2.10"))


@pytest.fixture
def source(cluster: ApiCluster, tmp_path: Path) -> Callable[..., KubernetesSource]:
    """Makes sources of this cluster."""

    def made(wanted: Wanted = FOR_SERVICES, user: Json | None = None) -> KubernetesSource:
        path = kubeconfig(
            tmp_path / "kubeconfig", cluster.url, user or {"token": GOOD_TOKEN}, **cluster.authority
        )
        return KubernetesSource(path, "node-1", wanted)

    return made


@pytest.fixture
async def follow(source: Callable[..., KubernetesSource]) -> AsyncIterator[Follow]:
    """Follows the cluster."""
    followers: list[Follower] = []

    async def begin(wanted: Wanted = FOR_SERVICES, user: Json | None = None) -> Follower:
        followers.append(Follower(source(wanted, user)))
        return followers[-1]

    yield begin
    for one in followers:
        await one.stop()
